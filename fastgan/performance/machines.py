"""What a budget presumes of a GPU machine: datasheet numbers, assumptions, and what was measured.

Datasheets: NVIDIA A100 80GB SXM, H100 SXM, H200 SXM; bfloat16 without sparsity, float32 without
tensor cores. `measured_rates` reads what tools/gpu_report.py left in benchmarks/results/.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.benchmark import Timer

from fastgan import config as cfg
from fastgan.common.distributed import World
from fastgan.common.errors import UserError
from fastgan.common.files import parse_object
from fastgan.performance.iteration import iteration_flop

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
GPUS_PER_NODE = 8
_LARGEST_FILE = 64 * 2**20


@dataclass(frozen=True)
class Machine:
    """A node of eight GPUs by its datasheet; rates per second and GPU."""

    name: str
    chip: str
    """The GPU's name as its driver says it."""
    bf16_flop: float
    fp32_flop: float
    bandwidth: float
    """Bytes read and written."""
    nvlink: float
    """Bytes to the other GPUs of the node, one direction."""


MACHINES = (
    Machine("A100", "NVIDIA A100-SXM4-80GB", 312e12, 19.5e12, 2.039e12, 300e9),
    Machine("H100", "NVIDIA H100 80GB HBM3", 989e12, 67e12, 3.35e12, 450e9),
    Machine("H200", "NVIDIA H200", 989e12, 67e12, 4.8e12, 450e9),
)


@dataclass(frozen=True)
class Assumption:
    """A number that a budget stands on, and where it comes from."""

    value: float
    unit: str
    source: str


Assumptions = dict[str, Assumption]
Measured = dict[str, tuple[str, dict[str, float]]]
"""Machine name -> (the file, what it says)."""

# Key of rates.json -> bounds outside of which a number is no measurement of such a GPU.
_MEASURABLE = {
    "copy_bandwidth": (1e11, 2e13),
    "matmul_rate": (1e13, 1e16),
    "float32_rate": (1e12, 1e15),
    "conv_forward_efficiency": (0.01, 1.2),
    "conv_dgrad_efficiency": (0.01, 1.2),
}


def assumptions(machine: Machine, measured: Measured) -> Assumptions:
    """All that a budget on `machine` presumes; measured numbers take the datasheet's place."""
    m, seen = machine, "assumed"
    found = {
        "matmul_rate": Assumption(m.bf16_flop, "bf16 FLOP/s", "datasheet"),
        "float32_rate": Assumption(m.fp32_flop, "FLOP/s without tensor cores", "datasheet"),
        "copy_bandwidth": Assumption(m.bandwidth, "B/s read + written", "datasheet"),
        "sustained_share": Assumption(0.8, "of the FLOP/s above, by a large product", seen),
        "conv_forward_efficiency": Assumption(0.55, "of a large product's rate", seen),
        "conv_dgrad_efficiency": Assumption(0.55, "of it, both gradients", seen),
        "floor_efficiency": Assumption(0.75, "of the FLOP/s above, in the floor", seen),
        "copy_share": Assumption(0.8, "of copy bandwidth, by norms and other passes", seen),
        "layer_seconds": Assumption(5e-6, "s at least, a layer in one direction", seen),
        "idle_share": Assumption(0.1, "of an iteration in which the GPU waits", seen),
        "node_bandwidth": Assumption(0.8 * m.nvlink, "B/s all-reduce: 80% of NVLink", seen),
        "network_bandwidth": Assumption(25e9, "B/s per GPU between nodes: 200 Gb/s", seen),
    }
    file, values = measured.get(machine.name, ("", {}))
    values = dict(values)
    best = max(values.get(f"conv_{d}_efficiency", 0.0) for d in ("forward", "dgrad"))
    if best > found["floor_efficiency"].value:
        values["floor_efficiency"] = best
    for key, value in values.items():
        found[key] = replace(found[key], value=value, source=f"measured, {file}")
    if "matmul_rate" in values:
        source = "they are such a product's"
        found["sustained_share"] = replace(found["sustained_share"], value=1.0, source=source)
    return found


def measured_rates(folder: Path = RESULTS) -> Measured:
    """The rates of the machines known here from `folder`/*/rates.json, later names win.

    Dry runs and other chips are passed over. UserError where a file cannot be read or a number is
    none of such a GPU.
    """
    found: Measured = {}
    for path in sorted(folder.glob("*/rates.json")):
        try:
            if path.stat().st_size > _LARGEST_FILE:
                raise ValueError("larger than 64 MiB")
            content = parse_object(path.read_bytes())
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read the rates ({error}), {path}, a file of tools/gpu_report.py expected"
            ) from error
        names = [m.name for m in MACHINES if m.chip == content.get("chip")]
        if names and not content.get("dry_run"):
            found[names[0]] = f"{path.parent.name}/{path.name}", _checked(content, path)
    return found


def _checked(content: dict[str, Any], path: Path) -> dict[str, float]:
    """The known keys that are present, each a finite number within its bounds."""
    found: dict[str, float] = {}
    by_arithmetic = content.get("matmul_rates")
    if isinstance(by_arithmetic, dict):
        content = content | {"float32_rate": by_arithmetic.get("fp32")}
    for key, (low, high) in _MEASURABLE.items():
        value = content.get(key)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or not low <= value <= high:
            raise UserError(f"{key} is {value!r}, {path}, {low:g} to {high:g} expected")
        found[key] = float(value)
    return found


def full_speed(
    config: cfg.TrainConfig, architecture: Mapping[str, Any], world: World
) -> float | None:
    """Images per second at which every GPU would compute at its datasheet's bf16 rate.

    Divides a measured speed into its MFU, of all processes together. None on a CPU and on GPUs
    whose peak is not in `MACHINES`.
    """
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device)
    peaks = [machine.bf16_flop for machine in MACHINES if machine.chip == name]
    return world.size * peaks[0] / iteration_flop(config, architecture) if peaks else None


def product_rate(device: torch.device, dtype: torch.dtype, side: int = 8192) -> list[float]:
    """FLOP per second of a product of two side x side matrices of random numbers, in blocks of
    calls; float32 as the process's TF32 setting says."""
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    timer = Timer("torch.mm(a, b, out=c)", globals={"a": a, "b": b, "c": torch.empty_like(a)})
    return [2 * side**3 / t for t in timer.blocked_autorange(min_run_time=0.5).times]
