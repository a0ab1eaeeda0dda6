"""norm_silu_conv by every plan against its float64 definition, under autograd and compile."""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import product

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels.norm_silu_conv import launch as norm_silu_conv_launch
from fastgan_kernels.norm_silu_conv import norm_silu_conv, norm_silu_conv_ref
from fastgan_kernels.norm_silu_conv.plans import (
    DIRECTIONS,
    LIBRARY,
    Direction,
    Plan,
    Shape,
    candidates,
    fitted,
)
from fastgan_kernels.norm_silu_conv.sums import Affine, statistics
from oracle import DEVICE, DTYPES, assert_as_accurate, gradients
from torch import Tensor

# N, Cin, Cout, H, W, kernel, groups: the published networks' kinds, scaled down, then the nasty.
SHAPES = {
    "FFHQ's 128, several tiles of a sample": (1, 8, 16, 12, 12, 3, 2),
    "ADM's 192, groups of 6": (2, 24, 24, 4, 6, 3, 4),
    "ADM's 1152, groups of 36": (1, 72, 36, 4, 4, 3, 2),
    "1 x 1": (2, 40, 24, 4, 4, 1, 4),
    "several tiles of channels": (1, 8, 136, 3, 3, 3, 2),
    "odd size, last tile partial": (1, 12, 10, 13, 11, 3, 2),
    "odd channels": (2, 5, 7, 3, 5, 3, 1),
    "one pixel": (2, 16, 8, 1, 1, 3, 4),
    "one channel": (2, 1, 1, 5, 3, 3, 1),
    "one row": (1, 8, 4, 1, 9, 3, 2),
}
SMALL = (2, 12, 8, 4, 4, 3, 4)
ALL = "pre_shift scale shift residual"
FROZEN = ("weight", "bias")
# Its name in the package is the function's.
MODULE = import_module("fastgan_kernels.norm_silu_conv")


@pytest.fixture(autouse=True)
def by_name(on_kernels: None) -> None:
    """A setting for all ops leaves this one to the table of measurements."""
    dispatch.use("triton,norm_silu_conv=triton")


def make(
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    features: str = ALL,
    mean: float = 0.5,
    std: float = 2.0,
) -> dict[str, Tensor]:
    """Inputs of the op by name; the norm's parameters are float32 masters, as in the networks."""
    n, cin, cout, h, w, k, _ = shape
    generator = torch.Generator().manual_seed(3)

    def normal(*size: int) -> Tensor:
        value = torch.randn(size, generator=generator).to(DEVICE)
        return value.to(memory_format=torch.channels_last) if len(size) == 4 else value

    inputs = {
        "x": (normal(n, cin, h, w) * std + mean).to(dtype),
        "norm_weight": 1 + 0.3 * normal(cin),
        "norm_bias": 0.3 * normal(cin),
        "weight": (normal(cout, cin, k, k) / (cin * k * k) ** 0.5).to(dtype),
        "bias": normal(cout).to(dtype),
    }
    for name in features.split():
        size = (n, cout, h, w) if name == "residual" else (n, cin)
        inputs[name] = 0.5 * normal(*size).to(dtype)
    return inputs


def run(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], groups: int, **options: object
) -> dict[str, Tensor]:
    """The output and the gradients of all inputs that may train, by name."""
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items() if k not in FROZEN}
    frozen = {name: inputs[name] for name in FROZEN if name in inputs}
    y = function(num_groups=groups, **leaves, **frozen, **{"eps": 1e-5, "gain": 0.7} | options)
    return {"y": y, **gradients([y], leaves)}


def plain(**arguments: object) -> Tensor:
    dispatch.use("library")
    y = norm_silu_conv(**arguments)  # type: ignore[arg-type]
    dispatch.use("triton,norm_silu_conv=triton")
    return y


def check(inputs: dict[str, Tensor], groups: int, **options: object) -> None:
    double = {name: value.double() for name, value in inputs.items()}
    exact = run(norm_silu_conv_ref, double, groups, **options)
    ours = run(norm_silu_conv, inputs, groups, **options)
    assert_as_accurate(ours, run(plain, inputs, groups, **options), exact)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)


# The interpreter takes float16 at every plan.
@pytest.mark.parametrize("dtype", DTYPES if DEVICE == "cuda" else DTYPES[:1])
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_pytorch(name: str, dtype: torch.dtype, poisoned: None) -> None:
    *_, groups = SHAPES[name]
    # A group of one channel does not see its pre_shift: the gradient is rounding noise.
    features = ALL if SHAPES[name][1] > groups else ALL.replace("pre_shift", "")
    check(make(SHAPES[name], dtype, features), groups)


