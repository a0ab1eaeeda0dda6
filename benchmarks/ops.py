"""The ops, each with its inputs, its call and its floor: (bytes, FLOP) of a direction.

Floors count an op's own inputs and results once, in bfloat16, and its convolutions' products.
Blocks are measured without attention, the same library call in every candidate.
"""

from collections.abc import Callable

import torch
from fastgan_kernels import (
    frozen_conv2d,
    group_norm_silu,
    norm_silu_conv,
    resample2x,
    resize_normalize,
)
from fastgan_kernels.aot.shapes import Block
from fastgan_kernels.attention import Conv, Norm
from fastgan_kernels.dispatch import apex_group_norm_class
from fastgan_kernels.frozen_block import frozen_unet_block, frozen_unet_block_ref
from fastgan_kernels.frozen_conv import frozen_conv2d_ref
from fastgan_kernels.norm_silu import group_norm_silu_ref
from fastgan_kernels.norm_silu_conv import norm_silu_conv_ref
from fastgan_kernels.resample import resample2x_ref
from fastgan_kernels.resize_normalize import resize_normalize_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Op
from benchmarks.measure import DTYPE, ON_GPU

Normal = Callable[..., Tensor]
Floor = tuple[float, float]
SIZE = 224 if ON_GPU else 8
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _norm(normal: Normal, channels: int) -> tuple[Tensor, Tensor]:
    """Weight and bias; parameters of norms are float32 masters."""
    weight, bias = (normal(channels, std=0.3, dtype=torch.float32) for _ in range(2))
    return 1 + weight, bias


def _kernel(normal: Normal, cin: int, cout: int, side: int = 3) -> Tensor:
    return normal(cout, cin, side, side, std=(cin * side**2) ** -0.5)


def _train(tensors: Inputs) -> Inputs:
    return {name: value.requires_grad_() for name, value in tensors.items()}


def norm_inputs(case: Case, normal: Normal) -> Inputs:
    n, channels, size = case.batch, case.channels, case.shape.size
    weight, bias = _norm(normal, channels)
    found = {"x": normal(n, channels, size, size, std=2) + 0.5, "weight": weight, "bias": bias}
    found |= {name: normal(n, channels, std=0.5) for name in case.shape.embedding.split()}
    return _train(found)


def norm_call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(num_groups=32, act=case.shape.act, **t)


def norm_floor(case: Case, direction: str) -> Floor:
    """One pass: x and y; x, dy and dx."""
    maps = {"forward": 2, "backward": 3}[direction]
    return maps * DTYPE.itemsize * case.batch * case.channels * case.pixels, 0


def block_inputs(case: Case, normal: Normal) -> Inputs:
    """What a D2O-F fine-tune trains (norms, embedding, skip) and the frozen convolutions."""
    b, n = _block(case), case.batch
    trains, frozen = {"x": normal(n, b.cin, b.size, b.size)}, {}
    for i, channels in enumerate((b.cin, b.cout)):
        trains[f"norm{i}.weight"], trains[f"norm{i}.bias"] = _norm(normal, channels)
        frozen[f"conv{i}.weight"] = _kernel(normal, channels, b.cout)
        frozen[f"conv{i}.bias"] = normal(b.cout)
    for name in case.network.embedding.split():
        trains[name] = normal(n, b.cout, std=0.5)
    if case.network.projects(b):
        trains["skip.weight"] = _kernel(normal, b.cin, b.cout, 1)
        trains["skip.bias"] = normal(b.cout)
    return _train(trains) | frozen


def block_call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    norms = [Norm(t[f"norm{i}.weight"], t[f"norm{i}.bias"], 32, 1e-5) for i in (0, 1)]
    convs = [Conv(t[f"conv{i}.weight"], t[f"conv{i}.bias"]) for i in (0, 1)]
    return op(
        *(t["x"], norms[0], convs[0], norms[1], convs[1]),
        **{name: t[name] for name in case.network.embedding.split()},
        skip=Conv(t["skip.weight"], t["skip.bias"]) if "skip.weight" in t else None,
        resample=case.shape.resample,
        filter=case.network.filter,
        gain=1.0 if case.network.adm else 0.5**0.5,
    )


def block_floor(case: Case, direction: str) -> Floor:
    """Forward x and y once, backward x, dx and dy; the convolutions' FLOP, which are 2 k^2 Cin per
    element of their results."""
    b = _block(case)
    x, pixels = case.batch * b.size**2 * b.cin, case.batch * b.out_size**2
    moved = DTYPE.itemsize * ((1 if direction == "forward" else 2) * x + pixels * b.cout)
    return moved, 18 * pixels * (b.cin + b.cout) * b.cout


