"""Feature extractors: shapes, keys, weights that do not fit, results known from elsewhere."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.decomposition import PCA

from fastgan.common.errors import UserError
from fastgan.common.files import file_sha256
from fastgan.common.libraries import import_timm, import_torchvision
from fastgan.data import open_dataset
from fastgan.evaluation.classifiers import CifarResNet
from fastgan.evaluation.extractors import FILE_NAME, load_extractor
from fastgan.evaluation.features import PixelPca


def _images(n: int, channels: int = 3, size: int = 32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture
def resnet_file(tmp_path: Path) -> Path:
    """Random ResNet-56 weights as published: without BatchNorm's counters."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        state = CifarResNet().state_dict()
    path = tmp_path / "resnet56.safetensors"
    save_file({k: v for k, v in state.items() if "num_batches" not in k}, path)
    return path


def test_resnet56_has_the_published_keys_and_depth() -> None:
    state = CifarResNet().state_dict()
    kernels = [k for k, v in state.items() if v.ndim in (2, 4)]
    assert len(kernels) == 56
    # 432 + 18 x 2304, 4608 + 17 x 9216, 18432 + 17 x 36864, 2 per normalised channel, 650.
    assert sum(p.numel() for p in CifarResNet().parameters()) == 853_018
    assert {"conv1.weight", "bn1.running_var", "layer1.0.conv1.weight", "layer3.8.bn2.bias"} <= {
        *state
    }
    assert state["layer2.0.conv1.weight"].shape == (32, 16, 3, 3)
    assert state["linear.weight"].shape == (10, 64)


def test_resnet56_shortcut_subsamples_and_pads_zeros() -> None:
    """With the residual branch switched off a block is relu(shortcut)."""
    net = CifarResNet().eval()
    block = net.layer2[0]
    torch.nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    out = block(x)
    assert out.shape == (1, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any() and not out[:, 24:].any()


def test_resnet56_features_feed_the_classifier(resnet_file: Path) -> None:
    before = torch.get_rng_state()
    extractor = load_extractor("resnet56", device="cpu", weights=resnet_file)
    assert torch.equal(before, torch.get_rng_state())
    images = _images(4)
    features = extractor(images)
    assert features.shape == (4, 64) == (4, extractor.dim)
    net = CifarResNet().eval()
    net.load_state_dict(extractor._net.state_dict())
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    logits = net((images / 255 - mean) / std)
    torch.testing.assert_close(net.linear(features), logits)
    assert extractor.provenance()["weights_sha256"] == file_sha256(resnet_file)
    grey = _images(2, channels=1)
    torch.testing.assert_close(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_resnet56_refuses_what_does_not_fit(resnet_file: Path, tmp_path: Path) -> None:
    state = load_file(resnet_file)
    wrong = {"layer3.8.conv2.weight": torch.zeros(64, 64, 1, 1)}
    for change in (wrong, {"layer4.0.conv1.weight": torch.zeros(1)}):
        save_file(state | change, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=rf"no ResNet-56 .*{next(iter(change))}.*, file .*bad"):
            load_extractor("resnet56", device="cpu", weights=tmp_path / "bad.safetensors")
    (tmp_path / "noise").write_bytes(os.urandom(100))
    with pytest.raises(UserError, match="no ResNet-56"):
        load_extractor("resnet56", device="cpu", weights=tmp_path / "noise")
    extractor = load_extractor("resnet56", device="cpu", weights=resnet_file)
    with pytest.raises(UserError, match="images of 16x16"):
        extractor(_images(1, size=16))


# Where these files lie, the published accuracy is computed.
_WEIGHTS = Path(os.environ.get("FASTGAN_WEIGHTS", "weights")) / "resnet56_cifar10.safetensors"
_IMAGES = Path(os.environ.get("FASTGAN_DATA", "data")) / "cifar10-32x32-test.zip"
_PAIRS = [(_WEIGHTS, _IMAGES)] if _WEIGHTS.is_file() and _IMAGES.is_file() else []


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "images"), _PAIRS)
def test_resnet56_has_its_published_accuracy(weights: Path, images: Path) -> None:
    extractor, data = (
        load_extractor("resnet56", device="cpu", weights=weights),
        open_dataset(images),
    )
    correct = 0
    for part in np.split(np.arange(10000), 20):
        logits = extractor._net.linear(extractor(torch.from_numpy(data.images(part))))
        correct += (logits.argmax(1).numpy() == data.labels[part]).sum()
    assert len(data) == 10000 and correct == 9339


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("vgg", "unknown extractor 'vgg', option `extractor`, right is inception, clean, timm:"),
        ("pca:x", "unknown extractor"),
        ("pca:4", "no images to fit to"),
        ("inception", "no Inception weights given.*download https://"),
        ("resnet56", "no weights given"),
        ("classifier:absent.safetensors", "no such file"),
    ],
)
def test_unusable_specifications(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_extractor(spec, device="cpu")


def test_pca_equals_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(1)
    low_rank = torch.randn(300, 6, generator=generator) @ torch.randn(6, 48, generator=generator)
    noisy = low_rank * 12 + 3 * torch.randn(300, 48, generator=generator)
    images = (noisy + 128).clamp(0, 255).to(torch.uint8).view(300, 3, 4, 4)
    ours = PixelPca.fit(images, 5)
    theirs = PCA(5, svd_solver="full").fit(images.flatten(1).double().numpy() / 127.5 - 1)
    expected = theirs.transform(images.flatten(1).double().numpy() / 127.5 - 1)
    found = ours(images).numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-9)
    assert (ours._components.amax(1) >= -ours._components.amin(1)).all()
    assert np.all(np.diff(found.var(0)) < 0)


