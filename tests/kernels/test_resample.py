"""resample2x against EDM's depthwise convolutions in float64; linear, so its own derivative."""

from collections.abc import Callable

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels.resample import resample2x, resample2x_ref
from oracle import DEVICE, DTYPES, assert_as_accurate, gradients
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

# N, C, H, W
SHAPES = {
    "published, scaled down": (2, 32, 8, 8),
    "ADM's channels": (1, 72, 4, 4),
    "odd channels": (2, 5, 6, 6),
    "one channel": (1, 1, 4, 4),
    "two pixels a side": (3, 16, 2, 2),
    "not square": (2, 24, 4, 10),
    "several tiles": (1, 80, 16, 16),
    "one unit of channels": (1, 8, 4, 4),
}
FILTERS = ([1, 1], [1, 3, 3, 1], [1, 2])
DIRECTIONS = [pytest.param(True, id="up"), pytest.param(False, id="down")]


def make(name: str, up: bool, dtype: torch.dtype, with_residual: bool) -> dict[str, Tensor]:
    n, c, h, w = SHAPES[name]
    generator = torch.Generator().manual_seed(2)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    inputs = {"x": normal(n, c, h, w).to(memory_format=torch.channels_last)}
    if with_residual:
        out = (2 * h, 2 * w) if up else (h // 2, w // 2)
        inputs |= {"residual": normal(n, c, *out), "bias": normal(c)}
    return inputs


def run(
    function: Callable[..., Tensor], inputs: dict[str, Tensor], taps: list[int], up: bool
) -> dict[str, Tensor]:
    leaves = {name: value.clone().requires_grad_() for name, value in inputs.items()}
    x = leaves["x"]
    others = {name: leaf for name, leaf in leaves.items() if name != "x"}
    y = function(x, taps, up=up, gain=0.7, **others)
    return {"y": y, **gradients([y], leaves)}


def by_library(*args: object, **options: object) -> Tensor:
    dispatch.use("library")
    y = resample2x(*args, **options)  # type: ignore[arg-type]
    dispatch.use("triton")
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("up", DIRECTIONS)
@pytest.mark.parametrize("taps", FILTERS)
@pytest.mark.parametrize("name", SHAPES)
def test_as_accurate_as_plain_pytorch(
    name: str, taps: list[int], up: bool, dtype: torch.dtype, poisoned: None
) -> None:
    inputs = make(name, up, dtype, with_residual=name != "not square")
    double = {key: value.double() for key, value in inputs.items()}
    exact = run(resample2x_ref, double, taps, up)
    ours = run(resample2x, inputs, taps, up)
    assert_as_accurate(ours, run(by_library, inputs, taps, up), exact)
    assert ours["y"].is_contiguous(memory_format=torch.channels_last)


def test_a_mean_and_a_repetition() -> None:
    """What [1, 1] means, without a convolution."""
    x = torch.arange(32.0, device=DEVICE).reshape(1, 2, 4, 4)
    assert torch.allclose(resample2x(x, [1, 1], up=False), F.avg_pool2d(x, 2))
    assert torch.equal(resample2x(x, [1, 1], up=True), F.interpolate(x, scale_factor=2))


def test_one_row_by_hand() -> None:
    """[1, 3, 3, 1] with zeros around the image; the weights are those over 8, up times 2."""
    x = torch.zeros(1, 1, 2, 4, device=DEVICE)
    x[0, 0, :] = torch.tensor([8.0, 0.0, 0.0, 0.0])
    down = resample2x(x, [1, 3, 3, 1], up=False)
    # Both rows count 3 / 8 each, the rows outside are zero; the first pixel counts 3, then 1.
    assert down[0, 0].flatten().tolist() == [8 * 3 / 8 * 6 / 8, 0.0]
    up = resample2x(x, [1, 3, 3, 1], up=True)[0, 0, 1]
    assert up.tolist() == [6.0, 6.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_the_sum_with_the_residual_is_rounded_once() -> None:
    """A mean of 1 + 2^-12, which float16 would round to 1, less 1."""
    x = torch.ones(1, 8, 2, 2, dtype=torch.float16, device=DEVICE)
    x[:, :, 1, 1] += 2**-10
    y = resample2x(x, [1, 1], up=False, residual=-torch.ones_like(x[:, :, :1, :1]))
    assert torch.equal(y, torch.full_like(y, 2**-12))


@pytest.mark.parametrize("up", DIRECTIONS)
def test_constant_images_keep_their_value_inside(up: bool) -> None:
    y = resample2x(torch.ones(1, 8, 8, 8, device=DEVICE), [1, 3, 3, 1], up=up)
    assert torch.allclose(y[:, :, 1:-1, 1:-1], torch.ones((), device=DEVICE))


@pytest.mark.parametrize("layout", ["nchw", "sliced", "expanded"])
def test_other_layouts_are_copied(layout: str) -> None:
    x = torch.randn(2, 24, 6, 6, device=DEVICE).to(memory_format=torch.channels_last)
    other = {
        "nchw": x.contiguous(),
        "sliced": x[:, 3:9, :4],
        "expanded": x[:1].expand(3, -1, -1, -1),
    }
    dense = other[layout].clone().contiguous(memory_format=torch.channels_last)
    assert torch.equal(
        resample2x(other[layout], [1, 3, 3, 1], up=True), resample2x(dense, [1, 3, 3, 1], up=True)
    )


@pytest.mark.parametrize("bias", ["strided", "expanded"])
def test_the_op_itself_takes_any_layout(bias: str) -> None:
    """Compiled graphs call the op past the public function, with the strides they like."""
    x, residual = torch.randn(2, 8, 4, 6, device=DEVICE), torch.randn(2, 8, 8, 12, device=DEVICE)
    other = {"strided": torch.randn(16, device=DEVICE)[::2], "expanded": x[0, 0, 0, :1].expand(8)}
    found = torch.ops.fastgan.resample2x(x, [1.0, 1.0], True, 1.0, residual, other[bias], 0.7)
    expected = resample2x_ref(x, [1, 1], up=True, residual=residual, bias=other[bias], gain=0.7)
    assert torch.allclose(found, expected, atol=1e-5)


def test_any_layout_of_the_incoming_gradient() -> None:
    x = torch.randn(1, 8, 4, 4, device=DEVICE).requires_grad_()
    dense = torch.randn(1, 8, 8, 8, device=DEVICE)
    for dy in (dense, torch.ones(1, device=DEVICE).expand(1, 8, 8, 8)):
        found, expected = (
            torch.autograd.grad(f(x, [1, 3, 3, 1], up=True), x, dy)[0]
            for f in (resample2x, resample2x_ref)
        )
        assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("up", DIRECTIONS)
def test_r1_through_the_kernel(up: bool) -> None:
    def penalty(function: Callable[..., Tensor]) -> Tensor:
        x = torch.linspace(-1, 1, 128, device=DEVICE).reshape(1, 8, 4, 4).requires_grad_()
        y = function(x, [1, 3, 3, 1], up=up).tanh().sum()
        (g,) = torch.autograd.grad(y, x, create_graph=True)
        return torch.autograd.grad(g.square().sum(), x)[0]

    assert torch.allclose(penalty(resample2x), penalty(resample2x_ref), atol=1e-5)


def test_gradcheck_of_the_definition() -> None:
    dispatch.use("auto")
    x, residual, bias = (
        torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)
        for shape in ((1, 3, 2, 4), (1, 3, 4, 8), (3,))
    )

    def function(x: Tensor, residual: Tensor, bias: Tensor) -> Tensor:
        return resample2x(x, [1, 3, 3, 1], up=True, residual=residual, bias=bias, gain=0.5)

    assert torch.autograd.gradcheck(function, (x, residual, bias))
    assert torch.autograd.gradgradcheck(function, (x, residual, bias))


def test_the_definition_copies_nothing_from_the_host() -> None:
    """A CUDA graph, which R1 through a UNet's encoder is recorded in, could not hold that."""

    class FromHost(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten.lift_fresh.default
            return func(*args, **(kwargs or {}))

    with FromHost():
        with pytest.raises(AssertionError):
            torch.tensor([1.0, 3.0])
        resample2x_ref(torch.zeros(1, 2, 4, 4), [1, 3, 3, 1], up=False)


def test_opcheck() -> None:
    inputs = make("odd channels", True, torch.float32, with_residual=True)
    x, residual, bias = (value.requires_grad_() for value in inputs.values())
    arguments = (x, [1.0, 3.0, 3.0, 1.0], True, 1.0, residual, bias, 0.7)
    torch.library.opcheck(torch.ops.fastgan.resample2x, arguments)


def test_compiled_equals_eager_in_one_graph() -> None:
    inputs = make("odd channels", False, torch.float32, with_residual=True)
    compiled = torch.compile(resample2x, fullgraph=True, backend="aot_eager")
    eager, found = (run(f, inputs, [1, 3, 3, 1], False) for f in (resample2x, compiled))
    assert all(torch.equal(eager[name], found[name]) for name in eager)


def test_the_same_bits_every_time() -> None:
    inputs = make("several tiles", True, torch.float32, with_residual=True)
    first, again = (run(resample2x, inputs, [1, 3, 3, 1], True) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"filter": [1, 2, 1]}, r"filter is \[1.0, 2.0, 1.0\], an even number of taps"),
        ({"filter": [1, -1]}, "filter is"),
        ({"x": torch.zeros(2, 8, 5, 4), "up": False}, "x is 5 x 4, even sides would halve"),
        ({"residual": torch.zeros(2, 8, 4, 4)}, r"residual has shape \[2, 8, 4, 4\]"),
        ({"bias": torch.zeros(7)}, r"bias has shape \[7\], \[8\] would fit x"),
        ({"bias": torch.zeros(8)}, "bias has no residual"),
        ({"x": torch.zeros(8, 4, 4)}, r"x has shape \[8, 4, 4\]"),
    ],
)
def test_bad_input_is_named(change: dict, message: str) -> None:
    arguments = {"x": torch.zeros(2, 8, 4, 4), "filter": [1, 1], "up": True} | change
    with pytest.raises(ValueError, match=message):
        resample2x(**arguments)
