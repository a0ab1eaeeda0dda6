"""frozen_unet_block against its definition; what it keeps for backward is counted in bytes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels import frozen_block as frozen_block_passes
from fastgan_kernels.attention import Attention, Conv, Norm, attention_ref
from fastgan_kernels.frozen_block import frozen_unet_block, frozen_unet_block_ref
from fastgan_kernels.norm_silu_conv.plans import LIBRARY, Plan, Shape
from fastgan_kernels.runtime import recording
from oracle import DEVICE, assert_as_accurate, gradients
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


def make(b: Block, dtype: torch.dtype, seed: int = 0) -> tuple[dict[str, Tensor], dict]:
    """(what may train, what is frozen), by name."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float = 1.0, of: torch.dtype = dtype) -> Tensor:
        return (torch.randn(size, generator=generator) * std).to(DEVICE, of)

    def conv(cin: int, cout: int, k: int) -> Conv:
        weight = normal(cout, cin, k, k, std=(cin * k * k) ** -0.5)
        return Conv(weight.to(memory_format=torch.channels_last), normal(cout))

    masters = {
        f"{part}{i}": (1 if part == "weight" else 0) + normal(c, std=0.3, of=torch.float32)
        for i, c in enumerate((b.cin, b.cout))
        for part in ("weight", "bias")
    }
    names = ("scale", "shift") if b.adm else ("pre_shift",)
    trains = {"x": normal(b.n, b.cin, b.size, b.size), **masters}
    trains |= {name: normal(b.n, b.cout, std=0.5) for name in names}
    if b.skip:
        trains |= dict(zip(("skip.weight", "skip.bias"), conv(b.cin, b.cout, 1), strict=True))
    return trains, {"conv0": conv(b.cin, b.cout, 3), "conv1": conv(b.cout, b.cout, 3)}


def call(
    function: Callable[..., Tensor], b: Block, trains: dict[str, Tensor], frozen: dict[str, Conv]
) -> Tensor:
    embedding = {k: v for k, v in trains.items() if k in ("pre_shift", "scale", "shift")}
    norms = [Norm(trains[f"weight{i}"], trains[f"bias{i}"], 4, 1e-6) for i in (0, 1)]
    skip = Conv(trains["skip.weight"], trains["skip.bias"]) if b.skip else None
    return function(
        *(trains["x"], norms[0], frozen["conv0"], norms[1], frozen["conv1"]),
        **embedding,
        **{"skip": skip, "resample": b.resample, "filter": b.filter, "gain": 0.7},
    )


def run(
    function: Callable[..., Tensor], b: Block, trains: dict[str, Tensor], frozen: dict[str, Conv]
) -> dict[str, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in trains.items()}
    y = call(function, b, leaves, frozen)
    return {"y": y, **gradients([y], leaves)}


def in_double(frozen: dict[str, Conv]) -> dict[str, Conv]:
    return {name: Conv(*(p.double() for p in conv)) for name, conv in frozen.items()}


