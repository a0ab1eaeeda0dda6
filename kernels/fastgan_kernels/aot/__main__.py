"""Compiles every kernel for GPUs that are not there: python -m fastgan_kernels.aot

Compiles for sm_80 (A100) and sm_90 (H100, H200) exactly what the ops would start there.
The table tells what the compiler made of them; with --check what is not good enough is an error.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import NoReturn

from fastgan_kernels import runtime
from fastgan_kernels.aot import sass
from fastgan_kernels.aot.builds import DTYPES, Build, builds, convolution_builds

ARCHITECTURES = ("sm_80", "sm_90")
# Shared memory that one program may use, in bytes: 163 KiB on A100, 227 KiB on H100.
SHARED_BYTES = {"sm_80": 166_912, "sm_90": 232_448}
WIDE_LOAD = (
    r"ld\.global\S*\.v(4\.b32|2\.b64)|cp\.async\.c[ag]\.shared\.global [^;]*, 0x10,"
    r"|cp\.async\.bulk\.tensor"
)
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
    tile: str = ""
    """Of a convolution: the plan that it was built for."""


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
        tile=build.tile,
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
    parser = Parser(prog="python -m fastgan_kernels.aot", description=__doc__)
    parser.add_argument("--json", action="store_true", help="a JSON list on stdout")
    parser.add_argument("--check", action="store_true", help="exit 1 with the problems found")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES.values(), default=list(DTYPES.values())
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--plans", action="store_true", help="norm_silu_conv at every shape by every plan"
    )
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
        for build in (*every, *convolution_builds(dtypes, arch, every=options.plans)):
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
        "shared wide  warps tensor special load issue s    plan"
    )
    for r in rows:
        loop = r.main_loop
        held = " " * 25
        if loop:
            held = f"{loop.tensor:6} {loop.special:7} {loop.load:4.2f} {loop.issue:5.2f}"
        print(
            f"{r.kernel:37} {r.arch:6} {r.dtype:5} {r.shape!s:24} {r.registers:4} "
            f"{r.spill_bytes:5} {r.shared_bytes:7} {'yes' if r.wide_loads else 'no':4} "
            f"{r.occupancy:6.1%} {held} {r.seconds:4.1f} {r.tile}".rstrip()
        )


if __name__ == "__main__":
    raise SystemExit(main())
