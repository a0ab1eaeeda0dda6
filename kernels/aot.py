"""Compiles every kernel for GPUs that are not there: python -m kernels.aot

Calls each op's launcher on tensors without memory, records what it would start on a GPU
(`runtime.recording`) and compiles exactly these launches for sm_80 (A100) and sm_90 (H100, H200).
The table tells what the compiler made of them; with --check what is not good enough is an error.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import Any, NoReturn

import torch
from torch import Tensor

from kernels import frozen_block, runtime, sass
from kernels.norm_silu_conv_sums import Affine
from kernels.norm_silu_conv_triton import norm_silu_conv_backward, norm_silu_conv_forward
from kernels.norm_silu_triton import group_norm_silu_backward, group_norm_silu_forward
from kernels.resample import resample2x_launch
from kernels.resize_normalize import resize_normalize_adjoint, resize_normalize_forward
from kernels.runtime import Launch
from kernels.shapes import NETWORKS, Block, Network, Norm

ARCHITECTURES = ("sm_80", "sm_90")
# Shared memory that one program may use, in bytes: 163 KiB on A100, 227 KiB on H100.
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448}
DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
# A shape, and what an op starts there.
Started = tuple[tuple[int, ...], Launch]
WIDE_LOAD = r"ld\.global\S*\.v(4\.b32|2\.b64)|cp\.async\.c[ag]\.shared\.global [^;]*, 0x10,"
TENSOR_CORE = {"sm_80": "mma", "sm_90": "wgmma"}
# Rows of pixels that are no multiple of 16 bytes; groups of a workspace, some kilobytes.
SUMS = "norm_silu_conv_sums"
NARROW = ("resize_normalize.forward", f"{SUMS}.statistics", f"{SUMS}.gradients")


@dataclass(frozen=True)
class Row:
    """What the compiler made of one launch, and an estimate of what a multiprocessor does with it.

    wide_loads: whether it reads 16 bytes at a time; occupancy: warps that a multiprocessor holds,
    of the 64 that it could; main_loop: of a program that uses tensor cores.
    """

    kernel: str
    arch: str
    shape: list[int]
    dtype: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    tensor_core: str | None
    seconds: float
    wide_loads: bool
    occupancy: float
    main_loop: sass.Loop | None


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

    @property
    def key(self) -> tuple[Any, ...]:
        """Builds of one key are one program."""
        return (
            self.module,
            self.kernel,
            self.types,
            self.constants,
            self.divisible,
            self.num_warps,
            self.num_stages,
        )

    @property
    def label(self) -> str:
        """`resize_normalize.adjoint`: where it is, and which kernel there."""
        module = self.module.removesuffix("_triton")
        name = self.kernel.strip("_").removesuffix("kernel").strip("_")
        return f"{module}.{name}" if name not in ("", module) else module


def builds(dtypes: Iterable[torch.dtype]) -> list[Build]:
    """Every launch of the published networks' training step, each program once."""
    return _once(dtypes, _launches)


def convolution_builds(dtypes: Iterable[torch.dtype], arch: str) -> list[Build]:
    """norm_silu_conv at the networks' convolutions, in 16 bits, with the tiles of `arch`."""
    capability = int(arch[-2]), int(arch[-1])
    return _once([d for d in dtypes if d.itemsize == 2], lambda d: _convolutions(d, capability))


def _once(
    dtypes: Iterable[torch.dtype], launches: Callable[[torch.dtype], Iterable[Started]]
) -> list[Build]:
    found: dict[tuple[Any, ...], Build] = {}
    for dtype in dtypes:
        for shape, launch in launches(dtype):
            build = _specialised(launch, shape, DTYPES[dtype])
            found.setdefault(build.key, build)
    return list(found.values())


def _convolutions(dtype: torch.dtype, capability: tuple[int, int]) -> Iterator[Started]:
    """A block's first convolution, its second with embedding and residual; 1 x 1 as the first."""
    for network in NETWORKS:
        for cin, cout, size, kernel in network.convolutions():
            x, weight = _image(network.batch, cin, size, dtype), _image(cout, cin, kernel, dtype)
            residual = _image(network.batch, cout, size, dtype)
            yield from _of_convolution(x, weight, residual, "", capability)
            if cin == cout and kernel == 3:
                yield from _of_convolution(x, weight, residual, network.embedding, capability)


def _of_convolution(
    x: Tensor, weight: Tensor, residual: Tensor, embedding: str, capability: tuple[int, int]
) -> Iterator[Started]:
    """Forward with the next norm's statistics, and backward."""
    n, cin, cout = len(x), x.shape[1], len(weight)
    narrow, bias = torch.empty(cin, device="meta"), weight.new_empty(cout)
    rows, names = x.new_empty(n, cin), embedding.split()
    per_sample = (rows if name in names else None for name in ("pre_shift", "scale", "shift"))
    after = Affine(narrow, narrow, *per_sample)
    added, gain = (residual, 0.5) if names else (None, 1.0)
    wanted = frozenset({"x", "affine", *names})
    with runtime.recording() as launches:
        _, found, _ = norm_silu_conv_forward(
            *(x, 32, weight, bias, 1e-5, after, added, gain, 32, 1e-5), arch=capability
        )
        norm_silu_conv_backward(
            *(residual, x, found, 32, weight, after, gain, wanted), arch=capability
        )
    yield from (((n, cin, cout, x.shape[2], weight.shape[2]), launch) for launch in launches)


