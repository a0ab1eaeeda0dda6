"""What one would write in PyTorch: the baselines, eager and compiled.

Independent of `kernels`: frozen convolutions are PyTorch's, with the weight cast once; resampling
filters are kept on the device.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    groups: int = 32,
    pre_shift: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    act: bool = True,
) -> Tensor:
    """The embedding before the norm (DDPM++, NCSN++) or behind it (ADM), then SiLU."""
    if pre_shift is not None:
        x = x + pre_shift[:, :, None, None]
    z = F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), 1e-5)
    if scale is not None and shift is not None:
        z = torch.addcmul(shift[:, :, None, None], z, 1 + scale[:, :, None, None])
    return F.silu(z) if act else z


def taps(filter: tuple[int, ...], channels: int, like: Tensor) -> Tensor:
    """The separable filter as a depthwise kernel [C, 1, k, k], its sum one."""
    row = torch.tensor(filter, dtype=torch.float64, device=like.device) / sum(filter)
    return torch.outer(row, row).to(like.dtype).expand(channels, 1, -1, -1).contiguous()


def convolved(x: Tensor, kernel: Tensor, direction: str) -> Tensor:
    """Resampling as in the authors' code: a depthwise convolution."""
    channels, padding = x.shape[1], (kernel.shape[-1] - 1) // 2
    if direction == "up":
        return F.conv_transpose2d(x, 4 * kernel, stride=2, padding=padding, groups=channels)
    return F.conv2d(x, kernel, stride=2, padding=padding, groups=channels)


def resampled(x: Tensor, kernel: Tensor, direction: str) -> Tensor:
    """With two taps PyTorch has faster operators: a mean, a repetition."""
    if kernel.shape[-1] != 2:
        return convolved(x, kernel, direction)
    return F.interpolate(x, scale_factor=2) if direction == "up" else F.avg_pool2d(x, 2)


def block(t: dict[str, Tensor], direction: str, gain: float) -> Tensor:
    """A residual block on the tensors of benchmarks/test_frozen_block.py."""
    x = t["x"]
    h = norm_silu(x, t["norm0.weight"], t["norm0.bias"])
    if direction:
        h, x = (resampled(v, t["taps"], direction) for v in (h, x))
    h = F.conv2d(h, t["conv0.weight"], t["conv0.bias"], padding=1)
    pre_shift, scale, shift = (t.get(name) for name in ("pre_shift", "scale", "shift"))
    affine = t["norm1.weight"], t["norm1.bias"]
    h = norm_silu(h, *affine, pre_shift=pre_shift, scale=scale, shift=shift)
    h = F.conv2d(h, t["conv1.weight"], t["conv1.bias"], padding=1)
    if "skip.weight" in t:
        x = F.conv2d(x, t["skip.weight"], t["skip.bias"])
    return (h + x) * gain


def normalised(x: Tensor, mean: Tensor, std: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """Images in [-1, 1] as a backbone takes them, enlarged in `dtype`; mean, std [3, 1, 1]."""
    small = (((x + 1) / 2 - mean) / std).to(dtype)
    small = small.contiguous(memory_format=torch.channels_last)
    return F.interpolate(small, (size, size), mode="bilinear", align_corners=False)
