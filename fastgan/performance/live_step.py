"""A training step of any experiment to measure: random weights, nothing to download.

Speed, memory and the order of kernels do not depend on the numbers in the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastgan import config as cfg
from fastgan.checkpoint.network_file import load_network_file
from fastgan.common.distributed import World
from fastgan.common.errors import UserError
from fastgan.data import ImageDataset
from fastgan.launch import build, checks
from fastgan.launch.cli import compose
from fastgan.launch.engine import make_step, prepare_process
from fastgan.models.build import PUBLISHED_NETWORKS
from fastgan.training.state import StepResult
from fastgan.training.step import PlainStep

# Where `data.path` says so, the images are noise that no file holds.
NOISE = "noise"


class NoiseImages:
    """A batch of uniform noise, in the shape and with as many classes as a network wants."""

    def __init__(self, architecture: Mapping[str, Any], batch: int) -> None:
        self.name = NOISE
        self.resolution = architecture.get("img_resolution", 32)
        self.channels = architecture.get("img_channels", 3)
        self.label_dim = architecture.get("label_dim") or 0
        draw = np.random.default_rng(0)
        shape = (batch, self.channels, self.resolution, self.resolution)
        self._images = draw.integers(256, size=shape, dtype=np.uint8)
        self.labels = draw.integers(self.label_dim, size=batch) if self.label_dim else None

    def __len__(self) -> int:
        return len(self._images)

    def images(self, indices: np.ndarray) -> np.ndarray:
        return self._images[indices]

    def provenance(self) -> dict[str, Any]:
        return {"name": self.name}


@dataclass
class LiveStep:
    """A step with its data: `run(k)` is iteration k as training would do it.

    Training enters `draw` and leaves it in the end; noise needs neither.
    """

    config: cfg.TrainConfig
    step: PlainStep
    draw: build.Batches

    def run(self, iteration: int) -> StepResult:
        reals, labels = self.draw(iteration)
        return self.step.run(reals, labels, iteration)


def measured_config(experiment: str, overrides: list[str]) -> cfg.TrainConfig:
    """configs/experiment/NAME.yaml with random weights and no files; `overrides` come last, also
    `data.path` of a dataset in place of noise.

    A published experiment takes its published network, the others need `init.network` (or their
    own `init.path`) among the overrides. UserError as `python -m fastgan.train` would say it.
    """
    base = [f"experiment={experiment}", f"data.path={NOISE}", "run_dir=unused"]
    dataset = _dataset_of(experiment)
    if dataset in PUBLISHED_NETWORKS:
        base.append("init.path=null")
    config: cfg.TrainConfig = compose("train", cfg.TrainConfig, [*base, *overrides])
    if config.init.path is None and config.init.network is None:
        if dataset not in PUBLISHED_NETWORKS:
            raise UserError(
                f"experiment={experiment} has no published network and init.path is null, "
                "init.network={model_type: ..., model_channels: ...} would be one"
            )
        config.init.network = dict(PUBLISHED_NETWORKS[dataset])
    if not any(o.startswith("discriminator.weights") for o in overrides):
        config.discriminator.weights = dict.fromkeys(config.discriminator.backbones, "random")
    return config


def live_step(config: cfg.TrainConfig, device: torch.device) -> LiveStep:
    """Builds the step of `config` on `device` in this process alone."""
    world = World(rank=0, local_rank=0, size=1, device=device)
    prepare_process(config, device)
    data: ImageDataset = (
        build.dataset(config.data)
        if config.data.path != NOISE
        else NoiseImages(architecture_of(config), config.batch)
    )
    network = build.generator(config, data).network
    discriminator = build.discriminator(config, network, data)
    build.prepare_generator(config, network)
    step = make_step(config, world, network, discriminator)
    return LiveStep(config, step, build.batches(data, config, network.label_dim, world))


def architecture_of(config: cfg.TrainConfig) -> Mapping[str, Any]:
    """The generator's, of init.path or init.network. UserError: no such file, or none of ours."""
    path = config.init.path
    if path is None:
        return config.init.network
    return load_network_file(checks.existing(path, "init.path")).config


# A small network, for tests and dry runs. 64 channels at the bottom: less gives an ADM block no
# attention head.
_SMALL = {
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "img_resolution": 16,
    "img_channels": 3,
}


def tiny_overrides(experiment: str) -> list[str]:
    """Overrides for `measured_config`: a small network of the experiment's own kind (UNet type,
    embedding, encoder, classes), one light backbone and a batch of 2; later overrides win.

    An experiment whose network ships with the package keeps it, and its discriminator.
    """
    published = PUBLISHED_NETWORKS.get(_dataset_of(experiment))
    if published is None:
        return ["batch=2"]
    entries = ", ".join(f"{key}: {value}" for key, value in {**published, **_SMALL}.items())
    network = f"init.network={{{entries}}}"
    return ["batch=2", "discriminator.backbones=[mobilenetv2_050]", "init.path=null", network]


def _dataset_of(experiment: str) -> str:
    return experiment.removesuffix("_f").removesuffix("_d2o")
