"""What `python -m fastgan_kernels.aot` compiles: all launches of the published networks.

Each op's launcher is called on tensors without memory, which records what it would start on a GPU
(`runtime.recording`).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan_kernels import frozen_block, runtime
from fastgan_kernels.aot.shapes import NETWORKS, Block, Network, Norm
from fastgan_kernels.norm_silu.device import group_norm_silu_backward, group_norm_silu_forward
from fastgan_kernels.norm_silu_conv.launch import (
    norm_silu_conv_backward,
    norm_silu_conv_forward,
    shape_of,
)
from fastgan_kernels.norm_silu_conv.plans import DIRECTIONS, SHORT, Architecture, Plan, candidates
from fastgan_kernels.norm_silu_conv.sums import Affine, statistics
from fastgan_kernels.resample import resample2x_launch
from fastgan_kernels.resize_normalize import resize_normalize_adjoint, resize_normalize_forward
from fastgan_kernels.runtime import Launch


class Started(NamedTuple):
    """What an op starts at a shape; `tile`: the plan of a convolution."""

    shape: tuple[int, ...]
    launch: Launch
    tile: str = ""


@dataclass(frozen=True)
class Build:
    """A launch as Triton's compiler takes it: types and constants by argument, no tensors."""

    module: str
    kernel: str
    shape: tuple[int, ...]
    dtype: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int | None
    tile: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """Builds of one key are one program."""
        program = (self.module, self.kernel, self.types, self.constants, self.divisible)
        return (*program, self.num_warps, self.num_stages)

    @property
    def label(self) -> str:
        """`resize_normalize.adjoint`: which op's, and which kernel there."""
        op = self.module.split(".")[1]
        name = self.kernel.strip("_").removesuffix("kernel").strip("_")
        return f"{op}.{name}" if name not in ("", op) else op


def builds(dtypes: Iterable[torch.dtype]) -> list[Build]:
    """Every launch of the published networks' training step, each program once."""
    return _once(dtypes, _launches)


def convolution_builds(
    dtypes: Iterable[torch.dtype], arch: str, *, every: bool = False
) -> list[Build]:
    """norm_silu_conv at the networks' 3 x 3 convolutions for `arch`.

    By the plan that nobody measured everywhere, by the others once each; `every`: everywhere.
    """
    architecture = int(arch[-2]), int(arch[-1])
    return _once(dtypes, lambda dtype: convolutions(dtype, architecture, every))


def _once(
    dtypes: Iterable[torch.dtype], launches: Callable[[torch.dtype], Iterable[Started]]
) -> list[Build]:
    found: dict[tuple[Any, ...], Build] = {}
    for dtype in dtypes:
        for started in launches(dtype):
            build = specialised(started, SHORT[dtype])
            found.setdefault(build.key, build)
    return list(found.values())


def convolutions(dtype: torch.dtype, architecture: Architecture, every: bool) -> Iterator[Started]:
    """A block's first convolution, its second with embedding and residual."""
    seen: set[tuple[str, Plan]] = set()
    for network in NETWORKS:
        for cin, cout, size, kernel in network.convolutions():
            if kernel == 1:  # behind no SiLU
                continue
            x, weight = image(network.batch, cin, size, dtype), image(cout, cin, 3, dtype)
            for embedding in ("", network.embedding) if cin == cout else ("",):
                for direction in DIRECTIONS:
                    default, *others = candidates(
                        architecture, dtype, direction, shape_of(x, weight)
                    )
                    new = [p for p in others if every or (embedding and (direction, p) not in seen)]
                    seen |= {(direction, plan) for plan in new}
                    started = _forward if direction == "forward" else _backward
                    for plan in (default, *new):
                        yield from started(x, weight, embedding, plan)


def _forward(x: Tensor, weight: Tensor, embedding: str, plan: Plan) -> Iterator[Started]:
    """With the sums for the next norm and what it makes of them."""
    after, bias = _after(x, embedding), weight.new_empty(len(weight))
    residual, gain = (_beside(x, weight), 0.5) if embedding else (None, 1.0)
    with runtime.recording() as launches:
        _, _, sums = norm_silu_conv_forward(
            *(x, 32, weight, bias, 1e-5, after, residual, gain, plan), sums=True
        )
        assert sums is not None
        statistics(sums, 32, 1e-5, after if len(weight) == x.shape[1] else Affine())
    yield from _convolved(x, weight, plan, launches)


def _backward(x: Tensor, weight: Tensor, embedding: str, plan: Plan) -> Iterator[Started]:
    found, dy = torch.empty(2, len(x), 32, device="meta"), _beside(x, weight)
    after, wanted = _after(x, embedding), frozenset({"x", "affine", *embedding.split()})
    with runtime.recording() as launches:
        norm_silu_conv_backward(
            *(dy, x, found, 32, weight, after, 0.5, wanted, plan),
            residual=None if embedding else x,
        )
    yield from _convolved(x, weight, plan, launches)


