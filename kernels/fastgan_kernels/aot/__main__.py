"""Compiles every kernel for GPUs that are not there: python -m fastgan_kernels.aot

Compiles for sm_80 (A100) and sm_90 (H100, H200) exactly what the ops would start there.
The table tells what the compiler made of them; with --check what is not good enough is an error.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import NoReturn

from fastgan_kernels import runtime
from fastgan_kernels.aot.builds import builds, convolution_builds
from fastgan_kernels.aot.compiler import RESERVED, SHARED, Row, compile_build
from fastgan_kernels.norm_silu_conv.plans import SHORT

TENSOR_CORE = {"sm_80": "mma", "sm_90": "wgmma"}
# Rows of pixels that are no multiple of 16 bytes; groups of a workspace, some kilobytes.
NARROW = ("resize_normalize.forward", "norm_silu_conv.statistics", "norm_silu_conv.gradients")


def problems(rows: Iterable[Row]) -> list[str]:
    """What would make a kernel slow or unable to start, a line each."""
    found = []
    for row in rows:
        what = f"{row.kernel} for {row.arch}, {row.dtype} {row.shape}"
        if row.spill_bytes:
            found.append(f"{what}: {row.spill_bytes} bytes of registers spilled")
        if row.shared_bytes > SHARED[row.arch] - RESERVED:
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
    parser.add_argument("--arch", nargs="+", choices=TENSOR_CORE, default=list(TENSOR_CORE))
    parser.add_argument("--kernel", default="", help="only kernels whose name contains this")
    names = list(SHORT.values())
    parser.add_argument("--dtype", nargs="+", choices=names, default=names)
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
    dtypes = [dtype for dtype, name in SHORT.items() if name in options.dtype]
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