def _block(case: Case) -> Block:
    return Block(case.shape.cin, case.shape.cout, case.shape.size, case.shape.resample)


def fused_inputs(case: Case, normal: Normal) -> Inputs:
    """All but the convolution trains. A block's second convolution has embedding and residual."""
    s, n = case.shape, case.batch
    trains = {"x": normal(n, s.cin, s.size, s.size, std=2) + 0.5}
    trains["norm_weight"], trains["norm_bias"] = _norm(normal, s.cin)
    trains |= {name: normal(n, s.cin, std=0.5) for name in s.embedding.split()}
    if s.embedding:
        trains["residual"] = normal(n, s.cout, s.size, s.size)
    return _train(trains) | {"weight": _kernel(normal, s.cin, s.cout), "bias": normal(s.cout)}


def fused_call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(num_groups=32, eps=1e-5, gain=0.5**0.5 if case.shape.embedding else 1.0, **t)


def fused_floor(case: Case, direction: str) -> Floor:
    """Forward x, y and the residual; backward x, dx, dy and, of another scale, the residual's."""
    s, pixels = case.shape, case.batch * case.pixels
    of_x, of_y = 1 if direction == "forward" else 2, 2 if s.embedding else 1
    taps = 9 * s.cin * s.cout
    return DTYPE.itemsize * (pixels * (of_x * s.cin + of_y * s.cout) + taps), 2 * pixels * taps


def conv_inputs(case: Case, normal: Normal) -> Inputs:
    """Only the input wants a gradient."""
    s = case.shape
    x = normal(case.batch, s.cin, s.size, s.size).requires_grad_()
    return {"x": x, "weight": _kernel(normal, s.cin, s.cout, s.kernel), "bias": normal(s.cout)}


def conv_call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(**t, padding=case.shape.kernel // 2)


def conv_floor(case: Case, direction: str) -> Floor:
    """The same in both directions: every tensor once, 2 Cin k^2 FLOP per element of y."""
    s, pixels = case.shape, case.batch * case.pixels
    taps = s.cin * s.cout * s.kernel**2
    return DTYPE.itemsize * (pixels * (s.cin + s.cout) + taps), 2 * pixels * taps


def resample_inputs(case: Case, normal: Normal) -> Inputs:
    s = case.shape
    return _train({"x": normal(case.batch, s.cin, s.size, s.size)})


def resample_call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    return op(t["x"], case.network.filter, up=case.shape.resample == "up")


def resample_floor(case: Case, direction: str) -> Floor:
    """Every element of the small and the large map once, whichever way."""
    change = 4 if case.shape.resample == "up" else 0.25
    return DTYPE.itemsize * case.batch * case.channels * case.pixels * (1 + change), 0


def resize_inputs(case: Case, normal: Normal) -> Inputs:
    """The generator's images are float32."""
    size = case.shape.size
    return _train({"x": normal(case.batch, 3, size, size, std=0.5, dtype=torch.float32)})


def resize_call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
    exact = t["x"].dtype == torch.float64
    return op(t["x"], MEAN, STD, SIZE, dtype=None if exact else DTYPE)


def resize_floor(case: Case, direction: str) -> Floor:
    """The small image in float32 and the large one, whichever way."""
    return case.batch * 3 * (4 * case.pixels + DTYPE.itemsize * SIZE**2), 0


# For channels that it has no kernel for, apex does what it does, which may be PyTorch's.
APEX = {"apex": "group_norm_silu=apex"} if ON_GPU and apex_group_norm_class() else {}
# Our convolution also where no table says that it is faster than cuDNN's behind the norm.
TRITON = {"triton": "triton,norm_silu_conv=triton"}
# By the name of its file in tests/kernels.
OPS = {
    "norm_silu": Op(
        *("group_norm_silu", norm_inputs, norm_call, group_norm_silu, group_norm_silu_ref),
        *(norm_floor, APEX),
    ),
    "frozen_block": Op(
        *("frozen_unet_block", block_inputs, block_call, frozen_unet_block, frozen_unet_block_ref),
        block_floor,
        largest=False,
    ),
    "norm_silu_conv": Op(
        *("norm_silu_conv", fused_inputs, fused_call, norm_silu_conv, norm_silu_conv_ref),
        *(fused_floor, TRITON),
    ),
    "frozen_conv": Op(
        *("frozen_conv2d", conv_inputs, conv_call, frozen_conv2d, frozen_conv2d_ref, conv_floor)
    ),
    "resample": Op(
        *("resample2x", resample_inputs, resample_call, resample2x, resample2x_ref),
        resample_floor,
    ),
    "resize_normalize": Op(
        *("resize_normalize", resize_inputs, resize_call, resize_normalize, resize_normalize_ref),
        resize_floor,
    ),
}