@pytest.mark.parametrize(
    ("features", "without", "options"),
    [
        ("", (), {}),
        ("pre_shift residual", (), {"gain": 1.0}),
        ("scale shift residual", (), {"eps": 1e-3}),
        ("shift", ("norm_weight", "norm_bias", "bias"), {}),
    ],
)
def test_with_and_without(features: str, without: tuple, options: dict, poisoned: None) -> None:
    inputs = {k: v for k, v in make(SMALL, features=features).items() if k not in without}
    missing = {name: None for name in ("norm_weight", "norm_bias") if name in without}
    check(inputs, 4, **missing, **options)


def test_large_mean_small_deviation_of_the_input(poisoned: None) -> None:
    check(make((1, 16, 8, 8, 8, 3, 4), features="", mean=30.0, std=1e-1), 4)


PLANS = {
    f"sm_{major}{minor} {direction} {plan}": ((major, minor), direction, plan)
    for (major, minor), direction in product(((8, 0), (9, 0)), DIRECTIONS)
    for plan in candidates((major, minor), torch.float16, direction, Shape(512, 512, 64, 64, 3))
}
# So few warps that the epilogue goes by halves, as it does for 128 x 256 pixels and channels.
PLANS |= {
    f"in halves, {direction}": ((8, 0), direction, Plan("fused", 64, 64, 32, 1, 2))
    for direction in DIRECTIONS
}


@pytest.mark.parametrize("name", PLANS)
def test_every_plan(name: str, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """On images of whole tiles, with a partial tile, and (by pointers) of an odd width."""
    architecture, direction, plan = PLANS[name]
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != architecture:
        pytest.skip("of another architecture")
    used = []

    def plan_for(of: Direction, x: Tensor, shape: Shape) -> Plan:
        if of != direction:
            return LIBRARY
        used.append(fitted(plan, direction, shape))
        return used[-1]

    monkeypatch.setattr(MODULE, "plan_for", plan_for)
    for shape in ((1, 72, 16, 8, 16), (2, 16, 24, 12, 8), (1, 8, 16, 9, 15)):
        check(make((*shape, 3, 4), torch.float16), 4)
    assert {found.descriptors for found in used} == {plan.descriptors, False}


def test_plans_are_cut_to_small_images_and_few_channels() -> None:
    plan, whole = Plan("fused", 128, 256, 64, 8, 3, descriptors=True), Shape(1024, 1024, 64, 64, 3)
    assert fitted(plan, "forward", whole) == plan
    half = fitted(plan, "forward", replace(whole, height=8, width=8))
    assert (half.m, half.n, half.warps) == (64, 128, 4)
    assert not fitted(plan, "forward", replace(whole, width=48)).descriptors
    assert not fitted(plan, "forward", replace(whole, cin=1020)).descriptors
    tiny = fitted(plan, "forward", Shape(5, 3, 1, 1, 3))
    assert (tiny.m, tiny.n, tiny.k, tiny.descriptors) == (16, 16, 16, False)
    # Backward the channels change their places.
    narrow = replace(whole, cin=16)
    assert fitted(plan, "forward", narrow).k == 16 and fitted(plan, "backward", narrow).n == 16


def test_a_tensor_that_starts_between_16_bytes_is_loaded_by_pointers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = Plan("fused", 64, 16, 16, 4, 3, descriptors=True)
    monkeypatch.setattr(MODULE, "plan_for", lambda *_: plan)
    inputs = make((1, 16, 16, 8, 8, 3, 4), torch.float16, "")
    whole = torch.zeros(inputs["x"].numel() + 4, dtype=torch.float16, device=DEVICE)
    x = whole[4:].view(1, 8, 8, 16).movedim(3, 1).copy_(inputs["x"])
    assert x.data_ptr() % 16
    arguments = inputs | {"num_groups": 4, "eps": 1e-5}
    aligned, found = norm_silu_conv(**arguments), norm_silu_conv(**arguments | {"x": x})
    assert torch.allclose(aligned, found, atol=1e-2)


@pytest.mark.parametrize("form", ["fused", "behind"])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (1, 1)])
def test_sums_of_the_result_are_the_next_norms_statistics(
    form: str, size: tuple[int, int], poisoned: None
) -> None:
    """Of y + pre_shift as it is stored; E[y^2] - E[y]^2 would lose all digits at this mean."""
    i = make((2, 16, 8, *size, 3, 4), features="")
    weight, bias = 1e-2 * i["weight"], i["bias"] * 0 + 1e3
    after, plan = Affine(i["norm_weight"], i["norm_bias"]), Plan(form, 32, 16, 16, 4, 2)  # type: ignore[arg-type]
    y, _, of_y = norm_silu_conv_launch.norm_silu_conv_forward(
        *(i["x"], 4, weight, bias, 1e-5, after, None, 1.0, plan), sums=True
    )
    assert of_y is not None
    before = torch.tensor([[0.0], [3.0]], device=DEVICE).expand(2, 8) * torch.arange(8).to(DEVICE)
    for pre_shift in (None, before):
        (mean, rstd), _ = statistics(of_y, 2, 1e-9, Affine(pre_shift=pre_shift))
        seen = y.double() + (0 if pre_shift is None else pre_shift.double()[:, :, None, None])
        variance, centre = torch.var_mean(seen.reshape(2, 2, -1), dim=2, correction=0)
        assert torch.allclose(mean.double(), centre, rtol=1e-6)
        assert torch.allclose(rstd.double(), (variance + 1e-9).rsqrt(), rtol=1e-2)


