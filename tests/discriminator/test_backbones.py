"""Feature levels, preprocessing, loading and double differentiability of the backbones."""

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgan.common.errors import UserError
from fastgan.common.libraries import import_timm, import_torchvision
from fastgan.discriminator.backbones import load_backbone


def images(n: int, size: int = 32, channels: int = 3, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, channels, size, size, generator=generator) * 2 - 1


def shapes(maps: list[torch.Tensor]) -> list[tuple[int, int]]:
    assert all(x.shape[2] == x.shape[3] for x in maps)
    return [(x.shape[1], x.shape[3]) for x in maps]


@pytest.fixture(scope="module")
def lite0():
    return load_backbone("tf_efficientnet_lite0", "random")


PUBLISHED_LEVELS = {
    "tf_efficientnet_lite0": [(24, 56), (40, 28), (112, 14), (320, 7)],
    "efficientnet_b0": [(24, 56), (40, 28), (112, 14), (320, 7)],
    "mobilenetv2_100": [(24, 56), (32, 28), (96, 14), (320, 7)],
    "deit_base_distilled_patch16_224": [(96, 56), (192, 28), (384, 14), (768, 7)],
    "resnet18": [(64, 56), (128, 28), (256, 14), (512, 7)],
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith("deit") else ())
        for name in PUBLISHED_LEVELS
    ],
)
def test_levels(name):
    backbone = load_backbone(name, "random")
    with torch.no_grad():
        maps = backbone(images(1))
    assert shapes(maps) == PUBLISHED_LEVELS[name]
    assert backbone.channels == [channels for channels, _ in PUBLISHED_LEVELS[name]]
    assert not any(p.requires_grad for p in backbone.parameters())


