"""Seconds of convolutions in isolation: the UNets' frozen ones and those of the trained heads."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from fastgan_kernels.aot.shapes import NETWORKS
from fastgan_kernels.frozen_conv import flip_weight
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.gpu_report.results import Content, samples
from benchmarks.gpu_report.timing import DEVICE, copies, per_call
from fastgan.discriminator.projected import build_projected

ARITHMETIC = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "tf32": torch.float32,
    "fp32": torch.float32,
}
# The published discriminators, by the side of the images that they see; 64 images per GPU.
DISCRIMINATORS = {
    32: ("vgg16_bn", "tf_efficientnet_lite0"),
    64: ("deit_base_distilled_patch16_224", "tf_efficientnet_lite0"),
}
HEADS_BATCH = 64
# Gradients of (input, weight, bias) that convolution_backward is asked for.
MASKS = {"dgrad": [True, False, False], "wgrad": [False, True, False]}


@dataclass(frozen=True)
class Shape:
    """A convolution without bias: images, channels in and out, pixels a side, kernel, stride."""

    batch: int
    cin: int
    cout: int
    size: int
    kernel: int
    stride: int

    @property
    def out_size(self) -> int:
        return self.size // self.stride

    @property
    def padding(self) -> int:
        return (self.kernel - 1) // 2

    @property
    def flop(self) -> int:
        """Multiplications and additions, the same in every direction."""
        return 2 * self.kernel**2 * self.cin * self.cout * self.batch * self.out_size**2


@contextmanager
def arithmetic(name: str) -> Iterator[torch.dtype]:
    """The dtype to hold numbers in; inside, float32 products are TF32 only for `tf32`."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = products.allow_tf32, convolutions.allow_tf32
    try:
        products.allow_tf32 = convolutions.allow_tf32 = name == "tf32"
        yield ARITHMETIC[name]
    finally:
        products.allow_tf32, convolutions.allow_tf32 = before


def network_rows(name: str, tiny: bool) -> list[Content]:
    """A published network's 3x3 convolutions: forward, dgrad, and dgrad as a forward convolution
    with the flipped weight, in bf16 and fp16 (tiny: one small shape)."""
    (network,) = (each for each in NETWORKS if each.name == name)
    found = {
        Shape(network.batch, cin, cout, size, kernel, 1): count
        for (cin, cout, size, kernel), count in network.convolutions().items()
        if kernel == 3
    }
    if tiny:
        found = {Shape(1, 16, 32, 4, 3, 1): 2}
    return _rows(found, ("bf16", "fp16"), ("forward", "dgrad", "dgrad_flipped"))


def head_rows(tiny: bool) -> list[Content]:
    """The heads' 4x4 convolutions of stride 2: forward, dgrad and wgrad in strict float32, TF32 and
    bf16; `count` is of one pass of both published discriminators together."""
    found: Counter[Shape] = Counter()
    if tiny:
        found[Shape(1, 16, 32, 8, 4, 2)] = 1
    else:
        for resolution, backbones in DISCRIMINATORS.items():
            found += head_shapes(backbones, resolution, HEADS_BATCH)
    return _rows(found, ("fp32", "tf32", "bf16"), ("forward", "dgrad", "wgrad"))


def head_shapes(backbones: tuple[str, ...], resolution: int, batch: int) -> Counter[Shape]:
    """The strided convolutions of a discriminator's heads, each as often as one pass has it."""
    network = build_projected(backbones, dict.fromkeys(backbones, "random")).to("meta")
    found: Counter[Shape] = Counter()

    def note(layer: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, cin, size, _ = inputs[0].shape
        shape = Shape(batch, cin, len(layer.weight), size, layer.kernel_size[0], layer.stride[0])
        found[shape] += shape.stride == 2

    for layer in network.heads.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(note)
    with torch.no_grad():
        network(torch.empty(2, 3, resolution, resolution, device="meta"))
    return +found


def _rows(
    shapes: dict[Shape, int] | Counter[Shape], kinds: tuple[str, ...], directions: tuple[str, ...]
) -> list[Content]:
    rows = []
    for shape, count in shapes.items():
        for kind in kinds:
            with arithmetic(kind) as dtype:
                for direction in directions:
                    taken = per_call(_calls(shape, direction, dtype))
                    where = {"count": count, "arithmetic": kind, "direction": direction}
                    rows.append(vars(shape) | where | _measured(shape, taken))
            if DEVICE.type == "cuda":
                torch.cuda.empty_cache()
    return rows


def _measured(shape: Shape, taken: list[float]) -> Content:
    return {"flop": shape.flop, "seconds": samples(taken)}


def _calls(shape: Shape, direction: str, dtype: torch.dtype) -> list[Callable[[], Tensor]]:
    """The convolution on inputs that take turns; weights are shared, as in training."""
    s = shape
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int) -> Tensor:
        value = torch.randn(size, generator=generator, device=DEVICE).to(dtype)
        return value.to(memory_format=torch.channels_last)

    weight = normal(s.cout, s.cin, s.kernel, s.kernel)
    x_size = (s.batch, s.cin, s.size, s.size)
    y_size = (s.batch, s.cout, s.out_size, s.out_size)
    bytes_per_call = normal(*x_size).nbytes + normal(*y_size).nbytes
    return [
        _call(direction, normal(*x_size), normal(*y_size), weight, shape)
        for _ in range(copies(bytes_per_call))
    ]


def _call(
    direction: str, x: Tensor, dy: Tensor, weight: Tensor, shape: Shape
) -> Callable[[], Tensor]:
    stride, padding = [shape.stride] * 2, [shape.padding] * 2
    if direction == "forward":
        return lambda: F.conv2d(x, weight, None, stride, padding)
    if direction == "dgrad_flipped":
        flipped, rest = flip_weight(weight), shape.kernel - 1 - shape.padding
        return lambda: F.conv2d(dy, flipped, None, 1, rest)
    mask = MASKS[direction]

    def backward() -> Tensor:
        gradients = torch.ops.aten.convolution_backward(
            dy, x, weight, None, stride, padding, [1, 1], False, [0, 0], 1, mask
        )
        return gradients[mask.index(True)]

    return backward