def test_the_padding_is_of_the_activations() -> None:
    """Not of x: silu(shift) would stand around the image."""
    x = torch.zeros(1, 1, 2, 2, device=DEVICE)
    shift = torch.full((1, 1), 2.0, device=DEVICE)
    weight = torch.ones(1, 1, 3, 3, device=DEVICE)
    y = norm_silu_conv(x, 1, None, None, weight, eps=1e-5, shift=shift)
    assert torch.allclose(y, 4 * torch.nn.functional.silu(shift)[:, :, None, None].expand_as(y))


@pytest.mark.parametrize("layout", ["nchw", "sliced", "expanded"])
def test_any_layout_of_the_input_and_of_the_incoming_gradient(layout: str) -> None:
    inputs = make((2, 8, 8, 5, 4, 3, 4), features="")
    x = inputs["x"]
    other, dy = {
        "nchw": (x.contiguous(), torch.ones(1, device=DEVICE).expand(2, 8, 5, 4)),
        "sliced": (x[:, :, 1:4, 2:], torch.randn(2, 8, 3, 2, device=DEVICE)),
        "expanded": (x[:1].expand(3, -1, -1, -1), torch.randn(3, 8, 11, 4)[:, :, 1::2].to(DEVICE)),
    }[layout]

    def result(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        given = {name: value.to(dtype) for name, value in inputs.items()}
        leaf = other.to(dtype).requires_grad_()
        y = function(**given | {"x": leaf}, num_groups=4, eps=1e-5)
        return y, torch.autograd.grad(y, leaf, dy.to(dtype))[0]

    ours, exact = result(norm_silu_conv, torch.float32), result(norm_silu_conv_ref, torch.float64)
    assert all(torch.allclose(a.double(), b, atol=1e-5) for a, b in zip(ours, exact, strict=True))
    assert ours[0].is_contiguous(memory_format=torch.channels_last)


def test_x_as_its_own_residual_and_shared_embeddings() -> None:
    """One tensor twice; scale and shift as halves of one row, pre_shift one row for all samples."""
    inputs = make((2, 12, 12, 4, 4, 3, 4), features="")
    embedding = torch.randn(2, 24, device=DEVICE)
    scale, shift = embedding.chunk(2, dim=1)

    def result(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = inputs["x"].to(dtype).requires_grad_()
        rest = {"scale": scale, "shift": shift, "pre_shift": embedding[:1, :12]}
        y = function(x, 4, None, None, inputs["weight"].to(dtype), eps=1e-5, residual=x, **rest)
        return y, torch.autograd.grad(y.square().sum(), x)[0]

    ours, exact = result(norm_silu_conv, torch.float32), result(norm_silu_conv_ref, torch.float64)
    assert all(torch.allclose(a.double(), b, atol=1e-4) for a, b in zip(ours, exact, strict=True))


def test_only_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen norm computes dx alone; a residual's gradient needs no convolution."""
    asked: list[frozenset[str]] = []
    original = norm_silu_conv_launch.norm_silu_conv_backward

    def spy(*arguments: object) -> object:
        asked.append(arguments[-2])  # type: ignore[arg-type]
        return original(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(MODULE, "norm_silu_conv_backward", spy)
    inputs = make(SMALL)
    for name in ("x", "norm_bias", "residual"):
        given = {k: v.clone().requires_grad_(k == name) for k, v in inputs.items()}
        norm_silu_conv(num_groups=4, eps=1e-5, **given).sum().backward()
        assert [k for k, v in given.items() if v.grad is not None] == [name]
    assert asked == [frozenset({"x"}), frozenset({"affine"})]


def test_the_same_bits_every_time_and_compiled_in_one_graph() -> None:
    inputs = make((2, 12, 8, 5, 5, 3, 4))
    compiled = torch.compile(norm_silu_conv, fullgraph=True, backend="aot_eager")
    first, again, traced = (run(f, inputs, 4) for f in (norm_silu_conv, norm_silu_conv, compiled))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[name], traced[name]) for name in first)


def test_keeps_the_input_and_nothing_of_its_size() -> None:
    inputs = make((2, 12, 4, 8, 8, 3, 4))
    x = inputs["x"].requires_grad_()
    kept: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t)
    with hooks:
        norm_silu_conv(num_groups=4, eps=1e-5, **inputs)
    assert sum(t.numel() for t in kept) < 2.5 * x.numel()  # x, the weight, [N, C] and [N, G]
    large = [t for t in kept if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]


