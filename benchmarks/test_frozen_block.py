"""frozen_unet_block, without its attention, which is the same library call in every candidate."""

from collections.abc import Callable

from fastgan_kernels.aot.shapes import Block
from fastgan_kernels.attention import Conv, Norm
from fastgan_kernels.frozen_block import frozen_unet_block, frozen_unet_block_ref
from torch import Tensor

from benchmarks.cases import Case, Inputs, Normal, Op, kernel, norm_parameters, training
from benchmarks.measure import DTYPE


def inputs(case: Case, normal: Normal) -> Inputs:
    """What a D2O-F fine-tune trains (norms, embedding, skip) and the frozen convolutions."""
    b, n = _block(case), case.batch
    trains, frozen = {"x": normal(n, b.cin, b.size, b.size)}, {}
    for i, channels in enumerate((b.cin, b.cout)):
        trains[f"norm{i}.weight"], trains[f"norm{i}.bias"] = norm_parameters(normal, channels)
        frozen[f"conv{i}.weight"] = kernel(normal, channels, b.cout)
        frozen[f"conv{i}.bias"] = normal(b.cout)
    for name in case.network.embedding.split():
        trains[name] = normal(n, b.cout, std=0.5)
    if case.network.projects(b):
        trains["skip.weight"] = kernel(normal, b.cin, b.cout, 1)
        trains["skip.bias"] = normal(b.cout)
    return training(trains) | frozen


def call(op: Callable[..., Tensor], case: Case, t: Inputs) -> Tensor:
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


def floor(case: Case, direction: str) -> tuple[float, float]:
    """Forward x and y once, backward x, dx and dy; the convolutions' FLOP, which are 2 k^2 Cin per
    element of their results."""
    b = _block(case)
    x, pixels = case.batch * b.size**2 * b.cin, case.batch * b.out_size**2
    moved = DTYPE.itemsize * ((1 if direction == "forward" else 2) * x + pixels * b.cout)
    return moved, 18 * pixels * (b.cin + b.cout) * b.cout


def _block(case: Case) -> Block:
    return Block(case.shape.cin, case.shape.cout, case.shape.size, case.shape.resample)


OP = Op(
    "frozen_unet_block",
    inputs,
    call,
    frozen_unet_block,
    frozen_unet_block_ref,
    floor,
    largest=False,
)


def test_frozen_block(bench: Callable[[], None]) -> None:
    bench()
