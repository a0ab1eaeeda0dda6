"""frozen_unet_block against its definition; what it keeps for backward is counted in bytes."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from fastgan_kernels import frozen_block as frozen_block_passes
from fastgan_kernels.attention import Conv, Norm
from fastgan_kernels.frozen_block import frozen_unet_block, frozen_unet_block_ref
from fastgan_kernels.norm_silu_conv.plans import LIBRARY, Plan, Shape
from fastgan_kernels.runtime import recording
from oracle import DEVICE, assert_as_accurate, results
from torch import Tensor

from tests.kept_bytes import kept_bytes


@dataclass(frozen=True)
class Block:
    """One kind of block of the published networks, scaled down."""

    cin: int
    cout: int
    resample: str = ""
    filter: tuple[int, ...] = (1, 1)
    adm: bool = False
    skip: bool = False
    size: int = 8
    n: int = 2

    def call(self, function: Callable[..., Tensor], **p: Tensor) -> Tensor:
        """`function` of this block's tensors by name, as `make` gives them."""
        embedding = {k: p[k] for k in ("pre_shift", "scale", "shift") if k in p}
        norms = [Norm(p[f"weight{i}"], p[f"bias{i}"], 4, 1e-6) for i in (0, 1)]
        first, second = (Conv(p[f"conv{i}.weight"], p[f"conv{i}.bias"]) for i in (0, 1))
        skip = Conv(p["skip.weight"], p["skip.bias"]) if self.skip else None
        options = {"skip": skip, "resample": self.resample, "filter": self.filter, "gain": 0.7}
        return function(p["x"], norms[0], first, norms[1], second, **embedding, **options)


BLOCKS = {
    "NCSN++": Block(16, 16),
    "NCSN++ wider": Block(16, 24, skip=True),
    "NCSN++ up": Block(16, 16, "up", (1, 3, 3, 1), skip=True, size=4),
    "NCSN++ down": Block(16, 16, "down", (1, 3, 3, 1), skip=True),
    "DDPM++ up": Block(24, 24, "up", skip=True, size=4),
    "ADM": Block(24, 24, adm=True),
    "ADM narrower": Block(24, 12, adm=True, skip=True),
    "ADM up": Block(24, 24, "up", adm=True, size=4),
    "ADM down": Block(24, 24, "down", adm=True),
    "one image": Block(8, 8, n=1, size=3),
}


