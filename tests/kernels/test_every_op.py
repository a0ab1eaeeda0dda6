"""What every op promises beside accuracy: layouts, bits, memory, derivatives, one graph, errors."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from math import nan
from typing import Any

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels.attention import Conv, Norm
from fastgan_kernels.frozen_block import frozen_unet_block, frozen_unet_block_ref
from fastgan_kernels.frozen_conv import frozen_conv2d, frozen_conv2d_ref
from fastgan_kernels.norm_silu import group_norm_silu, group_norm_silu_ref
from fastgan_kernels.resample import resample2x, resample2x_ref
from fastgan_kernels.resize_normalize import resize_normalize, resize_normalize_ref
from oracle import DEVICE, results
from torch import Tensor

NORMAL = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


@dataclass(frozen=True)
class Op:
    """An op on small inputs, given by their shapes; `keeps`: what of x's size backward reads."""

    function: Callable[..., Tensor]
    definition: Callable[..., Tensor]
    shapes: dict[str, tuple[int, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    twice: bool = True
    registered: tuple[str, ...] = ("_op",)

    @property
    def trains(self) -> list[str]:
        return [name for name in self.shapes if name not in self.frozen]

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """NHWC, by name; parameters about 1, so that a forgotten one is seen."""
        draw = torch.Generator().manual_seed(4)
        found = {}
        for name, shape in self.shapes.items():
            value = torch.randn(shape, generator=draw, dtype=torch.float64).to(DEVICE, dtype)
            value = value.to(memory_format=torch.channels_last) if len(shape) == 4 else value
            found[name] = value if name == "x" else 0.5 + 0.3 * value
        return found

    def run(self, function: Callable[..., Tensor], inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return results(function, inputs, self.trains, **self.options)


def block(function: Callable[..., Tensor], x: Tensor, **p: Tensor) -> Tensor:
    """A block with every kind of parameter, from tensors by name."""
    norms = [Norm(p[f"weight{i}"], p[f"bias{i}"], 2, 1e-5) for i in (0, 1)]
    first, second, skip = (
        Conv(p[f"{name}_weight"], p[f"{name}_bias"]) for name in ("conv0", "conv1", "skip")
    )
    given = {name: p[name] for name in ("pre_shift", "scale", "shift")}
    given |= {"skip": skip, "resample": "down", "filter": (1, 2), "gain": 0.7}
    return function(x, norms[0], first, norms[1], second, **given)


CONVOLUTION = {"x": (2, 4, 6, 6), "weight": (6, 4, 3, 3), "bias": (6,)}
ROWS = dict.fromkeys(("pre_shift", "scale", "shift"), (2, 6))
BLOCK = {"x": (2, 4, 4, 4), "weight0": (4,), "bias0": (4,), "weight1": (6,), "bias1": (6,)} | ROWS
CONVOLUTIONS = {"conv0_weight": (6, 4, 3, 3), "conv0_bias": (6,)}
CONVOLUTIONS |= {"conv1_weight": (6, 6, 3, 3), "conv1_bias": (6,)}
OPS = {
    "norm_silu": Op(
        group_norm_silu,
        group_norm_silu_ref,
        {"x": (2, 6, 4, 4), "weight": (6,), "bias": (6,)} | ROWS,
        {"num_groups": 2},
        keeps=("x",),
        twice=False,
    ),
    "frozen_conv": Op(
        frozen_conv2d,
        frozen_conv2d_ref,
        CONVOLUTION,
        {"stride": 2, "padding": 1},
        frozen=("weight", "bias"),
        registered=("_op", "_input_grad_op"),
    ),
    "frozen_block": Op(
        partial(block, frozen_unet_block),
        partial(block, frozen_unet_block_ref),
        BLOCK | CONVOLUTIONS | {"skip_weight": (6, 4, 1, 1), "skip_bias": (6,)},
        frozen=tuple(CONVOLUTIONS),
        keeps=("x", "h"),
        twice=False,
    ),
    "resample": Op(
        resample2x,
        resample2x_ref,
        {"x": (2, 3, 4, 6), "residual": (2, 3, 8, 12), "bias": (3,)},
        {"filter": [1, 2], "up": True, "gain": 0.5},
    ),
    "resize_normalize": Op(
        resize_normalize,
        resize_normalize_ref,
        {"x": (2, 1, 4, 5)},
        {"size": 7} | NORMAL,
        registered=("_op", "_adjoint_op"),
    ),
}
every_op = pytest.mark.parametrize("op", OPS.values(), ids=OPS)


@every_op
@pytest.mark.parametrize("layout", ["nchw", "sliced", "expanded"])
def test_other_layouts_of_the_input(op: Op, layout: str) -> None:
    inputs = op.inputs()
    x = inputs["x"]
    n, c, h, w = x.shape
    around = torch.randn(n, c + 3, h + 1, 2 * w, device=DEVICE).to(
        memory_format=torch.channels_last
    )
    around[:, 2:-1, 1:, ::2] = x
    other = {
        "nchw": x.contiguous(),
        "sliced": around[:, 2:-1, 1:, ::2],
        "expanded": x[:1].expand(n, -1, -1, -1),
    }[layout]
    dense = other.clone().contiguous(memory_format=torch.channels_last)
    found, expected = (op.run(op.function, inputs | {"x": v}) for v in (other, dense))
    assert all(torch.equal(found[name], expected[name]) for name in found)
    assert found["y"].is_contiguous(memory_format=torch.channels_last)


@every_op
@pytest.mark.parametrize("gradient", ["expanded", "nchw", "sliced"])
def test_any_layout_of_the_incoming_gradient(op: Op, gradient: str) -> None:
    def slope(function: Callable[..., Tensor], dtype: torch.dtype) -> Tensor:
        inputs = op.inputs(dtype)
        inputs["x"].requires_grad_()
        y = function(**inputs, **op.options)
        n, c, h, w = y.shape
        draw = torch.randn(n, c, 2 * h, w, generator=torch.Generator().manual_seed(6))
        draw = draw.to(DEVICE, dtype)
        dy = {
            "expanded": draw[:1, :1, :1, :1].expand(y.shape),
            "nchw": draw[:, :, :h].contiguous(),
            "sliced": draw[:, :, 1::2],
        }[gradient]
        return torch.autograd.grad(y, inputs["x"], dy)[0]

    exact = slope(op.definition, torch.float64)
    found = slope(op.function, torch.float32).double()
    assert torch.allclose(found, exact, rtol=1e-4, atol=1e-4)


@every_op
def test_what_is_kept_for_backward(op: Op) -> None:
    inputs = op.inputs()
    inputs["x"].requires_grad_()
    given = {value.data_ptr() for name, value in inputs.items() if name != "x"}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        op.function(**inputs, **op.options)
    large = [t for t in kept if t.data_ptr() not in given and t.numel() >= inputs["x"].numel() / 4]
    assert len(large) == len(op.keeps)
    assert ("x" in op.keeps) == (inputs["x"].data_ptr() in {t.data_ptr() for t in large})


@every_op
def test_gradcheck_of_the_definition(op: Op) -> None:
    dispatch.use("auto")
    inputs = op.inputs(torch.float64)
    leaves = [inputs[name].requires_grad_() for name in op.trains]

    def function(*values: Tensor) -> Tensor:
        return op.function(**inputs | dict(zip(op.trains, values, strict=True)), **op.options)

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, leaves, fast_mode=True)


def penalty(op: Op, function: Callable[..., Tensor], *, inside: bool = False) -> Tensor:
    """R1's gradient for x, the first pass inside twice_differentiable or not."""
    inputs = op.inputs()
    x = inputs["x"].requires_grad_()
    if inside:
        with dispatch.twice_differentiable():
            y = function(**inputs, **op.options)
    else:
        y = function(**inputs, **op.options)
    (g,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)[0]


@every_op
def test_r1_is_exact_or_refused(op: Op) -> None:
    """Through the kernel, or inside twice_differentiable; never a wrong number."""
    expected = penalty(op, op.definition)
    if op.twice:
        assert torch.allclose(penalty(op, op.function), expected, rtol=1e-4, atol=1e-5)
    else:
        with pytest.raises(RuntimeError, match=r"no autograd formula|does not require grad"):
            penalty(op, op.function)
    assert torch.allclose(penalty(op, op.function, inside=True), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every registered op that has a derivative, with the arguments that it gets."""
    op, module = OPS[name], import_module(f"fastgan_kernels.{name}")
    seen: dict[str, tuple[Any, tuple]] = {}

    def spy(key: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any) -> Any:
            seen.setdefault(key, (original, arguments))
            return original(*arguments)

        return called

    for key in op.registered:
        monkeypatch.setattr(module, key, spy(key, getattr(module, key)))
    op.run(op.function, op.inputs())
    assert seen.keys() == set(op.registered)
    for key, (original, arguments) in seen.items():
        leaves = [v.detach() if isinstance(v, Tensor) else v for v in arguments]
        for leaf, given in zip(leaves, arguments, strict=True):
            if isinstance(leaf, Tensor):
                leaf.requires_grad_(given.requires_grad)
        if key != "_op":
            leaves[0].requires_grad_()
        torch.library.opcheck(original, tuple(leaves))


BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@every_op
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_equals_eager_in_one_graph(op: Op, backend: str) -> None:
    """To the bit, as any two runs are."""
    torch.compiler.reset()
    compiled = torch.compile(op.function, fullgraph=True, backend=backend)
    eager, found = (op.run(f, op.inputs()) for f in (op.function, compiled))
    assert all(torch.equal(eager[name], found[name]) for name in eager)


def zeros(*size: int, **options: Any) -> Tensor:
    return torch.zeros(size, **options)


X, TRAINS = zeros(2, 8, 6, 6), zeros(16, 8, 3, 3, requires_grad=True)
FLAT, WHOLE, DOUBLE = zeros(8, 6, 6), X.to(torch.int32), X.double()
SMALL = {
    group_norm_silu: {"x": X, "num_groups": 4},
    frozen_conv2d: {"x": X, "weight": zeros(16, 8, 3, 3)},
    resample2x: {"x": X, "filter": [1, 1], "up": True},
    resize_normalize: {"x": zeros(2, 3, 4, 4)} | NORMAL,
    frozen_unet_block: {
        "x": X,
        **dict.fromkeys(("norm0", "norm1"), Norm(zeros(8), zeros(8), 4, 1e-5)),
        **dict.fromkeys(("conv0", "conv1"), Conv(zeros(8, 8, 3, 3), zeros(8))),
    },
}
WRONG: list[tuple[Callable[..., Tensor], dict[str, Any], str]] = [
    (group_norm_silu, {"num_groups": 5}, "num_groups 5 does not divide the 8 channels of x"),
    (group_norm_silu, {"x": FLAT}, r"x has shape \[8, 6, 6\], non-empty \[N, C, H, W\] would do"),
    (group_norm_silu, {"x": zeros(0, 8, 6, 6)}, r"x has shape \[0, 8, 6, 6\]"),
    (group_norm_silu, {"x": WHOLE}, "x is torch.int32, one of bfloat16, float16, float32"),
    (group_norm_silu, {"weight": zeros(7)}, r"weight has shape \[7\], \[8\] would fit x"),
    (group_norm_silu, {"scale": zeros(3, 8)}, r"scale has shape \[3, 8\], \[2, 8\] would fit x"),
    (group_norm_silu, {"bias": zeros(8, device="meta")}, "bias is on meta, x on cpu, one device"),
    (group_norm_silu, {"x": DOUBLE}, "no kernel for float64"),
    (frozen_conv2d, {"weight": TRAINS}, "weight requires a gradient"),
    (frozen_conv2d, {"weight": TRAINS.half()}, "weight is torch.float16, x torch.float32"),
    (frozen_conv2d, {"weight": zeros(16, 9, 3, 3)}, r"weight has shape \[16, 9, 3, 3\]"),
    (frozen_conv2d, {"bias": zeros(8)}, r"bias has shape \[8\], \[16\] would fit x"),
    (frozen_conv2d, {"flipped": zeros(16, 8, 3, 3)}, r"flipped has shape \[16, 8, 3, 3\]"),
    (frozen_conv2d, {"x": FLAT}, r"x has shape \[8, 6, 6\]"),
    (frozen_unet_block, {"resample": "sideways"}, "resample is 'sideways'"),
    (frozen_unet_block, {"pre_shift": zeros(2, 9)}, r"pre_shift has shape \[2, 9\], \[2, 8\]"),
    (frozen_unet_block, {"norm0": Norm(zeros(8), zeros(8), 5, 1e-5)}, "norm0.groups 5"),
    (frozen_unet_block, {"x": X.half()}, "conv0.weight is torch.float32"),
    (frozen_unet_block, {"skip": Conv(zeros(8, 8, 3, 3), zeros(8))}, r"skip.weight has shape"),
    (resample2x, {"filter": [1, 2, 1]}, r"filter is \[1.0, 2.0, 1.0\], an even number of taps"),
    (resample2x, {"filter": [1, -1]}, "filter is"),
    (resample2x, {"x": zeros(2, 8, 5, 4), "up": False}, "x is 5 x 4, even sides would halve"),
    (resample2x, {"residual": zeros(2, 8, 4, 4)}, r"residual has shape \[2, 8, 4, 4\]"),
    (resample2x, {"bias": zeros(7)}, r"bias has shape \[7\], \[8\] would fit x"),
    (resample2x, {"bias": zeros(8)}, "bias has no residual"),
    (resample2x, {"x": FLAT}, r"x has shape \[8, 6, 6\]"),
    (resize_normalize, {"x": FLAT}, r"x has shape \[8, 6, 6\]"),
    (resize_normalize, {"x": X}, "x has 8 channels, 1 or 3 would do"),
    (resize_normalize, {"x": zeros(2, 3, 4, 4, dtype=torch.uint8)}, "x is torch.uint8"),
    (resize_normalize, {"mean": (0.5,)}, "mean has 1 values, 3 would do"),
    (resize_normalize, {"std": (0.5, 0.5)}, "std has 2 values, 3 would do"),
    (resize_normalize, {"std": (0.5, 0.0, 0.5)}, r"std is \[0.5, 0.0, 0.5\], positive numbers"),
    (resize_normalize, {"std": (0.5, nan, 0.5)}, "positive numbers would do"),
    (resize_normalize, {"size": 0}, "size is 0, 1 or more would do"),
    (resize_normalize, {"dtype": torch.int8}, "dtype is torch.int8, one of bfloat16, float16"),
    (resize_normalize, {"dtype": torch.float64}, "no kernel for float64"),
]


@pytest.mark.parametrize(("function", "change", "message"), WRONG)
def test_bad_input_is_named(
    function: Callable[..., Tensor], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(**SMALL[function] | change)