def test_gradcheck_of_the_definition() -> None:
    dispatch.use("auto")
    made = {k: v.double() for k, v in make((1, 4, 2, 2, 3, 3, 2)).items()}
    frozen = {name: made.pop(name) for name in FROZEN}
    leaves = {name: value.requires_grad_() for name, value in made.items()}

    def function(*values: Tensor) -> Tensor:
        given = dict(zip(leaves, values, strict=True))
        return norm_silu_conv(num_groups=2, eps=1e-3, gain=0.7, **given, **frozen)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()), fast_mode=True)


def test_r1_takes_the_definition_or_says_no() -> None:
    inputs = make((1, 8, 4, 2, 2, 3, 2), features="")
    x, given = inputs["x"].requires_grad_(), {"num_groups": 2, "eps": 1e-5}

    def penalty(function: Callable[..., Tensor]) -> Tensor:
        y = function(**inputs | {"x": x}, **given)
        (g,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    with dispatch.twice_differentiable():
        found = penalty(norm_silu_conv)
    assert torch.equal(found, penalty(norm_silu_conv_ref))
    with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad"):
        penalty(norm_silu_conv)


def test_opcheck() -> None:
    t = {k: v.requires_grad_(k not in FROZEN) for k, v in make((1, 4, 4, 2, 2, 3, 2)).items()}
    arguments = (t["x"], 2, t["norm_weight"], t["norm_bias"], t["weight"], t["bias"], 1e-5)
    arguments = (*arguments, t["pre_shift"], t["scale"], t["shift"], t["residual"], 0.7)
    torch.library.opcheck(torch.ops.fastgan.norm_silu_conv, arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 5}, "num_groups 5 does not divide the 24 channels of x"),
        ({"x": torch.zeros(2, 24, 4)}, r"x has shape \[2, 24, 4\]"),
        ({"norm_weight": torch.ones(23)}, r"norm_weight has shape \[23\], \[24\] would fit x"),
        ({"shift": torch.ones(3, 24)}, r"shift has shape \[3, 24\], \[2, 24\] would fit x"),
        ({"weight": torch.zeros(8, 24, 5, 5)}, r"weight has shape .* with k 1 or 3 would fit x"),
        ({"weight": torch.zeros(8, 9, 3, 3)}, r"weight has shape \[8, 9, 3, 3\]"),
        ({"weight": torch.zeros(8, 24, 3, 3).half()}, "weight is torch.float16, x torch.float32"),
        ({"weight": torch.zeros(8, 24, 3, 3).requires_grad_()}, "weight requires a gradient"),
        ({"bias": torch.zeros(9)}, r"bias has shape \[9\], \[8\] would fit x"),
        ({"bias": torch.zeros(8).requires_grad_()}, "bias requires a gradient"),
        ({"residual": torch.zeros(1, 8, 4, 4)}, r"residual has shape .* \[2, 8, 4, 4\] would fit"),
        ({"x": torch.zeros(2, 24, 4, 4).double()}, "weight is torch.float32, x torch.float64"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 24, 4, 4), "weight": torch.zeros(8, 24, 3, 3)}
    arguments |= {"num_groups": 4, "norm_weight": None, "norm_bias": None}
    with pytest.raises(ValueError, match=message):
        norm_silu_conv(**arguments | change, eps=1e-5)
