"""Class means of backbone features, as files."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from fastgan.discriminator.backbones import load_backbone
from fastgan.discriminator.class_embedding import (
    class_means,
    load_class_embedding,
    save_class_embedding,
)
from fastgan.errors import UserError


class Toy:
    """Twelve labelled images in memory."""

    def __init__(self, labels, label_dim=3):
        self.label_dim = label_dim
        self.labels = None if labels is None else np.array(labels, np.int64)
        self.pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 16, 16), np.uint8)

    def __len__(self):
        return len(self.pixels)

    def images(self, indices):
        return self.pixels[indices]


LABELS = [0, 1, 2, 2, 1, 0, 2, 2, 2, 1, 0, 2]


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("test_efficientnet", "random")


def test_means_by_hand(backbone):
    data = Toy(LABELS)
    means, counts = class_means(backbone, data, batch=5)
    x = torch.from_numpy(data.pixels).float() / 127.5 - 1
    model = backbone.extractor.model
    with torch.no_grad():
        x = ((x + 1) / 2 - backbone.mean) / backbone.std
        maps = model.blocks(
            model.bn1(model.conv_stem(F.interpolate(x, (224, 224), mode="bilinear")))
        )
    pooled = maps.mean((2, 3))
    labels = torch.tensor(LABELS)
    expected = torch.stack([pooled[labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(means, expected)
    assert counts == [3, 3, 6] and means.dtype == torch.float32


def test_vit_means_are_of_its_own_tokens():
    vit = load_backbone("test_vit", "random")
    means, _ = class_means(vit, Toy(LABELS))
    assert means.shape == (3, 64) == (3, vit.feature_dim)


@pytest.mark.parametrize(
    ("labels", "label_dim", "message"),
    [(None, 0, "no labels"), ([0, 1] * 6, 3, "class 2 has no images")],
)
def test_unusable_labels(backbone, labels, label_dim, message):
    with pytest.raises(UserError, match=message):
        class_means(backbone, Toy(labels, label_dim))


def test_file_round_trip(backbone, tmp_path):
    path = tmp_path / "embedding.safetensors"
    means, counts = class_means(backbone, Toy(LABELS))
    save_class_embedding(path, means, counts, backbone, "toy.zip")
    assert torch.equal(load_class_embedding(path, 3), means)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["backbone.backbone"] == "test_efficientnet"
    assert metadata["dataset"] == "toy.zip" and json.loads(metadata["counts"]) == [3, 3, 6]
    assert [p.name for p in tmp_path.iterdir()] == ["embedding.safetensors"]


def test_unwritable_place_is_a_user_error(backbone, tmp_path):
    with pytest.raises(UserError, match="cannot write"):
        save_class_embedding(tmp_path / "no" / "e.safetensors", torch.ones(1, 2), [1], backbone, "")


def test_bad_files(tmp_path):
    good = torch.ones(3, 4)
    cases = {
        "rows": {"embedding": torch.ones(1000, 4)},
        "vector": {"embedding": torch.ones(3)},
        "nan": {"embedding": good * float("nan")},
        "integers": {"embedding": good.long()},
        "name": {"other": good},
    }
    for name, tensors in cases.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    (tmp_path / "junk.safetensors").write_bytes(b"\x00" * 20)
    for name in [*cases, "junk", "absent"]:
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(UserError) as caught:
            load_class_embedding(path, 3)
        assert str(path) in str(caught.value) and "expected" in str(caught.value)
