"""Class means of a backbone's features: what a conditional head's embedding starts from.

Published: EfficientNet-lite0's mean ImageNet features, [1000, 320]. For other data the rows must be
that data's own classes, hence computed here from the user's data set.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgan.discriminator.backbones import Backbone
from fastgan.errors import UserError


class LabelledImages(Protocol):
    """What is asked of a data set; fastgan.data.open_dataset gives one."""

    label_dim: int
    labels: np.ndarray | None

    def __len__(self) -> int: ...

    def images(self, indices: np.ndarray) -> np.ndarray:
        """uint8 [k, C, H, W]."""


def class_means(
    backbone: Backbone, dataset: LabelledImages, batch: int = 64
) -> tuple[Tensor, list[int]]:
    """Mean pooled feature of each class, float32 [label_dim, feature_dim], and images per class.

    The feature is the backbone's own deepest map (before a ViT's random layers), averaged over
    pixels. Computed on the backbone's device, summed in float64. UserError for a class without
    images or a data set without labels.
    """
    if dataset.labels is None or not dataset.label_dim:
        raise UserError(
            "no labels, in the data set, a class for every image (dataset.json) expected"
        )
    counts = np.bincount(dataset.labels, minlength=dataset.label_dim)
    if not counts.all():
        raise UserError(
            f"class {int(np.argmin(counts))} has no images, in the data set, "
            f"at least one for each of the {dataset.label_dim} classes expected"
        )
    sums = torch.zeros(dataset.label_dim, backbone.feature_dim, dtype=torch.float64)
    for labels, features in _batches(backbone, dataset, dataset.labels, batch):
        sums.index_add_(0, labels, features)
    return (sums / torch.from_numpy(counts)[:, None]).float(), counts.tolist()


def save_class_embedding(
    path: Path, embedding: Tensor, counts: list[int], backbone: Backbone, dataset_name: str
) -> None:
    """Writes `embedding` [classes, width] with its origin as metadata; replaces path at the end."""
    metadata = {f"backbone.{key}": value for key, value in backbone.provenance.items()}
    metadata |= {"format": "fastgan class embedding", "version": "1", "dataset": dataset_name}
    metadata["counts"] = json.dumps(counts)
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"embedding": embedding.contiguous()}, aside, metadata=metadata)
        os.replace(aside, path)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot write the class embedding ({error}), at {path}, a writable folder expected"
        ) from error
    finally:
        aside.unlink(missing_ok=True)


def load_class_embedding(path: str | Path, label_dim: int) -> Tensor:
    """The float32 embedding [label_dim, width]; UserError for another file or number of rows."""
    path = Path(path)
    if not path.is_file():
        raise UserError(
            f"no class embedding, at {path}, a file of tools/class_embedding.py expected"
        )
    try:
        with safe_open(path, framework="pt") as file:
            embedding: Tensor = file.get_tensor("embedding")
    except SafetensorError as error:
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


def _batches(
    backbone: Backbone, dataset: LabelledImages, labels: np.ndarray, batch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Labels [k] and float64 pooled features [k, feature_dim] of all images, in order."""
    for start in range(0, len(dataset), batch):
        indices = np.arange(start, min(start + batch, len(dataset)))
        images = torch.from_numpy(dataset.images(indices)).to(backbone.mean.device)
        with torch.no_grad():
            deepest = backbone.raw_features(images.float() / 127.5 - 1)[-1]
        yield torch.from_numpy(labels[indices]).long(), deepest.mean(dim=(2, 3)).double().cpu()