def test_pca_sizes() -> None:
    images = _images(20, channels=1, size=4)
    for dim in (0, 17, 21):
        with pytest.raises(UserError, match=f"{dim} components of 20 images with 16 values"):
            PixelPca.fit(images, dim)
    with pytest.raises(UserError, match=r"images with 64 values, .* right is 16"):
        PixelPca.fit(images, 2)(_images(1, channels=1, size=8))


def test_timm_model_with_local_weights(tmp_path: Path) -> None:
    timm = import_timm()
    name = "mobilenetv3_small_050"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name).eval()
    path = tmp_path / "model.safetensors"
    save_file(model.state_dict(), path)
    before = torch.get_rng_state()
    extractor = load_extractor(f"timm:{name}", device="cpu", weights=path)
    assert torch.equal(before, torch.get_rng_state())
    images = _images(2)
    x = torch.nn.functional.interpolate(
        images / 255, (224, 224), mode="bilinear", align_corners=False
    )
    config = model.pretrained_cfg
    mean = torch.tensor(config["mean"]).view(3, 1, 1)
    expected = model((x - mean) / torch.tensor(config["std"]).view(3, 1, 1))
    features = extractor(images)
    assert features.shape == (2, extractor.dim)
    torch.testing.assert_close(model.classifier(features), expected)
    assert extractor.provenance()["weights_sha256"] == file_sha256(path)
    with pytest.raises(UserError, match="could not be loaded"):
        load_extractor("timm:mobilenetv3_small_075", device="cpu", weights=path)
    with pytest.raises(UserError, match="no timm model 'no_such_model'"):
        load_extractor("timm:no_such_model", device="cpu")


def test_timm_weights_are_not_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "executed"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (marker,))

    torch.save({"state_dict": Bomb()}, tmp_path / "bomb.pth")  # noqa: TID251
    with pytest.raises(UserError, match="not readable as tensors"):
        load_extractor("timm:mobilenetv3_small_050", device="cpu", weights=tmp_path / "bomb.pth")
    assert not marker.exists()


class _Layers(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.flatten(1)[:, :2048]


class _FakeInception(torch.nn.Module):
    """The published file's interface: features of uint8 images, and `layers` without the resize."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, x: torch.Tensor, return_features: bool) -> torch.Tensor:
        assert return_features and x.dtype == torch.uint8
        return x.float().flatten(1)[:, :2048]


@pytest.fixture
def inception_folder(tmp_path: Path) -> Path:
    torch.jit.script(_FakeInception()).save(str(tmp_path / FILE_NAME))
    return tmp_path


def test_inception_resizes_inside(inception_folder: Path) -> None:
    for weights in (inception_folder, inception_folder / FILE_NAME):
        extractor = load_extractor("inception", device="cpu", weights=weights)
        grey = _images(3, channels=1)
        expected = grey.repeat(1, 3, 1, 1).flatten(1)[:, :2048].float()
        assert torch.equal(extractor(grey), expected)
    assert extractor.provenance()["weights_sha256"] == file_sha256(inception_folder / FILE_NAME)


def test_clean_mode_resizes_as_clean_fid(inception_folder: Path) -> None:
    import_torchvision()
    from cleanfid.resize import build_resizer

    extractor = load_extractor("clean", device="cpu", weights=inception_folder)
    images = _images(2, size=40)
    resized = [build_resizer("clean")(i.permute(1, 2, 0).numpy()) for i in images]
    expected = (np.stack(resized).transpose(0, 3, 1, 2) - 128) / 128
    found = extractor(images).numpy()
    np.testing.assert_allclose(found, expected.reshape(2, -1)[:, :2048], atol=1e-6)


def test_inception_file_is_checked_before_it_is_loaded(inception_folder: Path) -> None:
    file = inception_folder / FILE_NAME
    with pytest.raises(UserError, match=r"sha256 is .* right is 00"):
        load_extractor("inception", device="cpu", weights=file, expected_sha256="0" * 64)
    file.write_bytes(b"<html>not found</html>")
    with pytest.raises(UserError, match="no TorchScript program"):
        load_extractor("inception", device="cpu", weights=file)
    Image.new("L", (1, 1)).save(inception_folder / "other.png")
    with pytest.raises(UserError, match="clean-fid wants it named"):
        load_extractor("inception", device="cpu", weights=inception_folder / "other.png")