def _launches(dtype: torch.dtype) -> Iterator[Started]:
    for network in NETWORKS:
        n = network.batch
        for block in network.blocks:
            yield from _of_block(network, block, dtype)
        for norm in network.norms():
            yield from _of_norm(_image(n, norm.channels, norm.size, dtype), norm)
        for channels, size, direction in network.resamplings():
            yield from _of_resampling(_image(n, channels, size, dtype), network, direction)
        yield from _of_resize(_image(n, 3, network.resolution, torch.float32), dtype)


def _of_block(network: Network, block: Block, dtype: torch.dtype) -> Iterator[Started]:
    """What the frozen block itself starts: its pre_shift is float32, residuals enter its norms."""
    n, cin, cout = network.batch, block.cin, block.cout
    x = _image(n, cin, block.size, dtype)
    rows = torch.empty(n, cout * (1 + network.adm), dtype=dtype, device="meta")
    scale, shift = rows.chunk(2, dim=1) if network.adm else (None, None)
    embedding = (None if network.adm else rows, scale, shift)
    wide, narrow = (torch.empty(c, device="meta") for c in (cin, cout))
    bias = narrow.to(dtype)
    skip = (_image(cout, cin, 1, dtype), bias) if network.projects(block) else (None, None)
    taps = [float(tap) for tap in network.filter]
    arguments: list[Any] = [x, wide, wide, narrow, narrow, *embedding, *skip]
    arguments += [_image(cout, cin, 3, dtype), bias, _image(cout, cout, 3, dtype), bias]
    arguments += [32, 32, 1e-5, 1e-5, block.resample, taps, 0.5]
    inputs = frozen_block._Inputs(*arguments)
    wanted = f"x affine0 affine1 {network.embedding}"
    with runtime.recording() as launches:
        y, h, statistics0, statistics1 = frozen_block._forward(inputs)
        frozen_block._backward(y, inputs, h, statistics0, statistics1, wanted)
    yield from ((tuple(launch.args[0].shape), launch) for launch in launches)


def _of_norm(x: Tensor, norm: Norm) -> Iterator[Started]:
    n, channels = x.shape[:2]
    weight = torch.empty(channels, device="meta")
    rows = torch.empty(n, channels, dtype=x.dtype, device="meta")
    names = norm.embedding.split()
    pre_shift, scale, shift = (
        rows if name in names else None for name in ("pre_shift", "scale", "shift")
    )
    statistics = torch.empty(2, n, norm.groups, device="meta")
    wanted = frozenset({"x", "affine", *names})
    with runtime.recording() as launches:
        group_norm_silu_forward(
            x, norm.groups, weight, weight, 1e-5, pre_shift, scale, shift, norm.act
        )
        group_norm_silu_backward(
            x,
            x,
            statistics,
            norm.groups,
            weight,
            weight,
            pre_shift,
            scale,
            shift,
            norm.act,
            wanted,
        )
    yield from ((tuple(x.shape), launch) for launch in launches)


def _of_resampling(x: Tensor, network: Network, direction: str) -> Iterator[Started]:
    up = direction == "up"
    with runtime.recording() as launches:
        y = resample2x_launch(x, network.filter, up, 1.0, None, None, 1.0)
        resample2x_launch(y, network.filter, not up, 1.0, None, None, 1.0)
    yield from ((tuple(x.shape), launch) for launch in launches)


def _of_resize(x: Tensor, dtype: torch.dtype) -> Iterator[Started]:
    scale = [0.5] * 3
    with runtime.recording() as launches:
        y = resize_normalize_forward(x, scale, scale, 224, dtype)
        resize_normalize_adjoint(y, scale, 3, x.shape[2], x.shape[3], torch.float32)
    yield from ((tuple(x.shape), launch) for launch in launches)


def _image(n: int, c: int, size: int, dtype: torch.dtype) -> Tensor:
    x = torch.empty(n, c, size, size, dtype=dtype, device="meta")
    return x.to(memory_format=torch.channels_last)


