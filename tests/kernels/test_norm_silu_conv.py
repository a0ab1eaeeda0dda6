"""norm_silu_conv against its float64 definition, and as a citizen of autograd and compile."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels.norm_silu_conv import (
    group_statistics_ref,
    norm_silu_conv,
    norm_silu_conv_ref,
    norm_silu_conv_statistics,
)
from fastgan_kernels.norm_silu_conv import launch as norm_silu_conv_launch
from norm_silu_conv_cases import ALL, FROZEN, check, make, run
from oracle import DEVICE, DTYPES, assert_as_accurate
from torch import Tensor

# N, Cin, Cout, H, W, kernel, groups, groups of the result: the published networks' kinds, scaled
# down, then the nasty ones.
SHAPES = {
    "CIFAR's 256": (2, 32, 32, 4, 4, 3, 8, 8),
    "CIFAR's 512 to 256": (1, 64, 32, 4, 4, 3, 4, 4),
    "CIFAR's 384, groups of 12": (1, 48, 32, 4, 4, 3, 4, 8),
    "FFHQ's 128, several tiles of a sample": (1, 8, 16, 12, 12, 3, 2, 4),
    "ADM's 192, groups of 6": (2, 24, 24, 6, 6, 3, 4, 4),
    "ADM's 576, groups of 18": (1, 72, 24, 4, 4, 3, 4, 4),
    "ADM's 1152, groups of 36": (1, 72, 36, 4, 4, 3, 2, 1),
    "1 x 1": (2, 40, 24, 4, 4, 1, 4, 4),
    "several tiles of channels": (1, 8, 136, 3, 3, 3, 2, 4),
    "odd size, last tile partial": (1, 12, 10, 13, 11, 3, 2, 5),
    "odd channels": (2, 5, 7, 3, 5, 3, 1, 7),
    "one group": (1, 40, 8, 4, 4, 3, 1, 1),
    "one pixel": (2, 16, 8, 1, 1, 3, 4, 2),
    "one channel": (2, 1, 1, 5, 3, 3, 1, 1),
    "one row": (1, 8, 4, 1, 9, 3, 2, 2),
}
FEATURES = {"plain": "", "song": "pre_shift residual", "adm": "scale shift residual", "all": ALL}
MODULE = import_module(
    "fastgan_kernels.norm_silu_conv"
)  # its name in the package is the function's


@pytest.fixture(autouse=True)
def by_name(on_kernels: None) -> None:
    """A setting for all ops leaves this one to the table of measurements."""
    dispatch.use("triton,norm_silu_conv=triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_pytorch(name: str, dtype: torch.dtype, poisoned: None) -> None:
    """The statistics are those of y as it is stored, as accurate as float32 arithmetic on it."""
    n, _, cout, *_, groups, next_groups = SHAPES[name]
    before = torch.linspace(-3, 3, n * cout, device=DEVICE).view(n, cout)

    def function(**arguments: object) -> Tensor:
        y, *found = norm_silu_conv_statistics(
            **arguments,  # type: ignore[arg-type]
            next_groups=next_groups,
            next_eps=1e-5,
            next_pre_shift=before,
        )
        both = (y.detach().float(), y.detach().double())
        known = (found, *(group_statistics_ref(v, next_groups, 1e-5, before) for v in both))
        assert_as_accurate(*(dict(zip(("mean", "rstd"), each, strict=True)) for each in known))
        return y

    # A group of one channel does not see its pre_shift: the gradient is rounding noise.
    features = ALL if SHAPES[name][1] > groups else ALL.replace("pre_shift", "")
    check(make(SHAPES[name], dtype, features), groups, function)


@pytest.mark.parametrize("features", FEATURES)
def test_every_embedding_and_residual(features: str, poisoned: None) -> None:
    inputs = make((2, 24, 8, 4, 4, 3, 4, 4), torch.float32, FEATURES[features])
    check(inputs, 4, eps=1e-3, gain=1.0)


def test_without_norm_parameters_and_bias(poisoned: None) -> None:
    inputs = make((2, 24, 8, 4, 4, 3, 4, 4), torch.float32, "shift")
    names = ("x", "weight", "shift")
    given = {"norm_weight": None, "norm_bias": None}
    check({name: inputs[name] for name in names}, 4, **given)


def test_statistics_of_a_large_mean_and_small_deviation(poisoned: None) -> None:
    """E[y^2] - E[y]^2 would lose all digits here."""
    inputs = make((1, 16, 8, 16, 16, 3, 4, 2), torch.float32, "")
    arguments = inputs | {"weight": 1e-2 * inputs["weight"], "bias": inputs["bias"] * 0 + 1e3}
    y, mean, rstd = norm_silu_conv_statistics(
        num_groups=4, eps=1e-5, next_groups=2, next_eps=1e-12, **arguments
    )
    exact_mean, exact_rstd = group_statistics_ref(y.double(), 2, 1e-12)
    assert torch.allclose(mean.double(), exact_mean, rtol=1e-7)
    assert torch.allclose(rstd.double(), exact_rstd, rtol=1e-2)


def test_large_mean_small_deviation_of_the_input(poisoned: None) -> None:
    shape = (1, 16, 8, 12, 12, 3, 4, 2)
    check(make(shape, torch.float32, "", mean=30.0, std=1e-1), 4)


def test_statistics_of_the_library_and_of_no_gradient() -> None:
    inputs = make((2, 24, 8, 4, 4, 3, 4, 4), torch.float32)
    arguments = {"num_groups": 4, "eps": 1e-5, "next_groups": 4, "next_eps": 1e-5} | inputs
    arguments["next_pre_shift"] = torch.randn(1, 8, device=DEVICE)  # one row for all samples
    arguments["x"] = arguments["x"].requires_grad_()
    ours = norm_silu_conv_statistics(**arguments)
    assert [t.requires_grad for t in ours] == [True, False, False]
    for setting in ("library", "reference"):
        dispatch.use(setting)
        other = norm_silu_conv_statistics(**arguments)
        assert [t.requires_grad for t in other] == [True, False, False]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, other, strict=True))


def test_the_padding_is_of_the_activations() -> None:
    """Not of x: silu(shift) would stand around the image."""
    x = torch.zeros(1, 1, 2, 2, device=DEVICE)
    shift = torch.full((1, 1), 2.0, device=DEVICE)
    weight = torch.ones(1, 1, 3, 3, device=DEVICE)
    y = norm_silu_conv(x, 1, None, None, weight, eps=1e-5, shift=shift)
    assert torch.allclose(y, 4 * torch.nn.functional.silu(shift)[:, :, None, None].expand_as(y))


@pytest.mark.parametrize("layout", ["nchw", "sliced channels", "sliced rows", "expanded"])
def test_other_layouts_are_copied(layout: str) -> None:
    inputs = make((2, 16, 8, 5, 5, 3, 4, 4), torch.float32, "")
    x = inputs["x"]
    other = {
        "nchw": x.contiguous(),
        "sliced channels": x[:, 4:12],
        "sliced rows": x[:, :, 1:4, 2:],
        "expanded": x[:1].expand(3, -1, -1, -1),
    }[layout]
    dense = other.clone().contiguous(memory_format=torch.channels_last)
    weight = inputs["weight"][:, : other.shape[1]]
    y = norm_silu_conv(other, 4, None, None, weight.contiguous(), eps=1e-5)
    weight = weight.clone(memory_format=torch.channels_last)
    assert torch.equal(y, norm_silu_conv(dense, 4, None, None, weight, eps=1e-5))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("gradient", ["expanded", "nchw", "sliced"])
def test_any_layout_of_the_incoming_gradient(gradient: str) -> None:
    inputs = make((2, 24, 8, 4, 4, 3, 4, 4), torch.float32, "")
    x, weight = inputs["x"].requires_grad_(), inputs["weight"]
    dy = {
        "expanded": torch.ones(1, device=DEVICE).expand(2, 8, 4, 4),
        "nchw": torch.randn(2, 8, 4, 4, device=DEVICE),
        "sliced": torch.randn(2, 8, 9, 4, device=DEVICE)[:, :, 1::2],
    }[gradient]
    (found,) = torch.autograd.grad(norm_silu_conv(x, 4, None, None, weight, eps=1e-5), x, dy)
    double = x.detach().double().requires_grad_()
    y = norm_silu_conv_ref(double, 4, None, None, weight.double(), eps=1e-5)
    (exact,) = torch.autograd.grad(y, double, dy.double())
    assert torch.allclose(found.double(), exact, atol=1e-5)


def test_x_as_its_own_residual_and_shared_embeddings() -> None:
    """One tensor twice; scale and shift as halves of one row, pre_shift one row for all samples."""
    inputs = make((2, 24, 24, 4, 4, 3, 4, 4), torch.float32, "")
    embedding = torch.randn(2, 48, device=DEVICE)
    scale, shift = embedding.chunk(2, dim=1)

    def result(function: Callable[..., Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        x = inputs["x"].to(dtype).requires_grad_()
        rest = {"scale": scale, "shift": shift, "pre_shift": embedding[:1, :24]}
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
    inputs = make((2, 24, 8, 4, 4, 3, 4, 4), torch.float32)
    for name in ("x", "norm_bias", "residual"):
        given = {k: v.clone().requires_grad_(k == name) for k, v in inputs.items()}
        norm_silu_conv(num_groups=4, eps=1e-5, **given).sum().backward()
        assert [k for k, v in given.items() if v.grad is not None] == [name]
    assert asked == [frozenset({"x"}), frozenset({"affine"})]


def test_the_same_bits_every_time() -> None:
    inputs = make((2, 12, 8, 9, 9, 3, 4, 4), torch.float32)
    first, again = (run(norm_silu_conv, inputs, 4) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_keeps_the_input_and_nothing_of_its_size() -> None:
    inputs = make((2, 12, 4, 8, 8, 3, 4, 4), torch.float32)
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
    made = {k: v.double() for k, v in make((1, 4, 2, 2, 3, 3, 2, 1), torch.float32).items()}
    frozen = {name: made.pop(name) for name in FROZEN}
    leaves = {name: value.requires_grad_() for name, value in made.items()}

    def function(*values: Tensor) -> Tensor:
        given = dict(zip(leaves, values, strict=True))
        return norm_silu_conv(num_groups=2, eps=1e-3, gain=0.7, **given, **frozen)

    assert torch.autograd.gradcheck(function, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(function, tuple(leaves.values()))


def test_r1_takes_the_definition_or_says_no() -> None:
    inputs = make((1, 8, 4, 2, 2, 3, 2, 1), torch.float32, "")
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
    inputs = make((1, 4, 4, 2, 2, 3, 2, 2), torch.float32)
    t = {name: v.requires_grad_(name not in FROZEN) for name, v in inputs.items()}
    arguments = (t["x"], 2, t["norm_weight"], t["norm_bias"], t["weight"], t["bias"], 1e-5)
    per_sample = (t["pre_shift"], t["scale"], t["shift"])
    arguments = (*arguments, *per_sample, t["residual"], 0.7, 2, 1e-5, t["bias"][None].detach())
    torch.library.opcheck(torch.ops.fastgan.norm_silu_conv, arguments)


def test_compiled_equals_eager_in_one_graph() -> None:
    inputs = make((2, 6, 4, 3, 3, 3, 2, 2), torch.float32)
    compiled = torch.compile(norm_silu_conv, fullgraph=True, backend="aot_eager")
    eager, found = run(norm_silu_conv, inputs, 2), run(compiled, inputs, 2)
    assert all(torch.equal(eager[name], found[name]) for name in eager)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_groups": 5}, "num_groups 5 does not divide the 24 channels of x"),
        ({"next_pre_shift": torch.ones(3, 8)}, r"next_pre_shift has shape .* \[2, 8\] would fit"),
        ({"next_groups": 3}, "next_groups 3 does not divide the 8 channels of y"),
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
        norm_silu_conv_statistics(
            **{"next_groups": 4} | arguments | change, eps=1e-5, next_eps=1e-5
        )
