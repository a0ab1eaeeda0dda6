"""A static estimate of a compiled program: how many run side by side, what its main loop issues.

Registers and shared memory bound how many warps a multiprocessor holds. In the disassembly the loop
with the most tensor core instructions is looked for, and its special function instructions (MUFU:
exponentials, reciprocals) and all that its warps issue are weighed against them by the cycles that
a multiprocessor needs for each. Latencies and memory are left out: bounds, not a prediction. The
loop of a persistent program has the epilogue of every tile in it and counts it at every turn.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

# Registers, bytes of shared memory and warps of a multiprocessor: the CUDA C++ Programming Guide's
# table of compute capabilities; a program reserves 1 KiB of the shared memory.
REGISTERS, WARPS, RESERVED = 65_536, 64, 1024
SHARED = {"sm_80": 167_936, "sm_90": 233_472}
# Multiply-adds a cycle of 16-bit factors (312 TFLOP/s of 108 multiprocessors at 1.41 GHz, 989 of
# 132 at 1.83) and special functions a cycle (the guide's table of throughputs).
MULTIPLY_ADDS = {"sm_80": 1024, "sm_90": 2048}
SPECIAL = 16
# Instructions a cycle, one of each scheduler's.
ISSUED = 4


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


def tool(name: str, cubin: bytes, *options: str) -> str:
    """What a tool that comes with Triton says about a program."""
    import triton

    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(folder / name), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> tuple[int, int, int]:
    """Registers a thread, bytes of stack and local memory a thread, bytes of shared memory."""
    text = tool("cuobjdump", cubin, "--dump-resource-usage")
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"], usage["SHARED"]


def occupancy(arch: str, registers: int, shared_bytes: int, warps: int) -> float:
    """Warps that a multiprocessor holds at a time, of the 64 that it could."""
    # Registers are given to a warp in units of 256.
    of_registers = REGISTERS // (warps * -(-registers * 32 // 256) * 256)
    of_shared = SHARED[arch] // (shared_bytes + RESERVED)
    return min(of_registers, of_shared, WARPS // warps, 32) * warps / WARPS


def main_loop(arch: str, disassembly: str) -> Loop | None:
    """Of `cuobjdump -sass`; None where no loop multiplies on tensor cores."""
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
