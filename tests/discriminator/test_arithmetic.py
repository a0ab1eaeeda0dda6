"""What is computed in less than float32, and what must not be."""

import copy

import pytest
import torch
from torch import nn

from fastgan.discriminator.base import Discriminator
from fastgan.discriminator.diffusion_features import DiffusionDiscriminator
from fastgan.discriminator.heads import HeadConv2d
from fastgan.discriminator.projected import build_projected
from tests.conftest import TINY, live_network

BACKBONE = "test_efficientnet"
LABELS = torch.eye(3)[[0, 2, 1]]


def projected(label_dim: int = 0) -> Discriminator:
    return build_projected([BACKBONE], {BACKBONE: "random"}, label_dim, seed=1)


def diffusion(label_dim: int = 0) -> Discriminator:
    return DiffusionDiscriminator(live_network(TINY), (1, 8, 8), label_dim=label_dim)


KINDS = {"projected": (projected, 3, 16), "diffusion": (diffusion, 1, 8)}


def images(channels: int, size: int) -> torch.Tensor:
    return torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def heard(discriminator: Discriminator, x: torch.Tensor, labels: torch.Tensor | None):
    """Logits, and the dtypes of what the frozen features and every convolution of heads gave."""
    dtypes: dict[str, torch.dtype] = {}

    def note(name: str):
        return lambda module, inputs, output: dtypes.__setitem__(name, output.dtype)

    for name, module in discriminator.heads.named_modules():
        if isinstance(module, HeadConv2d):
            module.register_forward_hook(note(f"{name} to {module.out_channels}"))
    first = discriminator.heads[0]
    first.register_forward_pre_hook(
        lambda module, inputs: dtypes.__setitem__(
            "features", (inputs[0][0] if isinstance(inputs[0], list) else inputs[0]).dtype
        )
    )
    return discriminator(x, labels), dtypes


@pytest.mark.parametrize(
    ("kind", "dtype", "label_dim"),
    [
        ("projected", torch.bfloat16, 0),
        ("diffusion", torch.bfloat16, 3),
        ("diffusion", torch.float16, 0),
        pytest.param("projected", torch.bfloat16, 3, marks=pytest.mark.slow),
        pytest.param("projected", torch.float16, 3, marks=pytest.mark.slow),
    ],
)
def test_parts_compute_in_what_they_are_told(kind: str, dtype: torch.dtype, label_dim: int) -> None:
    make, *shape = KINDS[kind]
    x, labels = images(*shape), LABELS if label_dim else None
    whole = make(label_dim)
    wanted = whole(x, labels)
    for features, heads in ((None, dtype), (dtype, None), (dtype, dtype)):
        discriminator = make(label_dim)
        discriminator.compute_in(features, heads)
        logits, dtypes = heard(discriminator, x, labels)
        assert dtypes.pop("features") == (features or torch.float32)
        last = {name: found for name, found in dtypes.items() if name.endswith(" to 1")}
        rest = {name: found for name, found in dtypes.items() if name not in last}
        assert rest and set(rest.values()) == {heads or torch.float32}
        assert set(last.values()) <= {torch.float32} and (last or label_dim)
        for ours, reference in zip(logits, wanted, strict=True):
            assert ours.dtype == torch.float32
            error = (ours - reference).norm() / reference.norm()
            assert 1e-6 < error < 0.05


def test_spectral_norms_iterate_in_float32() -> None:
    """sigma divides whole weights: rounded to 8 bits, all of a layer would be off together."""
    strict, rounded = projected(), projected()
    rounded.compute_in(torch.bfloat16, torch.bfloat16)
    x = images(3, 16)
    for _ in range(3):
        strict(x), rounded(x)
    found = dict(rounded.heads.named_buffers())
    vectors = [name for name in found if name.endswith(("weight_u", "weight_v"))]
    assert len(vectors) > 8
    for name, buffer in strict.heads.named_buffers():
        if name in vectors:
            assert torch.equal(buffer, found[name])


def test_stored_features_keep_their_norms() -> None:
    discriminator = projected()
    discriminator.compute_in(torch.bfloat16, None)
    before = {k: v.clone() for k, v in discriminator.save_state().items()}
    expected = discriminator(images(3, 16))
    discriminator = projected()
    discriminator.compute_in(torch.bfloat16, None)
    discriminator.store_frozen()
    extractor = discriminator.get_submodule("backbones.0.extractor")
    for module in extractor.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        norm = isinstance(module, nn.BatchNorm2d)
        floating = {t.dtype for t in own if t.is_floating_point()}
        assert floating <= {torch.float32 if norm else torch.bfloat16}
    after = discriminator.save_state()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    # Autocast rounds the same weights at every use.
    torch.testing.assert_close(discriminator(images(3, 16)), expected, rtol=0, atol=0)


def test_a_stored_encoder_is_cast_once() -> None:
    discriminator = diffusion()
    discriminator.compute_in(torch.bfloat16, torch.bfloat16)
    expected = discriminator(images(1, 8))
    stored = copy.deepcopy(discriminator)
    stored.store_frozen()
    # The heads' running state has moved in neither: they have none here.
    torch.testing.assert_close(stored(images(1, 8)), expected, rtol=0, atol=0)
