"""group_norm_silu against its float64 definition (what all ops promise: test_every_op.py)."""

import pytest
import torch
from fastgan_kernels import norm_silu
from fastgan_kernels.norm_silu import group_norm_silu, group_norm_silu_ref
from oracle import DEVICE, DTYPES, check, results
from torch import Tensor

# N, C, H, W, groups: the published networks' kinds of groups, scaled down, then the nasty ones.
SHAPES = {
    "groups of 4": (2, 32, 8, 8, 8),
    "groups of 12, CIFAR's 384": (1, 48, 4, 4, 4),
    "groups of 18, ADM's 576": (1, 72, 4, 4, 4),
    "groups of 42, ADM's 1344": (1, 168, 2, 2, 4),
    "swept, last tile partial": (1, 48, 45, 47, 2),
    "swept, slab wider than 128": (1, 336, 10, 10, 2),
    "odd channels": (2, 5, 3, 3, 1),
    "one group": (2, 40, 4, 4, 1),
    "one pixel": (3, 64, 1, 1, 16),
    "one channel": (2, 1, 5, 3, 1),
    "one channel a group": (2, 16, 4, 4, 16),
}
# In 16 bits slabs are wider, and some are held as two tiles.
HALF_SHAPES = {
    "groups of 8": (2, 64, 4, 4, 8),
    "groups of 6, ADM's 192": (2, 24, 8, 8, 4),
    "one read as tiles of 16 and 8": (1, 24, 32, 32, 4),
    "one read as tiles of 64 and 8": (1, 72, 16, 15, 4),
    "swept, 48 x 48": (1, 32, 48, 48, 2),
    "odd channels": (2, 5, 3, 3, 1),
    "one pixel": (3, 64, 1, 1, 16),
}
CASES = [(name, torch.float32) for name in SHAPES]
CASES += [(name, dtype) for name in HALF_SHAPES for dtype in DTYPES if dtype.itemsize == 2]
ALL = "pre_shift scale shift"
EMBEDDINGS = {"plain": "", "song": "pre_shift", "adm": "scale shift", "all": ALL}
SMALL = (2, 24, 4, 4, 4)


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    embedding: str = ALL,
    mean: float = 0.5,
    std: float = 2.0,
) -> dict[str, Tensor]:
    """Inputs of the op by name; the parameters are float32 masters, as in the networks."""
    n, c, h, w, _ = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE)

    x = (normal(n, c, h, w) * std + mean).to(dtype).to(memory_format=torch.channels_last)
    inputs = {"x": x, "weight": 1 + 0.3 * normal(c), "bias": 0.3 * normal(c)}
    return inputs | {name: normal(n, c).to(dtype) * 0.5 for name in embedding.split()}


def compare(inputs: dict[str, Tensor], groups: int, **options: object) -> None:
    check(group_norm_silu, group_norm_silu_ref, inputs, num_groups=groups, **options)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_as_accurate_as_plain_pytorch(name: str, dtype: torch.dtype, poisoned: None) -> None:
    shape = (SHAPES if dtype == torch.float32 else HALF_SHAPES)[name]
    compare(make(shape, dtype), shape[-1])


@pytest.mark.parametrize("embedding", EMBEDDINGS)
@pytest.mark.parametrize("act", [True, False])
def test_every_embedding(embedding: str, act: bool, poisoned: None) -> None:
    compare(make(SMALL, embedding=EMBEDDINGS[embedding]), 4, act=act, eps=1e-3)


@pytest.mark.parametrize("shape", [(2, 32, 8, 8, 8), (1, 32, 48, 48, 2)])
def test_large_mean_small_deviation(shape: tuple[int, ...], poisoned: None) -> None:
    """E[x^2] - E[x]^2 would lose all digits here; eps keeps the gradients finite."""
    inputs = make(shape, embedding="", mean=1e3, std=1e-2)
    compare(inputs, shape[-1], eps=1e-6)
    y = group_norm_silu(inputs["x"], shape[-1], act=False, eps=1e-6)
    assert abs(float(y.std()) - 1) < 0.02


def test_without_weight_and_bias(poisoned: None) -> None:
    inputs = make(SMALL, embedding="shift")
    compare({name: inputs[name] for name in ("x", "shift")}, 4)


def test_chunked_and_shared_embeddings() -> None:
    """scale and shift as halves of one affine map's rows; one row of pre_shift for all samples."""
    x, rows = make(SMALL)["x"], torch.randn(2, 48, device=DEVICE)
    scale, shift = rows.chunk(2, dim=1)
    given = {"scale": scale, "shift": shift, "pre_shift": rows[:1, :24]}
    exact = group_norm_silu_ref(x, 4, **given)
    assert torch.allclose(group_norm_silu(x, 4, **given), exact, atol=1e-5)


def test_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen norm computes dx alone; without dx the second sweep is left out."""
    asked: list[object] = []
    original = norm_silu.group_norm_silu_backward

    def spy(*arguments: object, **options: object) -> object:
        asked.append(options["wanted"])
        return original(*arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(norm_silu, "group_norm_silu_backward", spy)
    inputs = make(SMALL, embedding="pre_shift")
    everything = results(group_norm_silu, inputs, num_groups=4)
    for name in ("x", "bias"):
        found = results(group_norm_silu, inputs, [name], num_groups=4)[f"grad {name}"]
        assert torch.equal(found, everything[f"grad {name}"])
    assert asked[1:] == [frozenset({"x"}), frozenset({"affine"})]
