"""resample2x against EDM's depthwise convolutions in float64; linear, so its own derivative."""

import pytest
import torch
from fastgan_kernels.resample import resample2x, resample2x_ref
from oracle import DEVICE, DTYPES, check
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
    "several tiles": (1, 80, 4, 6),
    "one unit of channels": (1, 8, 4, 4),
}
FILTERS = ([1, 3, 3, 1], [1, 1], [1, 2])
DIRECTIONS = [pytest.param(True, id="up"), pytest.param(False, id="down")]
# Every shape by one filter, one shape by all and in every dtype.
CASES = [(name, FILTERS[i % 3], torch.float32) for i, name in enumerate(SHAPES)]
CASES += [("odd channels", taps, dtype) for taps in FILTERS for dtype in DTYPES]


def make(name: str, up: bool, dtype: torch.dtype) -> dict[str, Tensor]:
    n, c, h, w = SHAPES[name]
    generator = torch.Generator().manual_seed(2)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(DEVICE, dtype)

    inputs = {"x": normal(n, c, h, w).to(memory_format=torch.channels_last)}
    if name == "not square":
        return inputs
    out = (2 * h, 2 * w) if up else (h // 2, w // 2)
    return inputs | {"residual": normal(n, c, *out), "bias": normal(c)}


@pytest.mark.parametrize("up", DIRECTIONS)
@pytest.mark.parametrize(("name", "taps", "dtype"), CASES)
def test_as_accurate_as_plain_pytorch(
    name: str, taps: list[int], dtype: torch.dtype, up: bool, poisoned: None
) -> None:
    check(resample2x, resample2x_ref, make(name, up, dtype), filter=taps, up=up, gain=0.7)


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


@pytest.mark.parametrize("bias", ["strided", "expanded"])
def test_the_op_itself_takes_any_layout(bias: str) -> None:
    """Compiled graphs call the op past the public function, with the strides they like."""
    x, residual = torch.randn(2, 8, 4, 6, device=DEVICE), torch.randn(2, 8, 8, 12, device=DEVICE)
    other = {"strided": torch.randn(16, device=DEVICE)[::2], "expanded": x[0, 0, 0, :1].expand(8)}
    found = torch.ops.fastgan.resample2x(x, [1.0, 1.0], True, 1.0, residual, other[bias], 0.7)
    expected = resample2x_ref(x, [1, 1], up=True, residual=residual, bias=other[bias], gain=0.7)
    assert torch.allclose(found, expected, atol=1e-5)


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