def _specialised(launch: Launch, shape: tuple[int, ...], dtype: str) -> Build:
    """Types and constants as Triton's JIT derives them from run-time arguments."""
    types: dict[str, str] = {}
    constants, divisible = dict(launch.constants), []
    for name, value in zip(launch.kernel.arg_names, launch.args, strict=False):
        if value is None or (type(value) is int and value == 1):
            constants[name] = value
        elif isinstance(value, Tensor):
            types[name] = f"*{DTYPES[value.dtype]}"
            divisible.append(name)
        elif isinstance(value, float):
            types[name] = "fp32"
        else:
            types[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible += [name] if value % 16 == 0 else []
    signature = [(name, types.get(name, "constexpr")) for name in launch.kernel.arg_names]
    return Build(
        module=launch.kernel.fn.__module__.rpartition(".")[2],
        kernel=launch.kernel.fn.__name__,
        shape=shape,
        dtype=dtype,
        types=tuple(signature),
        constants=tuple(sorted(constants.items())),
        divisible=tuple(divisible),
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def compile_build(job: tuple[Build, str]) -> Row:
    """One build for one architecture (runs in a worker process)."""
    import importlib

    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    build, arch = job
    function = getattr(importlib.import_module(f"kernels.{build.module}"), build.kernel)
    position = {name: (i,) for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        dict(build.types),
        {position[name]: value for name, value in build.constants},
        {position[name]: [["tt.divisibility", 16]] for name in build.divisible},
    )
    start = time.perf_counter()
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options = {"num_warps": build.num_warps}
    if build.num_stages is not None:
        options["num_stages"] = build.num_stages
    compiled = triton.compile(source, target=target, options=options)
    seconds = time.perf_counter() - start
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    registers, stack, static = sass.resources(cubin)
    shared = max(static, compiled.metadata.shared)
    tensor_core = "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else None
    loop = sass.main_loop(arch, sass.tool("cuobjdump", cubin, "-sass")) if tensor_core else None
    return Row(
        kernel=build.label,
        arch=arch,
        shape=list(build.shape),
        dtype=build.dtype,
        registers=registers,
        spill_bytes=stack,
        shared_bytes=shared,
        tensor_core=tensor_core,
        seconds=round(seconds, 2),
        wide_loads=bool(re.search(WIDE_LOAD, ptx)),
        occupancy=round(sass.occupancy(arch, registers, shared, build.num_warps), 3),
        main_loop=loop,
    )


def problems(rows: Iterable[Row]) -> list[str]:
    """What would make a kernel slow or unable to start, a line each."""
    found = []
    for row in rows:
        what = f"{row.kernel} for {row.arch}, {row.dtype} {row.shape}"
        if row.spill_bytes:
            found.append(f"{what}: {row.spill_bytes} bytes of registers spilled")
        if row.shared_bytes > SHARED_BYTES[row.arch]:
            found.append(f"{what}: {row.shared_bytes} bytes of shared memory")
        if not row.wide_loads and row.kernel not in NARROW:
            found.append(f"{what}: no 16-byte loads")
        tensor_core = TENSOR_CORE[row.arch] if row.dtype != "fp32" else None
        if "convolution" in row.kernel and row.tensor_core != tensor_core:
            found.append(f"{what}: {row.tensor_core} in place of {tensor_core} instructions")
    return found


class Parser(argparse.ArgumentParser):
    """Errors in one line, exit status 1."""

    def error(self, message: str) -> NoReturn:
        print(f"error: {message}, see {self.prog} -h", file=sys.stderr)
        raise SystemExit(1)


def main() -> int:
    parser = Parser(prog="python -m kernels.aot", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a JSON list on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 with the problems found")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES.values(), default=list(DTYPES.values())
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs is {options.jobs}, 1 or more would do")
    if not runtime.HAS_TRITON or runtime.INTERPRETED:
        why = "TRITON_INTERPRET=1 is set" if runtime.HAS_TRITON else "triton is not installed"
        print(f"error: nothing to compile with, {why}, triton without it would do", file=sys.stderr)
        return 1
    dtypes = [dtype for dtype, name in DTYPES.items() if name in options.dtype]
    every, jobs = builds(dtypes), []
    for arch in options.arch:
        for build in (*every, *convolution_builds(dtypes, arch)):
            jobs += [(build, arch)] if options.kernel in build.label else []
    if not jobs:
        parser.error(f"no kernel's name contains {options.kernel!r}, in --kernel")
    rows = []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(compile_build, jobs, chunksize=4):
            rows.append(row)
            if len(rows) % 100 == 0 or len(rows) == len(jobs):
                print(f"{len(rows)} of {len(jobs)} compiled", file=sys.stderr, flush=True)
    if options.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif not options.check:
        _print_table(rows)
    wrong = problems(rows) if options.check else []
    for line in wrong:
        print(f"error: {line}", file=sys.stderr)
    return 1 if wrong else 0


def _print_table(rows: list[Row]) -> None:
    print(
        "kernel                                arch   dtype shape                    regs spill  "
        "shared wide  warps tensor special load s"
    )
    for r in rows:
        loop = r.main_loop
        held = f"{loop.tensor:6} {loop.special:7} {loop.load:4.2f}" if loop else " " * 19
        print(
            f"{r.kernel:37} {r.arch:6} {r.dtype:5} {r.shape!s:24} {r.registers:4} "
            f"{r.spill_bytes:5} {r.shared_bytes:7} {'yes' if r.wide_loads else 'no':4} "
            f"{r.occupancy:6.1%} {held} {r.seconds}"
        )


if __name__ == "__main__":
    raise SystemExit(main())
