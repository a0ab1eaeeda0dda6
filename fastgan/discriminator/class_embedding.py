"""Class means of a backbone's features: what a conditional head's embedding starts from.

Published: EfficientNet-lite0's mean ImageNet features, [1000, 320]. For other data the rows must be
that data's own classes, hence computed here from the user's data set.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgan.common.errors import UserError
from fastgan.common.files import replacement, require_file
from fastgan.data import ImageDataset
from fastgan.discriminator.backbones import Backbone


def class_means(
    backbone: Backbone, dataset: ImageDataset, batch: int = 64
) -> tuple[Tensor, list[int]]:
    """Mean pooled feature of each class, float32 [label_dim, feature_dim], and images per class.

    The feature is the backbone's own deepest map (before a ViT's random layers), averaged over
    pixels. Computed on the backbone's device, summed in float64. UserError for a class without
    images or a data set without class labels.
    """
    labels = dataset.labels
    if labels is None or labels.ndim != 1:
        raise UserError(
            f"no class labels, in {dataset.name}, a class for every image (dataset.json) expected"
        )
    counts = np.bincount(labels, minlength=dataset.label_dim)
    if not counts.all():
        raise UserError(
            f"class {int(np.argmin(counts))} has no images, in {dataset.name}, "
            f"at least one for each of the {dataset.label_dim} classes expected"
        )
    sums = torch.zeros(dataset.label_dim, backbone.feature_dim, dtype=torch.float64)
    device = next(backbone.parameters()).device
    for indices in np.split(np.arange(len(dataset)), range(batch, len(dataset), batch)):
        images = torch.from_numpy(dataset.images(indices)).to(device)
        with torch.no_grad():
            deepest = backbone.raw_features(images.float() / 127.5 - 1)[-1]
        classes = torch.from_numpy(labels[indices]).long()
        sums.index_add_(0, classes, deepest.mean(dim=(2, 3)).double().cpu())
    return (sums / torch.from_numpy(counts)[:, None]).float(), counts.tolist()


def save_class_embedding(
    path: Path, embedding: Tensor, counts: list[int], origin: Mapping[str, Any]
) -> None:
    """Writes `embedding` [classes, width]; replaces `path` at the end.

    `counts` (images per class) and `origin` (the provenance of backbone and data, JSON types) go
    into the metadata. UserError when the place cannot be written.
    """
    metadata = {"format": "fastgan class embedding", "version": "1", "counts": json.dumps(counts)}
    metadata |= {key: json.dumps(value) for key, value in origin.items()}
    try:
        with replacement(path) as aside:
            save_file({"embedding": embedding.contiguous()}, aside, metadata=metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the class embedding ({error}), at {path}, free space expected"
        ) from error


def load_class_embedding(path: str | Path, label_dim: int) -> Tensor:
    """The float32 embedding [label_dim, width]; UserError for another file or number of rows."""
    path = require_file(path, "a class embedding, which tools/class_embedding.py makes")
    try:
        with safe_open(path, framework="pt") as file:
            embedding: Tensor = file.get_tensor("embedding")
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read the class embedding ({error}), at {path}, "
            "a .safetensors file with a tensor named embedding expected"
        ) from error
    if embedding.ndim != 2 or len(embedding) != label_dim:
        raise UserError(
            f"class embedding of shape {list(embedding.shape)}, in {path}, "
            f"one row for each of the {label_dim} classes expected"
        )
    if not embedding.is_floating_point() or not embedding.isfinite().all():
        raise UserError(f"class embedding is not finite, in {path}, finite numbers expected")
    return embedding.float()