def _after(x: Tensor, embedding: str) -> Affine:
    parameter, rows = torch.empty(x.shape[1], device="meta"), x.new_empty(x.shape[:2])
    return Affine(parameter, parameter, **dict.fromkeys(embedding.split(), rows))


def _beside(x: Tensor, weight: Tensor) -> Tensor:
    return image(len(x), len(weight), x.shape[2], x.dtype)


def _convolved(x: Tensor, weight: Tensor, plan: Plan, launches: list[Launch]) -> Iterator[Started]:
    """The norm's own kernels have rows of their own."""
    n, cin, size = x.shape[:3]
    for launch in launches:
        if "norm_silu_conv" in launch.kernel.fn.__module__:
            tile = str(plan) if "BLOCK_K" in launch.constants else ""
            yield Started((n, cin, len(weight), size, weight.shape[2]), launch, tile)


def _launches(dtype: torch.dtype) -> Iterator[Started]:
    for network in NETWORKS:
        n = network.batch
        for block in network.blocks:
            yield from _of_block(network, block, dtype)
        for norm in network.norms():
            yield from of_norm(image(n, norm.channels, norm.size, dtype), norm)
        for channels, size, direction in network.resamplings():
            x, up = image(n, channels, size, dtype), direction == "up"
            with runtime.recording() as launches:
                y = resample2x_launch(x, network.filter, up, 1.0, None, None, 1.0)
                resample2x_launch(y, network.filter, not up, 1.0, None, None, 1.0)
            yield from (Started(tuple(x.shape), launch) for launch in launches)
        x, scale = image(n, 3, network.resolution, torch.float32), [0.5] * 3
        with runtime.recording() as launches:
            y = resize_normalize_forward(x, scale, scale, 224, dtype)
            resize_normalize_adjoint(y, scale, 3, x.shape[2], x.shape[3], torch.float32)
        yield from (Started(tuple(x.shape), launch) for launch in launches)


def _of_block(network: Network, block: Block, dtype: torch.dtype) -> Iterator[Started]:
    """What the frozen block itself starts: its pre_shift is float32, residuals enter its norms."""
    n, cin, cout = network.batch, block.cin, block.cout
    x = image(n, cin, block.size, dtype)
    rows = torch.empty(n, cout * (1 + network.adm), dtype=dtype, device="meta")
    scale, shift = rows.chunk(2, dim=1) if network.adm else (None, None)
    embedding = (None if network.adm else rows, scale, shift)
    wide, narrow = (torch.empty(c, device="meta") for c in (cin, cout))
    bias = narrow.to(dtype)
    skip = (image(cout, cin, 1, dtype), bias) if network.projects(block) else (None, None)
    taps = [float(tap) for tap in network.filter]
    arguments: list[Any] = [x, wide, wide, narrow, narrow, *embedding, *skip]
    arguments += [image(cout, cin, 3, dtype), bias, image(cout, cout, 3, dtype), bias]
    arguments += [32, 32, 1e-5, 1e-5, block.resample, taps, 0.5]
    inputs = frozen_block.Inputs(*arguments)
    wanted = f"x affine0 affine1 {network.embedding}"
    with runtime.recording() as launches:
        y, h, statistics0, statistics1 = frozen_block.forward(inputs)
        frozen_block.backward(y, inputs, h, statistics0, statistics1, wanted)
    yield from (Started(tuple(launch.args[0].shape), launch) for launch in launches)


def of_norm(x: Tensor, norm: Norm) -> Iterator[Started]:
    """Both directions of a group norm with all that it takes."""
    found = torch.empty(2, len(x), norm.groups, device="meta")
    wanted = frozenset({"x", "affine", *norm.embedding.split()})
    after = _after(x, norm.embedding)
    with runtime.recording() as launches:
        group_norm_silu_forward(x, norm.groups, *after[:2], 1e-5, *after[2:], norm.act)
        group_norm_silu_backward(x, x, found, norm.groups, *after, norm.act, wanted)
    yield from (Started(tuple(x.shape), launch) for launch in launches)


def image(n: int, c: int, size: int, dtype: torch.dtype) -> Tensor:
    x = torch.empty(n, c, size, size, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last)


def specialised(started: Started, dtype: str) -> Build:
    """Types and constants as Triton's JIT derives them from run-time arguments."""
    launch = started.launch
    types: dict[str, str] = {}
    constants, divisible = dict(launch.constants), []
    for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
        if value is None or (type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = f"*{SHORT[value.dtype]}"
            divisible.append(name)
        elif hasattr(value, "block_shape"):
            types[name] = f"tensordesc<{SHORT[value.base.dtype]}{list(value.block_shape)}>"
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible += [name] if value % 16 == 0 else []
    return Build(
        module=launch.kernel.fn.__module__,
        kernel=launch.kernel.fn.__name__,
        shape=started.shape,
        dtype=dtype,
        types=tuple((name, types.get(name, "constexpr")) for name in launch.kernel.arg_names),
        constants=tuple(sorted(constants.items())),
        divisible=tuple(divisible),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
        tile=started.tile,
    )
