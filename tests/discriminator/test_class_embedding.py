"""Class means of backbone features, as files."""

import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from fastgan.common.errors import UserError
from fastgan.common.libraries import import_timm
from fastgan.discriminator.backbones import load_backbone
from fastgan.discriminator.class_embedding import (
    class_means,
    load_class_embedding,
)


class Toy:
    """Twelve labelled images in memory."""

    name, resolution, channels = "toy", 16, 3

    def __init__(self, labels, label_dim=3):
        self.label_dim = label_dim
        self.labels = None if labels is None else np.array(labels)
        self.pixels = np.random.default_rng(0).integers(0, 256, (12, 3, 16, 16), np.uint8)

    def __len__(self):
        return len(self.pixels)

    def images(self, indices):
        return self.pixels[indices]

    def provenance(self):
        return {"dataset": "toy.zip"}


LABELS = [0, 1, 2, 2, 1, 0, 2, 2, 2, 1, 0, 2]
TINY = "test_efficientnet"
TOOL = Path(__file__).parents[2] / "tools" / "class_embedding.py"


@pytest.fixture(scope="module")
def backbone():
    return load_backbone("test_efficientnet", "random")


def test_means_by_hand(backbone):
    data = Toy(LABELS)
    means, counts = class_means(backbone, data, batch=5)
    x = torch.from_numpy(data.pixels).float() / 127.5 - 1
    model = backbone.extractor.model
    with torch.no_grad():
        mean, std = (torch.tensor(v)[:, None, None] for v in (backbone.mean, backbone.std))
        x = ((x + 1) / 2 - mean) / std
        maps = model.blocks(
            model.bn1(model.conv_stem(F.interpolate(x, (224, 224), mode="bilinear")))
        )
    pooled = maps.mean((2, 3))
    labels = torch.tensor(LABELS)
    expected = torch.stack([pooled[labels == c].mean(0) for c in range(3)])
    torch.testing.assert_close(means, expected)
    assert counts == [3, 3, 6] and means.dtype == torch.float32


@pytest.mark.parametrize(
    ("labels", "label_dim", "message"),
    [
        (None, 0, "no class labels"),
        (np.eye(3)[[0, 1, 2] * 4], 3, "no class labels"),
        ([0, 1] * 6, 3, "class 2 has no images"),
    ],
)
def test_unusable_labels(backbone, labels, label_dim, message):
    with pytest.raises(UserError, match=message):
        class_means(backbone, Toy(labels, label_dim))


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
    # As root every permission is granted; this fails while it is mapped.
    (tmp_path / "odd.safetensors").symlink_to("/proc/version")
    for name in [*cases, "junk", "odd"]:
        path = tmp_path / f"{name}.safetensors"
        with pytest.raises(UserError) as caught:
            load_class_embedding(path, 3)
        assert str(path) in str(caught.value) and "expected" in str(caught.value)


def test_the_tool(tmp_path, monkeypatch, capsys):
    """On class folders: a row per class, of the given file's weights, and where from."""
    data = Toy([0] * 6 + [1] * 6, label_dim=2)
    for i, (label, pixels) in enumerate(zip(data.labels, data.pixels, strict=True)):
        (tmp_path / "data" / f"class{label}").mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(pixels.transpose(1, 2, 0))
        image.save(tmp_path / "data" / f"class{label}" / f"{i:02d}.png")
    weights, out = tmp_path / "w.safetensors", tmp_path / "e.safetensors"
    save_file(import_timm().create_model(TINY).state_dict(), weights)

    def tool(*arguments):
        monkeypatch.setattr("sys.argv", ["class_embedding.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return end.value.code, capsys.readouterr().err

    assert tool(tmp_path / "data", out, "--backbone", TINY, "--weights", weights) == (0, "")
    backbone = load_backbone(TINY, str(weights))
    torch.testing.assert_close(load_class_embedding(out, 2), class_means(backbone, data)[0])
    with safe_open(out, framework="pt") as file:
        found = {key: json.loads(file.metadata()[key]) for key in ("backbone", "dataset", "counts")}
    assert found["backbone"]["weights"] == "w.safetensors" and found["counts"] == [6, 6]
    assert found["dataset"]["dataset"] == "data"
    code, error = tool("digits", tmp_path / "x.safetensors", "--backbone", "no_such_net")
    assert code == 1 and not (tmp_path / "x.safetensors").exists()
    assert error.startswith("error: no such backbone") and error.count("\n") == 1
    code, error = tool(tmp_path / "data", tmp_path, "--backbone", TINY, "--weights", weights)
    assert code == 1 and error.startswith("error: is a folder")
