"""Arithmetic and traffic of every layer for one image, read off the networks themselves.

A network runs on the meta device, which has shapes and no numbers, and a hook turns what a layer
saw into counts. A product of x with a weight costs 2 FLOP per weight and position. Traffic is in
elements: what a layer reads and writes when nothing is fused into it but what stands beside it
here (SiLU, bias, an eval BatchNorm). Not counted: spectral norm's power iterations, which do not
grow with the batch, and arithmetic that is no product (norms, resizing, losses).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, Literal

from fastgan_kernels.dispatch import twice_differentiable
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastgan.models.layers import Conv2d, GroupNorm
from fastgan.models.unet_block import UNetBlock

Kind = Literal["convolution", "attention", "linear", "norm"]


@dataclass(frozen=True)
class Layer:
    """One call of a layer, for one image."""

    kind: Kind
    flop: int = 0
    """Forward. A gradient to the weight costs the same."""
    input_grad_flop: int = 0
    moved: int = 0
    """Elements read and written forward, without weights."""
    moved_back: int = 0
    """Elements read and written for the gradient to the input, or to the weight."""
    weights: int = 0
    """Elements of weight that a pass over a whole batch reads once."""
    kept: int = 0
    """Elements kept for backward."""
    trains: bool = False
    """Whether its weight wants a gradient."""
    input_grad: bool = False
    """Whether what it read wants a gradient."""
    name: str = ""


def layers_of(network: nn.Module, run: Callable[[], object]) -> list[Layer]:
    """The layers that `run` passes through, in order; `run` calls `network` on one image.

    Names are the submodules'. Every op takes its plain definition. Networks belong on the meta
    device, with requires_grad set as in training.
    """
    found: list[Layer] = []
    handles = [handle for name, m in network.named_modules() for handle in _watch(m, name, found)]
    try:
        with twice_differentiable():
            run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def flop(layers: Iterable[Layer], kind: Kind | None = None) -> int:
    """FLOP of one forward pass, of layers of one kind or of all."""
    return sum(layer.flop for layer in layers if kind in (None, layer.kind))


def norm_elements(layers: Iterable[Layer]) -> int:
    """Elements that go through norms in one forward pass."""
    return sum(layer.moved // 2 for layer in layers if layer.kind == "norm")


_Count = Callable[[Any, tuple[Any, ...], Tensor], Iterator[Layer]]


def _watch(module: nn.Module, name: str, found: list[Layer]) -> Iterator[RemovableHandle]:
    count = _counter(module)
    if count is not None:
        yield module.register_forward_hook(partial(_note, count, name, found))


def _note(
    count: _Count, name: str, found: list[Layer], module: nn.Module, inputs: Any, output: Any
) -> None:
    for layer in count(module, inputs, output):
        full = ".".join(part for part in (name, layer.name) if part)
        found.append(replace(layer, name=full))


def _counter(module: nn.Module) -> _Count | None:
    """How the layers of a module are counted; None where its children are, or there are none."""
    for types, count in _COUNTERS.items():
        if isinstance(module, types):
            return count
    if hasattr(module, "fused_attn"):  # timm's attentions; their projections are children
        return _explicit_attention
    weight = getattr(module, "weight", None)
    is_linear = isinstance(weight, Tensor) and weight.ndim == 2
    return _linear if is_linear and not isinstance(module, nn.Embedding) else None


def _product(
    kind: Kind,
    weight: Tensor,
    positions: int,
    moved: int,
    *,
    kept: int,
    input_grad: bool,
    name: str = "",
) -> Layer:
    """x times a weight that is used at each of `positions`."""
    count = weight.numel()
    return Layer(
        kind,
        flop=2 * count * positions,
        input_grad_flop=2 * count * positions,
        moved=moved,
        moved_back=moved,
        weights=count,
        kept=kept,
        trains=weight.requires_grad,
        input_grad=input_grad,
        name=name,
    )


def _linear(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Iterator[Layer]:
    x, weight = inputs[0], module.weight
    assert isinstance(weight, Tensor)
    rows, moved = x.numel() // x.shape[-1], x.numel() + y.numel()
    yield _product("linear", weight, rows, moved, kept=x.numel(), input_grad=x.requires_grad)


def _convolution(
    module: nn.Conv2d | nn.ConvTranspose2d, inputs: tuple[Tensor, ...], y: Tensor
) -> Iterator[Layer]:
    """PyTorch's, which keeps its input whether its weight trains or not."""
    x = inputs[0]
    grid = x if isinstance(module, nn.ConvTranspose2d) else y
    moved = x.numel() + y.numel()
    yield _product(
        "convolution",
        module.weight,
        _pixels(grid),
        moved,
        kept=x.numel(),
        input_grad=x.requires_grad,
    )


