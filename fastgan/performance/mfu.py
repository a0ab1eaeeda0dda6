"""Model FLOP utilisation: the share of a GPU's peak rate that the method's own arithmetic takes."""

from collections.abc import Mapping
from typing import Any

import torch

from fastgan import config as cfg
from fastgan.distributed import World
from fastgan.performance.iteration import iteration_flop
from fastgan.performance.machines import MACHINES


def full_speed(
    config: cfg.TrainConfig, architecture: Mapping[str, Any], world: World
) -> float | None:
    """Images per second at which every GPU would compute at its datasheet's bf16 rate.

    Divides a measured speed into its MFU, of all processes together. None on a CPU and on GPUs
    whose peak is not in `fastgan.performance.machines`.
    """
    if world.device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(world.device)
    peaks = [machine.bf16_flop for machine in MACHINES if machine.chip == name]
    if not peaks:
        return None
    return world.size * peaks[0] / iteration_flop(config, architecture)