def three(b: Block, dtype: torch.dtype, seed: int) -> list[dict[str, Tensor]]:
    """Ours, plain PyTorch in the same dtype, and float64."""
    trains, frozen = make(b, dtype, seed)
    double = {name: value.double() for name, value in trains.items()}
    return [
        run(frozen_unet_block, b, trains, frozen),
        run(frozen_unet_block_ref, b, trains, frozen),
        run(frozen_unet_block_ref, b, double, in_double(frozen)),
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_as_accurate_as_plain_pytorch(name: str, poisoned: None) -> None:
    assert_as_accurate(*three(BLOCKS[name], torch.float32, seed=0))


FUSED, BEHIND = Plan("fused", 32, 16, 16, 4, 2), Plan("behind", 32, 16, 16, 4, 2)
# First and second convolution forward, and both backward.
PLANS = {
    "all fused": (FUSED, FUSED, FUSED),
    "first fused": (FUSED, LIBRARY, LIBRARY),
    "second fused": (LIBRARY, FUSED, LIBRARY),
    "sums alone": (BEHIND, FUSED, LIBRARY),
    "backward alone": (LIBRARY, LIBRARY, FUSED),
}


@pytest.mark.parametrize("plans", PLANS)
@pytest.mark.parametrize("name", ["NCSN++", "NCSN++ wider", "NCSN++ up", "NCSN++ down", "ADM"])
def test_with_convolutions_that_normalise(
    name: str, plans: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """As the table of measurements says, here for the convolutions in front and behind h."""
    first, second, backward = PLANS[plans]
    given = []

    def plan_for(direction: str, x: Tensor, shape: Shape) -> Plan:
        # The second's when there is an h; where the block resamples that is the only one.
        given.append(direction)
        return backward if direction == "backward" else forward[len(given) - 1]

    b = BLOCKS[name]
    forward = (second,) if b.resample else (first, second)
    monkeypatch.setattr(frozen_block_passes, "plan_for", plan_for)
    assert_as_accurate(*three(b, torch.float32, seed=0))
    assert given == ["forward"] * len(forward) + ["backward"] * len(forward)


def test_the_first_convolutions_sums_are_the_second_norms_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nobody reads h for them."""
    monkeypatch.setattr(frozen_block_passes, "plan_for", lambda *_: FUSED)
    b = BLOCKS["NCSN++"]
    trains, frozen = make(b, torch.float32)
    with recording() as launches:
        call(frozen_unet_block, b, trains, frozen)
    names = [launch.kernel.fn.__name__ for launch in launches]
    convolution = ["_statistics_kernel", "convolution_kernel"]
    assert names == ["_moments_kernel", *convolution, *convolution]


@pytest.mark.parametrize("second", [FUSED, LIBRARY])
def test_sums_only_where_the_second_convolution_reads_them(
    second: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = iter((FUSED, second))
    monkeypatch.setattr(frozen_block_passes, "plan_for", lambda *_: next(plans))
    b = BLOCKS["NCSN++"]
    with recording() as launches:
        call(frozen_unet_block, b, *make(b, torch.float32))
    kernels = [launch for launch in launches if launch.kernel.fn.__name__ == "convolution_kernel"]
    summed = dict(zip(kernels[0].kernel.arg_names, kernels[0].args, strict=False))["partial_ptr"]
    assert (summed is not None) == (second == FUSED)


@pytest.mark.parametrize("name", BLOCKS)
def test_half_precision_over_several_draws(name: str) -> None:
    """A dozen roundings lie between x and y: their largest error is luck, their mean is not."""
    half = torch.bfloat16 if DEVICE == "cuda" else torch.float16
    draws = [three(BLOCKS[name], half, seed) for seed in range(4)]
    stacked = [
        {key: torch.stack([draw[side][key] for draw in draws]) for key in draws[0][side]}
        for side in range(3)
    ]
    assert_as_accurate(*stacked, largest=False)


@pytest.mark.parametrize("trains", [("x",), ("x", "weight1"), ("bias0",), ("skip.weight",)])
def test_any_subset_of_gradients(trains: tuple[str, ...]) -> None:
    b = BLOCKS["NCSN++ wider"]
    values, frozen = make(b, torch.float32)
    everything = run(frozen_unet_block, b, values, frozen)
    leaves = {k: v.clone().requires_grad_(k in trains) for k, v in values.items()}
    y = call(frozen_unet_block, b, leaves, frozen)
    found = gradients([y], {k: leaves[k] for k in trains})
    for name in trains:
        assert torch.allclose(found[f"grad {name}"], everything[f"grad {name}"], atol=1e-6)


def kept_by(function: Callable[..., Tensor], b: Block) -> int:
    """Bytes of activations that autograd keeps; parameters and the embedding excluded."""
    trains, frozen = make(b, torch.float32)
    leaves = {name: value.requires_grad_() for name, value in trains.items()}
    given = [t for name, t in leaves.items() if name != "x"]
    given += [p for conv in frozen.values() for p in conv]
    return kept_bytes(lambda: call(function, b, leaves, frozen), given)


LARGE = {
    name: Block(8 * b.cin, 8 * b.cout, b.resample, b.filter, b.adm, b.skip, 2 * b.size)
    for name, b in BLOCKS.items()
}


@pytest.mark.parametrize("name", LARGE)
def test_keeps_at_most_40_percent_of_eager(name: str) -> None:
    ours, plain = (kept_by(f, LARGE[name]) for f in (frozen_unet_block, frozen_unet_block_ref))
    assert ours <= 0.40 * plain, ours / plain


@pytest.mark.parametrize("name", LARGE)
def test_keeps_at_most_55_percent_of_compiled(name: str) -> None:
    """torch.compile's partitioner decides what its backward reads, Inductor or not."""
    torch.compiler.reset()
    compiled = torch.compile(frozen_unet_block_ref, backend="aot_eager_decomp_partition")
    ours, plain = (kept_by(f, LARGE[name]) for f in (frozen_unet_block, compiled))
    assert ours <= 0.55 * plain, ours / plain


@pytest.mark.skipif(DEVICE == "cpu", reason="allocations are counted by CUDA's allocator")
def test_allocated_memory_agrees_with_the_count() -> None:
    b = Block(128, 128, size=32, n=16)
    call(frozen_unet_block, b, *make(b, torch.float32))
    trains, frozen = make(b, torch.float32)
    trains = {name: value.requires_grad_() for name, value in trains.items()}
    before = torch.cuda.memory_allocated()
    y = call(frozen_unet_block, b, trains, frozen)
    # x is kept too, but was there before; y is the result.
    held = torch.cuda.memory_allocated() - before - y.nbytes + trains["x"].nbytes
    assert abs(held / kept_by(frozen_unet_block, b) - 1) < 0.1


@pytest.mark.parametrize("adm", [True, False])
def test_attention_behind_the_block(adm: bool) -> None:
    """The library's attention on reordered weights is the definition on published ones."""
    b = Block(16, 16, adm=adm)
    values, frozen = make(b, torch.float32)
    draw = torch.Generator().manual_seed(5)
    extra = {
        "norm.weight": 1 + 0.3 * torch.randn(16, generator=draw),
        "norm.bias": torch.randn(16, generator=draw),
        "qkv.weight": torch.randn(48, 16, 1, 1, generator=draw) / 4,
        "qkv.bias": torch.randn(48, generator=draw),
    }
    proj = Conv(torch.randn(16, 16, 1, 1, generator=draw).to(DEVICE) / 4, torch.ones(16).to(DEVICE))

    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
        # x takes part: PyTorch's group norm crashes in a channels_last backward without dx (CPU).
        leaves = {
            name: value.detach().to(DEVICE, dtype).requires_grad_()
            for name, value in (values | extra).items()
        }
        norm = Norm(leaves["norm.weight"], leaves["norm.bias"], 4, 1e-5)
        qkv = Conv(leaves["qkv.weight"], leaves["qkv.bias"])
        attention = Attention(norm, qkv, Conv(*(p.to(dtype) for p in proj)), 2)
        body = {name: Conv(*(p.to(dtype) for p in conv)) for name, conv in frozen.items()}
        y = call(partial(function, attention=attention), b, leaves, body)
        return {"y": y, **gradients([y], leaves)}

    assert_as_accurate(
        results(frozen_unet_block, torch.float32),
        results(frozen_unet_block_ref, torch.float32),
        results(frozen_unet_block_ref, torch.float64),
        largest=False,
    )


def test_attention_of_one_head_by_hand() -> None:
    """Channels of qkv come as q0 k0 v0 q1 k1 v1 ...: two pixels, two channels."""
    qkv = torch.randn(1, 6, 1, 2, dtype=torch.float64)
    q, k, v = (qkv[0, j::3, 0] for j in range(3))
    weights = (q.T @ k / 2**0.5).softmax(dim=1)
    assert torch.allclose(attention_ref(qkv, 1)[0, :, 0], v @ weights.T)


@pytest.mark.parametrize("name", ["NCSN++ up", "ADM"])
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastgan_kernels.frozen_block as module

    seen: list[tuple] = []

    def spy(*args: Any) -> Any:
        seen.append(args)
        return torch.ops.fastgan.frozen_unet_block(*args)

    monkeypatch.setattr(module, "_op", spy)
    trains, frozen = make(BLOCKS[name], torch.float32)
    trains = {key: value.requires_grad_() for key, value in trains.items()}
    call(frozen_unet_block, BLOCKS[name], trains, frozen)
    torch.library.opcheck(torch.ops.fastgan.frozen_unet_block, seen[0])


@pytest.mark.parametrize("name", ["NCSN++ down", "ADM narrower"])
def test_compiled_equals_eager_in_one_graph(name: str) -> None:
    torch.compiler.reset()
    b = BLOCKS[name]
    trains, frozen = make(b, torch.float32)
    compiled = torch.compile(frozen_unet_block, fullgraph=True, backend="aot_eager")
    eager, found = (run(f, b, trains, frozen) for f in (frozen_unet_block, compiled))
    assert all(torch.equal(eager[key], found[key]) for key in eager)


def test_the_same_bits_every_time() -> None:
    b = BLOCKS["NCSN++ up"]
    first, again = (run(frozen_unet_block, b, *make(b, torch.float32)) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


def test_trained_convolutions_get_their_gradient() -> None:
    """D2O trains everything: the same function, composed of ops that keep what that needs."""
    b = BLOCKS["NCSN++"]
    trains, frozen = make(b, torch.float32)
    conv0 = Conv(*(p.requires_grad_() for p in frozen["conv0"]))
    found = []
    for function in (frozen_unet_block, frozen_unet_block_ref):
        y = call(function, b, trains, frozen | {"conv0": conv0})
        found.append(torch.autograd.grad(y.square().sum(), conv0.weight)[0])
    assert torch.allclose(*found, atol=1e-4, rtol=1e-4)


def test_gradcheck_of_the_definition() -> None:
    dispatch.use("auto")
    b = Block(4, 4, "down", (1, 3, 3, 1), skip=True, size=4, n=1)
    trains, frozen = make(b, torch.float64)
    names = list(trains)
    leaves = [trains[name].double().requires_grad_() for name in names]

    def function(*values: Tensor) -> Tensor:
        given = dict(zip(names, values, strict=True))
        return call(frozen_unet_block, b, given, in_double(frozen))

    assert torch.autograd.gradcheck(function, leaves)


def zeros(*size: int) -> Tensor:
    return torch.zeros(size, device=DEVICE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resample": "sideways"}, "resample is 'sideways'"),
        ({"pre_shift": zeros(2, 9)}, r"pre_shift has shape \[2, 9\], \[2, 16\]"),
        ({"norm0": Norm(zeros(16), zeros(16), 5, 1e-5)}, "norm0.groups 5"),
        ({"x": zeros(2, 16, 8, 8).half()}, r"conv0.weight is torch.float32"),
        (
            {"skip": Conv(zeros(16, 16, 3, 3), zeros(16))},
            r"skip.weight has shape \[16, 16, 3, 3\]",
        ),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    norm = Norm(zeros(16), zeros(16), 4, 1e-5)
    conv = Conv(zeros(16, 16, 3, 3), zeros(16))
    arguments = {"x": zeros(2, 16, 8, 8), "norm0": norm, "conv0": conv}
    arguments |= {"norm1": norm, "conv1": conv} | change
    with pytest.raises(ValueError, match=message):
        frozen_unet_block(**arguments)