def _unet_convolution(module: Conv2d, inputs: tuple[Tensor, ...], y: Tensor) -> Iterator[Layer]:
    """The UNet's own, with the resampling before it (behind it where they are fused)."""
    x = inputs[0]
    if module.fused:
        side = x.shape[-1] + 2 * ((len(module.taps) - 1) // 2)
        assert module.weight is not None
        yield _same(module.weight, side**2, x.requires_grad)
        behind = x.requires_grad or module.weight.requires_grad
        yield _resampling(len(module.taps), len(module.weight), side**2, _pixels(y), behind)
        return
    pixels = _pixels(y)
    if module.up or module.down:
        taps, channels = len(module.taps), x.shape[1]
        yield _resampling(taps, channels, _pixels(x), pixels, x.requires_grad)
    if module.weight is not None:
        yield _same(module.weight, pixels, x.requires_grad)


def _same(weight: Tensor, pixels: int, input_grad: bool, name: str = "") -> Layer:
    """A UNet's convolution to `pixels`; frozen it keeps nothing (kernels.frozen_conv2d)."""
    out, channels = weight.shape[:2]
    kept = channels * pixels if weight.requires_grad else 0
    moved = (channels + out) * pixels
    return _product(
        "convolution", weight, pixels, moved, kept=kept, input_grad=input_grad, name=name
    )


def _resampling(taps: int, channels: int, before: int, after: int, input_grad: bool) -> Layer:
    """A depthwise filter of taps x taps; a step of 2 visits the smaller grid's pixels."""
    count = 2 * taps**2 * channels * min(before, after)
    moved = channels * (before + after)
    return Layer(
        "convolution",
        flop=count,
        input_grad_flop=count,
        moved=moved,
        moved_back=moved,
        input_grad=input_grad,
        name="resample",
    )


def _unet_block(block: UNetBlock, inputs: tuple[Tensor, ...], y: Tensor) -> Iterator[Layer]:
    """The block's op reads the parameters of its submodules, which are not called themselves."""
    x, emb = inputs
    # Behind norm0, whose parameters train wherever anything in the block does.
    inside = x.requires_grad or emb.requires_grad or block.norm0.weight.requires_grad
    pixels = _pixels(y)
    yield _norm_of(x.numel(), block.norm0.weight, x.requires_grad, "norm0")
    if block.resample:
        filtered = partial(_resampling, len(block.taps), x.shape[1], _pixels(x), pixels)
        yield from (filtered(inside), filtered(x.requires_grad))
    for convolution in ("conv0", "conv1"):
        yield _same(getattr(block, convolution).weight, pixels, inside, convolution)
    yield _norm_of(y.numel(), block.norm1.weight, inside, "norm1")
    if block.skip is not None and block.skip.weight is not None:
        skip = _same(block.skip.weight, pixels, x.requires_grad, "skip")
        yield replace(skip, kept=0)  # it reads the block's x, which norm0 keeps
    if block.num_heads:
        assert block.qkv.weight is not None and block.proj.weight is not None
        yield _norm_of(y.numel(), block.norm2.weight, inside, "norm2")
        yield _same(block.qkv.weight, pixels, inside, "qkv")
        yield _attention(pixels, y.shape[1], inside)
        yield _same(block.proj.weight, pixels, inside, "proj")


def _attention(length: int, channels: int, input_grad: bool, windows: int = 1) -> Layer:
    """q k^T and P v over `length` positions, P never written out; each gives two gradients."""
    count, sides = 4 * length**2 * channels * windows, 4 * length * channels * windows
    return Layer(
        "attention",
        flop=count,
        input_grad_flop=2 * count,
        moved=sides,
        moved_back=2 * sides,
        kept=sides,
        input_grad=input_grad,
        name="attention",
    )


def _explicit_attention(
    module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor
) -> Iterator[Layer]:
    """timm's over [windows, length, channels]; P is written, read twice (softmax), and kept."""
    x, heads = inputs[0], module.num_heads
    assert isinstance(heads, int)
    *windows, length, channels = x.shape
    layer = _attention(length, channels, x.requires_grad, prod(windows))
    scores = heads * length**2 * prod(windows)
    yield replace(
        layer,
        moved=layer.moved + 4 * scores,
        moved_back=layer.moved_back + 4 * scores,
        kept=layer.kept + scores,
    )


def _norm(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Iterator[Layer]:
    weight = module.weight
    assert weight is None or isinstance(weight, Tensor)
    yield _norm_of(y.numel(), weight, inputs[0].requires_grad)


def _norm_of(elements: int, weight: Tensor | None, input_grad: bool, name: str = "norm") -> Layer:
    """In one pass: reads x and writes y; backward reads x and dy and writes dx."""
    return Layer(
        "norm",
        moved=2 * elements,
        moved_back=3 * elements,
        kept=elements,
        trains=weight is not None and weight.requires_grad,
        input_grad=input_grad,
        name=name,
    )


def _batch_norm(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> Iterator[Layer]:
    """With the batch's statistics a second reading; in eval mode it is folded into a neighbour."""
    for layer in _norm(module, inputs, y) if module.training else ():
        read = y.numel()
        yield replace(layer, moved=layer.moved + read, moved_back=layer.moved_back + 2 * read)


def _pixels(x: Tensor) -> int:
    return x.shape[-2] * x.shape[-1]


_COUNTERS: dict[Any, _Count] = {
    UNetBlock: _unet_block,
    Conv2d: _unet_convolution,
    (nn.Conv2d, nn.ConvTranspose2d): _convolution,
    nn.BatchNorm2d: _batch_norm,
    (GroupNorm, nn.LayerNorm): _norm,
}