def make(
    b: Block, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[dict[str, Tensor], list[str]]:
    """All tensors by name, and the names of those that may train."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=generator) * std).to(DEVICE, of)

    def conv(name: str, cin: int, cout: int, k: int) -> dict[str, Tensor]:
        weight = normal(cout, cin, k, k, std=(cin * k * k) ** -0.5)
        weight = weight.to(memory_format=torch.channels_last)
        return {f"{name}.weight": weight, f"{name}.bias": normal(cout)}

    trains = {
        f"{part}{i}": (1 if part == "weight" else 0) + normal(c, std=0.3, of=torch.float32)
        for i, c in enumerate((b.cin, b.cout))
        for part in ("weight", "bias")
    }
    trains["x"] = normal(b.n, b.cin, b.size, b.size)
    for name in ("scale", "shift") if b.adm else ("pre_shift",):
        trains[name] = normal(b.n, b.cout, std=0.5)
    if b.skip:
        trains |= conv("skip", b.cin, b.cout, 1)
    frozen = conv("conv0", b.cin, b.cout, 3) | conv("conv1", b.cout, b.cout, 3)
    return trains | frozen, list(trains)


def run(function: Callable[..., Tensor], b: Block, *made: object) -> dict[str, Tensor]:
    return results(partial(b.call, function), *made)  # type: ignore[arg-type]


def three(b: Block, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[dict[str, Tensor]]:
    """Ours, plain PyTorch in the same dtype, and float64."""
    inputs, trains = make(b, dtype, seed)
    double = {name: value.double() for name, value in inputs.items()}
    return [
        run(frozen_unet_block, b, inputs, trains),
        run(frozen_unet_block_ref, b, inputs, trains),
        run(frozen_unet_block_ref, b, double, trains),
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_as_accurate_as_plain_pytorch(name: str, poisoned: None) -> None:
    assert_as_accurate(*three(BLOCKS[name]))


@pytest.mark.parametrize("name", ["NCSN++ wider", "ADM down"])
def test_half_precision_over_several_draws(name: str) -> None:
    """A dozen roundings lie between x and y: their largest error is luck, their mean is not."""
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    draws = [three(replace(BLOCKS[name], size=4), half, seed) for seed in range(3)]
    stacked = [
        {key: torch.stack([draw[side][key] for draw in draws]) for key in draws[0][side]}
        for side in range(3)
    ]
    assert_as_accurate(*stacked, largest=False)


FUSED, BEHIND = Plan("fused", 32, 16, 16, 4, 2), Plan("behind", 32, 16, 16, 4, 2)
# First and second convolution forward, and both backward.
PLANS = {
    "all fused": (FUSED, FUSED, FUSED),
    "first fused": (FUSED, LIBRARY, LIBRARY),
    "second fused": (LIBRARY, FUSED, LIBRARY),
    "sums alone": (BEHIND, FUSED, LIBRARY),
    "backward alone": (LIBRARY, LIBRARY, FUSED),
}
WIDER = Block(16, 20, skip=True, size=6, n=1)
PLANNED = [pytest.param(WIDER, plans, id=plans) for plans in PLANS]
PLANNED += [
    pytest.param(b, "all fused", id=name)
    for name, b in {
        "up": Block(16, 16, "up", skip=True, size=3),
        "down": Block(16, 16, "down", skip=True, size=6),
        "ADM": Block(16, 16, adm=True, size=6, n=1),
    }.items()
]


@pytest.mark.parametrize(("b", "plans"), PLANNED)
def test_with_convolutions_that_normalise(
    b: Block, plans: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """As the table of measurements says, here for the convolutions in front and behind h."""
    first, second, backward = PLANS[plans]
    given = []

    def plan_for(direction: str, x: Tensor, shape: Shape) -> Plan:
        # The second's when there is an h; where the block resamples that is the only one.
        given.append(direction)
        return backward if direction == "backward" else forward[len(given) - 1]

    forward = (second,) if b.resample else (first, second)
    monkeypatch.setattr(frozen_block_passes, "plan_for", plan_for)
    assert_as_accurate(*three(b))
    assert given == ["forward"] * len(forward) + ["backward"] * len(forward)


@pytest.mark.parametrize("second", [FUSED, LIBRARY])
def test_the_first_convolutions_sums_are_the_second_norms_statistics(
    second: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody reads h for them; where nobody needs them, they are not summed up."""
    plans = iter((FUSED, second))
    monkeypatch.setattr(frozen_block_passes, "plan_for", lambda *_: next(plans))
    b = BLOCKS["NCSN++"]
    with recording() as launches:
        b.call(frozen_unet_block, **make(b)[0])
    names = [launch.kernel.fn.__name__ for launch in launches]
    convolution = ["_statistics_kernel", "convolution_kernel"]
    behind = convolution if second == FUSED else ["_forward_kernel", "_add_kernel"]
    assert names == ["_moments_kernel", *convolution, *behind]
    (first, *_) = (launch for launch in launches if launch.kernel.fn.__name__ == convolution[1])
    summed = dict(zip(first.kernel.arg_names, first.args, strict=False))["partial_ptr"]
    assert (summed is not None) == (second == FUSED)


@pytest.mark.parametrize("asked", [("x",), ("x", "weight1"), ("bias0",), ("skip.weight",)])
def test_any_subset_of_gradients(asked: tuple[str, ...]) -> None:
    b = replace(BLOCKS["NCSN++ wider"], size=4)
    inputs, trains = make(b)
    everything = run(frozen_unet_block, b, inputs, trains)
    found = run(frozen_unet_block, b, inputs, asked)
    assert len(found) == 1 + len(asked)
    assert all(torch.allclose(found[name], everything[name], atol=1e-6) for name in found)


def kept_by(function: Callable[..., Tensor], b: Block) -> int:
    """Bytes of activations that autograd keeps; parameters and the embedding excluded."""
    inputs, trains = make(b)
    for name in trains:
        inputs[name].requires_grad_()
    given = [value for name, value in inputs.items() if name != "x"]
    return kept_bytes(lambda: b.call(function, **inputs), given)


LARGE = {
    name: replace(b, cin=8 * b.cin, cout=8 * b.cout, size=2 * b.size) for name, b in BLOCKS.items()
}


@pytest.mark.parametrize("name", LARGE)
def test_keeps_at_most_40_percent_of_eager(name: str) -> None:
    with recording():  # the memory that kernels would fill counts, not its content
        ours = kept_by(frozen_unet_block, LARGE[name])
    plain = kept_by(frozen_unet_block_ref, LARGE[name])
    assert ours <= 0.40 * plain, ours / plain


@pytest.mark.parametrize(
    "name", ["NCSN++", *(pytest.param(n, marks=pytest.mark.slow) for n in list(LARGE)[1:])]
)
def test_keeps_at_most_55_percent_of_compiled(name: str) -> None:
    """torch.compile's partitioner decides what its backward reads, Inductor or not."""
    torch.compiler.reset()
    compiled = torch.compile(frozen_unet_block_ref, backend="aot_eager_decomp_partition")
    with recording():
        ours = kept_by(frozen_unet_block, LARGE[name])
    plain = kept_by(compiled, LARGE[name])
    assert ours <= 0.55 * plain, ours / plain


@pytest.mark.skipif(DEVICE == "cpu", reason="allocations are counted by CUDA's allocator")
def test_allocated_memory_agrees_with_the_count() -> None:
    b = Block(128, 128, size=32, n=16)
    b.call(frozen_unet_block, **make(b)[0])
    inputs, trains = make(b)
    for name in trains:
        inputs[name].requires_grad_()
    before = torch.cuda.memory_allocated()
    y = b.call(frozen_unet_block, **inputs)
    # x is kept too, but was there before; y is the result.
    held = torch.cuda.memory_allocated() - before - y.nbytes + inputs["x"].nbytes
    assert abs(held / kept_by(frozen_unet_block, b) - 1) < 0.1


def test_trained_convolutions_get_their_gradient() -> None:
    """D2O trains everything: the same function, composed of ops that keep what that needs."""
    b = BLOCKS["NCSN++"]
    inputs, _ = make(b)
    ours, plain = (
        run(function, b, inputs, ["conv0.weight"])["grad conv0.weight"]
        for function in (frozen_unet_block, frozen_unet_block_ref)
    )
    assert torch.allclose(ours, plain, atol=1e-4, rtol=1e-4)
