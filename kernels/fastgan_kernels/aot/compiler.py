"""One program compiled for a GPU that is not there, and what its disassembly says of its speed.

Registers and shared memory bound how many warps a multiprocessor holds. In the disassembly the loop
with the most tensor core instructions is looked for, and its special function instructions (MUFU:
exponentials, reciprocals) and all that its warps issue are weighed against them by the cycles that
a multiprocessor needs for each. Latencies and memory are left out: bounds, not a prediction.
"""

import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from fastgan_kernels.aot.builds import Build

# Registers, bytes of shared memory and warps of a multiprocessor: the CUDA C++ Programming Guide's
# table of compute capabilities; a program reserves 1 KiB of the shared memory.
REGISTERS, WARPS, RESERVED = 65_536, 64, 1024
SHARED = {"sm_80": 167_936, "sm_90": 233_472}
# Multiply-adds a cycle of 16-bit factors (312 TFLOP/s of 108 multiprocessors at 1.41 GHz, 989 of
# 132 at 1.83); special functions a cycle (the guide's table of throughputs); instructions a cycle.
MULTIPLY_ADDS = {"sm_80": 1024, "sm_90": 2048}
SPECIAL, ISSUED = 16, 4
WIDE_LOAD = (
    r"ld\.global\S*\.v(4\.b32|2\.b64)|cp\.async\.c[ag]\.shared\.global [^;]*, 0x10,"
    r"|cp\.async\.bulk\.tensor"
)


@dataclass(frozen=True)
class Loop:
    """Instructions of one turn of the main loop, as one warp meets them.

    load and issue: cycles of the special function units, and of the schedulers, for each cycle of
    the tensor cores.
    """

    tensor: int
    special: int
    load: float
    instructions: int
    issue: float


@dataclass(frozen=True)
class Row:
    """What the compiler made of one launch, and an estimate of what a multiprocessor does with it.

    wide_loads: whether it reads 16 bytes at a time; occupancy: warps that a multiprocessor holds,
    of the 64 that it could; main_loop: of a program that uses tensor cores; tile: the plan that a
    convolution was built for.
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
    main_loop: Loop | None
    tile: str = ""


def compile_build(job: tuple[Build, str]) -> Row:
    """One build for one architecture (runs in a worker process)."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    build, arch = job
    function = getattr(import_module(build.module), build.kernel)
    position = {name: (i,) for i, name in enumerate(function.arg_names)}
    source = ASTSource(
        function,
        dict(build.types),
        {position[name]: value for name, value in build.constants},
        {position[name]: [["tt.divisibility", 16]] for name in build.divisible},
    )
    options = {"num_warps": build.num_warps}
    if build.num_stages is not None:
        options["num_stages"] = build.num_stages
    start = time.perf_counter()
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options=options)
    seconds = time.perf_counter() - start
    ptx, cubin = compiled.asm["ptx"], compiled.asm["cubin"]
    usage = dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", _cuobjdump(cubin, "-res-usage")))
    registers, shared = int(usage["REG"]), max(int(usage["SHARED"]), compiled.metadata.shared)
    tensor_core = "wgmma" if "wgmma" in ptx else "mma" if "mma.sync" in ptx else None
    return Row(
        kernel=build.label,
        arch=arch,
        shape=list(build.shape),
        dtype=build.dtype,
        registers=registers,
        spill_bytes=int(usage["STACK"]) + int(usage["LOCAL"]),
        shared_bytes=shared,
        tensor_core=tensor_core,
        seconds=round(seconds, 2),
        wide_loads=bool(re.search(WIDE_LOAD, ptx)),
        occupancy=round(occupancy(arch, registers, shared, build.num_warps), 3),
        main_loop=main_loop(arch, _cuobjdump(cubin, "-sass")) if tensor_core else None,
        tile=build.tile,
    )


def _cuobjdump(cubin: bytes, option: str) -> str:
    """What the tool that comes with Triton says about a program."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def occupancy(arch: str, registers: int, shared_bytes: int, warps: int) -> float:
    """Warps that a multiprocessor holds at a time, of the 64 that it could."""
    # Registers are given to a warp in units of 256.
    of_registers = REGISTERS // (warps * -(-registers * 32 // 256) * 256)
    of_shared = SHARED[arch] // (shared_bytes + RESERVED)
    return min(of_registers, of_shared, WARPS // warps, 32) * warps / WARPS


def main_loop(arch: str, disassembly: str) -> Loop | None:
    """Of `cuobjdump -sass`; None where there is no loop."""
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d\s+)?([A-Z][\w.]+)([^;]*);", disassembly)
    code = [(int(address, 16), name, rest) for address, name, rest in lines]
    found = []
    for address, name, rest in code:
        target = re.search(r"0x([0-9a-f]+)", rest)
        if name.startswith("BRA") and target and int(target[1], 16) <= address:
            body = [n for a, n, _ in code if int(target[1], 16) <= a <= address]
            found.append(_loop(arch, body))
    return max(found, key=lambda loop: (loop.tensor, -loop.instructions), default=None)


def _loop(arch: str, names: list[str]) -> Loop:
    special = sum(name.startswith("MUFU") for name in names)
    tensor = [name for name in names if name.startswith(("HMMA", "HGMMA"))]
    # HMMA.16816 is a warp's; HGMMA.64x128x16, of four warps, is met by each of them.
    cycles = sum(_multiply_adds(name) for name in tensor) / MULTIPLY_ADDS[arch]
    load, issue = special * 32 / SPECIAL, len(names) / ISSUED
    if not cycles:
        return Loop(0, special, 0.0, len(names), 0.0)
    return Loop(len(tensor), special, load / cycles, len(names), issue / cycles)


def _multiply_adds(name: str) -> float:
    """One warp's share."""
    if wide := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", name):
        m, n, k = map(int, wide.groups())
        return m * n * k / 4
    return 16 * 8 * {"HMMA.16816": 16, "HMMA.1688": 8}[".".join(name.split(".")[:2])]
