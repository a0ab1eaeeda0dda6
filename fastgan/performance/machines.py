"""What a budget presumes of a GPU machine: datasheet numbers and assumptions.

Datasheets: NVIDIA A100 80GB SXM, H100 SXM, H200 SXM; bfloat16 without sparsity, float32 without
tensor cores.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastgan import config as cfg
from fastgan.common.distributed import World
from fastgan.performance.iteration import iteration_flop

GPUS_PER_NODE = 8


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


class Assumption(NamedTuple):
    """A number that a budget stands on, and where it comes from."""

    value: float
    unit: str
    source: str = "assumed"


def assumptions(m: Machine) -> dict[str, Assumption]:
    """All that a budget on this machine presumes."""
    return {
        "matmul_rate": Assumption(m.bf16_flop, "bf16 FLOP/s", "datasheet"),
        "float32_rate": Assumption(m.fp32_flop, "FLOP/s without tensor cores", "datasheet"),
        "copy_bandwidth": Assumption(m.bandwidth, "B/s read + written", "datasheet"),
        "sustained_share": Assumption(0.8, "of the FLOP/s above, by a large product"),
        "conv_forward_efficiency": Assumption(0.55, "of a large product's rate"),
        "conv_dgrad_efficiency": Assumption(0.55, "of it, both gradients"),
        "floor_efficiency": Assumption(0.75, "of the FLOP/s above, in the floor"),
        "copy_share": Assumption(0.8, "of copy bandwidth, by norms and other passes"),
        "layer_seconds": Assumption(5e-6, "s at least, a layer in one direction"),
        "idle_share": Assumption(0.1, "of an iteration in which the GPU waits"),
        "node_bandwidth": Assumption(0.8 * m.nvlink, "B/s all-reduce: 80% of NVLink"),
        "network_bandwidth": Assumption(25e9, "B/s per GPU between nodes: 200 Gb/s"),
    }


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