@pytest.mark.slow
def test_vgg_levels_are_torchvisions_feature_slices():
    """The same tensors through torchvision's own network, cut before max-pools 2 to 5."""
    vgg = load_backbone("vgg16_bn", "random")
    reference = import_torchvision().models.vgg16_bn(init_weights=False).features.eval()
    own = vgg.extractor.model.state_dict().values()
    reference.load_state_dict(dict(zip(reference.state_dict(), own, strict=True)))
    x = images(1)
    with torch.no_grad():
        maps = vgg(x)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        y = ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        y = F.interpolate(y, (224, 224), mode="bilinear")
        expected = [reference[:end](y) for end in (13, 23, 33, 43)]
    assert shapes(maps) == [(128, 112), (256, 56), (512, 28), (512, 14)]
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_lite0_applies_the_stem_activation_once(lite0):
    """Against the full model, walked by hand: stem, ReLU6 inside bn1, blocks."""
    timm = import_timm()
    full = timm.create_model("tf_efficientnet_lite0").eval()
    full.load_state_dict(lite0.extractor.model.state_dict(), strict=False)
    x = F.interpolate(images(2), (224, 224), mode="bilinear")
    expected = []
    with torch.no_grad():
        y = F.conv2d(F.pad(x, (0, 1, 0, 1)), full.conv_stem.weight, stride=2)
        norm = full.bn1
        y = F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=1e-3)
        y = y.clamp(0, 6)
        for i, block in enumerate(full.blocks):
            y = block(y)
            if i in (1, 2, 4, 6):
                expected.append(y)
        maps = lite0(images(2))
    for ours, theirs in zip(maps, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vit_levels_are_raw_patch_tokens():
    """Blocks 2, 5, 8, 11 of the full model by hooks, before the final norm, prefix dropped."""
    name = "deit_tiny_distilled_patch16_224"
    backbone = load_backbone(name, "random", seed=3)
    full = import_timm().create_model(name).eval()
    full.load_state_dict(backbone.extractor.model.state_dict(), strict=False)
    tokens = {}
    for i in (2, 5, 8, 11):
        full.blocks[i].register_forward_hook(lambda _m, _i, y, i=i: tokens.update({i: y}))
    x = images(1)
    with torch.no_grad():
        maps = backbone.raw_features(x)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        y = ((x + 1) / 2 - mean[:, None, None]) / std[:, None, None]
        full(F.interpolate(y, (224, 224), mode="bilinear"))
    for ours, i in zip(maps, (2, 5, 8, 11), strict=True):
        torch.testing.assert_close(ours.flatten(2).transpose(1, 2), tokens[i][:, 2:])


def test_preprocessing(lite0):
    """Grey images repeat; small ones are enlarged, large ones stay; the range is [-1, 1]."""
    grey = images(1, channels=1)
    with torch.no_grad():
        for a, b in zip(lite0(grey), lite0(grey.repeat(1, 3, 1, 1)), strict=True):
            torch.testing.assert_close(a, b)
        assert lite0(images(1, size=256))[0].shape[-1] == 64
    torch.testing.assert_close(lite0._preprocess(images(1, 224)), images(1, 224))
    vit = load_backbone("test_vit", "random")
    assert vit._preprocess(images(1, size=256)).shape[-1] == vit.size


def test_the_weights_decide_the_layout(lite0):
    """NCHW as published; an engine that wants channels_last converts the weights."""
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    copied = copy.deepcopy(lite0)
    plain = copied(x)
    assert copied._preprocess(x).is_contiguous()
    copied.to(memory_format=torch.channels_last)
    assert copied._preprocess(x).is_contiguous(memory_format=torch.channels_last)
    for a, b in zip(plain, copied(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_penalty_on_the_image_gradient_has_a_gradient(name):
    """R1 differentiates twice; the second derivative is compared with a finite difference."""
    backbone = load_backbone(name, "random").double()
    direction = images(2, size=8, seed=1).double()

    def slope(x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_() if x.is_leaf else x
        with sdpa_kernel(SDPBackend.MATH):
            y = sum((m**2).mean() for m in backbone(x))
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return (g * direction).sum()

    x = images(2, size=8).double()
    (second,) = torch.autograd.grad(slope(x), x)
    step = 1e-6
    change = (slope((x + step * direction).detach()) - slope((x - step * direction).detach())) / (
        2 * step
    )
    torch.testing.assert_close((second * direction).sum(), change.detach(), rtol=1e-2, atol=1e-9)
    assert all(p.grad is None for p in backbone.parameters())


def test_local_files_load_strictly(tmp_path):
    full = import_timm().create_model("test_efficientnet")
    with torch.no_grad():
        full.conv_stem.weight.fill_(0.25)
    state = full.state_dict()
    save_file(state, tmp_path / "w.safetensors", metadata={"license": "MIT"})
    torch.save({"model": state}, tmp_path / "w.pth")  # noqa: TID251
    for file in ("w.safetensors", "w.pth"):
        backbone = load_backbone("test_efficientnet", str(tmp_path / file))
        assert torch.all(backbone.extractor.model.conv_stem.weight == 0.25)
        assert backbone.provenance["weights"] == file
        assert len(backbone.provenance["sha256"]) == 64
        assert "state_dict" not in backbone.extractor.model.pretrained_cfg
    assert (
        load_backbone("test_efficientnet", str(tmp_path / "w.safetensors")).provenance["license"]
        == "MIT"
    )


def test_tensorflow_convention_is_told_by_the_file(tmp_path):
    full = import_timm().create_model("mobilenetv2_100")
    note = {"input": "RGB, (x - 0.5) / 0.5"}
    save_file(full.state_dict(), tmp_path / "tf.safetensors", metadata=note)
    save_file(full.state_dict(), tmp_path / "timm.safetensors")
    ours = load_backbone("mobilenetv2_100", str(tmp_path / "tf.safetensors"))
    timms = load_backbone("mobilenetv2_100", str(tmp_path / "timm.safetensors"))
    assert ours.mean == (0.5,) * 3 == ours.std
    assert ours.extractor.model.bn1.eps == 1e-3 and timms.extractor.model.bn1.eps == 1e-5
    x = images(1)
    with torch.no_grad():
        full = import_timm().create_model("mobilenetv2_100", pad_type="same", bn_eps=1e-3).eval()
        full.load_state_dict(ours.extractor.model.state_dict(), strict=False)
        y = full.bn1(full.conv_stem(F.interpolate(x, (224, 224), mode="bilinear")))
        torch.testing.assert_close(ours(x)[0], full.blocks[1](full.blocks[0](y)))


def broken_files(folder: Path) -> dict[str, Path]:
    state = import_timm().create_model("test_efficientnet").state_dict()
    fewer = {k: v for k, v in state.items() if "blocks.1" not in k}
    other = state | {"blocks.0.0.conv.weight": torch.zeros(1)}
    save_file(fewer, folder / "fewer.safetensors")
    save_file(other, folder / "shape.safetensors")
    save_file(state | {"extra": torch.zeros(1)}, folder / "extra.safetensors")
    save_file({"a": torch.zeros(1)}, folder / "other.safetensors")
    (folder / "junk.safetensors").write_bytes(b"junk" * 10)
    (folder / "junk.pth").write_bytes(b"junk" * 10)
    torch.save({"a": 1}, folder / "list.pth")  # noqa: TID251
    torch.save({"a": Path}, folder / "code.pth")  # noqa: TID251
    return {p.name: p for p in folder.iterdir()} | {"absent": folder / "absent.pth"}


def test_bad_weights_are_one_line_naming_the_file(tmp_path):
    for path in broken_files(tmp_path).values():
        with pytest.raises(UserError) as caught:
            load_backbone("test_efficientnet", str(path))
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
        assert "expected" in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_net", "no such backbone 'no_such_net'"),
        ("efficientvit_m0", "3 resolutions"),
        ("vit_small_patch32_224", "7 x 7 patches"),
    ],
)
def test_unusable_networks_are_user_errors(name, message):
    with pytest.raises(UserError, match=message):
        load_backbone(name, "random")
