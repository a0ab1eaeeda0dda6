"""From a configuration to objects: the one place that knows both."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan import config as cfg
from fastgan.checkpoint.network_file import (
    NetworkFile,
    load_network_file,
    network_from_file,
    require_fit,
)
from fastgan.checkpoint.store import EMA, latest_checkpoint
from fastgan.common.distributed import World
from fastgan.common.errors import UserError
from fastgan.common.noise import batch_indices, seeded, seeded_latents
from fastgan.data import ImageDataset, open_dataset
from fastgan.data.batches import Prefetched, Resident
from fastgan.data.batches import choose as choose_resident
from fastgan.discriminator.base import Discriminator
from fastgan.discriminator.class_embedding import load_class_embedding
from fastgan.discriminator.diffusion_features import DiffusionDiscriminator
from fastgan.discriminator.projected import build_projected
from fastgan.evaluation.extractors import load_extractor
from fastgan.evaluation.features import FeatureExtractor
from fastgan.evaluation.frechet import Statistics
from fastgan.evaluation.protocol import dataset_statistics, load_reference
from fastgan.launch import checks
from fastgan.models import Precond, network_from_config
from fastgan.models.freeze import freeze
from fastgan.models.sampling import few_step, heun, to_uint8
from fastgan.models.unet_block import recompute_blocks


def dataset(config: cfg.DataConfig) -> ImageDataset:
    """The training images; UserError when the path or anything in it is wrong."""
    return open_dataset(config.path, max_images=config.max_images)


@dataclass(frozen=True)
class Model:
    """A network to train, what it is built from, and the file its weights came from."""

    network: Precond
    architecture: dict[str, Any]
    source: NetworkFile | None


def generator(config: cfg.TrainConfig, data: ImageDataset) -> Model:
    """The network to fine-tune, with the eps-shifted preconditioning and without dropout.

    UserError where it does not fit the data.
    """
    path, source = config.init.path, None
    if path is None:
        architecture = {**_image_shape(data), **config.init.network}
    else:
        source = load_network_file(checks.existing(path, "init.path"))
        require_fit(source.config, source.state, path)
        architecture = dict(source.config)
    architecture |= {"precond": "D2OPrecond", "dropout": 0.0}
    network = _fitting_network(architecture, data, path or "init.network", config.seed)
    if source is not None:
        network.load_state_dict(source.state)
    return Model(network, architecture, source)


def fresh_network(config: cfg.PretrainConfig, data: ImageDataset) -> Model:
    """A network with random weights for the data's image shape."""
    architecture = {"precond": "EDMPrecond", **_image_shape(data), **config.network}
    return Model(_fitting_network(architecture, data, "network", config.seed), architecture, None)


def check_fit(architecture: dict[str, Any], data: ImageDataset, where: str) -> None:
    """UserError where the network's images or labels are not the dataset's."""
    for key, found in (("img_resolution", data.resolution), ("img_channels", data.channels)):
        if architecture.get(key) != found:
            raise UserError(
                f"{key} {architecture.get(key)} of {where} does not fit dataset {data.name}, "
                f"whose images have {found}: a network or dataset of the same shape would"
            )
    labels = architecture.get("label_dim") or 0
    if labels and labels != data.label_dim:
        raise UserError(
            f"{where} is conditional on {labels} classes, dataset {data.name} has "
            f"{data.label_dim}: a dataset with {labels} classes would fit"
        )


def discriminator(config: cfg.TrainConfig, network: Precond, data: ImageDataset) -> Discriminator:
    """The discriminator of the configuration; call it before the generator trains or moves."""
    d = config.discriminator
    if d.kind is cfg.DiscriminatorKind.diffusion:
        encoder = network
        if d.network is not None:
            file = checks.existing(d.network, "discriminator.network")
            encoder = network_from_file(file)
            check_fit(load_network_file(file).config, data, d.network)
        return DiffusionDiscriminator(
            encoder,
            (data.channels, data.resolution, data.resolution),
            sigma=d.sigma,
            width=d.width,
            label_dim=network.label_dim,
            seed=config.seed,
            augment=tuple(d.augment),
        )
    embedding = None
    if d.class_embedding is not None and network.label_dim:
        path = checks.existing(d.class_embedding, "discriminator.class_embedding")
        embedding = load_class_embedding(path, network.label_dim)
    # Entries without a file stay behind where other backbones are chosen than a recipe's.
    unused = sorted(n for n, file in d.weights.items() if file is not None and n not in d.backbones)
    if unused:
        raise UserError(
            f"discriminator.weights.{unused[0]} belongs to no backbone of this run, "
            f"one of {', '.join(d.backbones)} would"
        )
    return build_projected(
        list(d.backbones),
        dict(d.weights),
        label_dim=network.label_dim,
        embedding=embedding,
        seed=config.seed,
        augment=list(d.augment),
    )


def prepare_generator(config: cfg.TrainConfig, network: Precond) -> None:
    """Freezes what does not train, and checkpoints; call it once the discriminator is built."""
    freeze(network, config.freeze.level)
    if config.generator.checkpoint:
        recompute_blocks(network)


class Batches:
    """iteration -> this process's real images in [-1, 1] and labels [n, label_dim] (None if 0).

    Entering it decodes what shall be resident; leaving it ends the threads. What an iteration gets
    does not depend on where the images lie.
    """

    def __init__(self, source: Resident | Prefetched, label_dim: int) -> None:
        self._source, self._label_dim = source, label_dim
        self.description = f"data: {source.description}"

    def __call__(self, iteration: int) -> tuple[Tensor, Tensor | None]:
        pixels, labels = self._source(iteration)
        if labels is not None:
            # Classes [n], or the dataset's own vectors.
            one_hot = F.one_hot(labels, self._label_dim) if labels.ndim == 1 else labels
            labels = one_hot.float()
        return pixels.float() / 127.5 - 1, labels

    def __enter__(self) -> "Batches":
        self._source.load()
        return self

    def __exit__(self, *exception: object) -> None:
        self._source.close()


def batches(data: ImageDataset, config: cfg.RunConfig, label_dim: int, world: World) -> Batches:
    """The training's batches, by `data.resident` and `data.workers`; nothing is decoded yet.

    UserError where `data.resident=true` and the device has not the memory.
    """
    c = config.data

    def indices(iteration: int) -> np.ndarray:
        return batch_indices(
            len(data),
            seed=config.seed,
            iteration=iteration,
            batch=config.batch,
            rank=world.rank,
            world_size=world.size,
        )

    resident = choose_resident(data, c.resident, world.device, world.size)
    kind = Resident if resident else Prefetched
    source = kind(data, indices, world.device, workers=c.workers, labelled=label_dim > 0)
    return Batches(source, label_dim)


def sample_fn(
    network: Precond,
    sampler: cfg.SamplerConfig,
    device: torch.device,
    *,
    one_class: int | None = None,
) -> Callable[[list[int]], Tensor]:
    """seeds -> uint8 images [n, C, H, W] as the papers evaluate: float32 UNet, float64 state."""
    assert sampler.kind in checks.SAMPLERS, sampler.kind
    size = network.model.img_resolution
    shape = (network.model.img_channels, size, size)

    @torch.no_grad()
    def sample(seeds: list[int]) -> Tensor:
        z, classes = seeded_latents(seeds, shape, network.label_dim)
        z, labels = z.to(device), None
        if classes is not None:
            drawn = classes if one_class is None else torch.full_like(classes, one_class)
            labels = F.one_hot(drawn, network.label_dim).float().to(device)
        if sampler.kind == "heun":
            return to_uint8(heun(network, z, labels, steps=sampler.steps))
        images = few_step(network, z, labels, steps=sampler.steps, mid_sigma=sampler.mid_sigma)
        return to_uint8(images)

    return sample


def find_network(path: str) -> Path:
    """A network file for `path`: itself, or the latest averaged network of a run directory."""
    found = checks.existing(path, "checkpoint")
    if found.is_file():
        return found
    for folder in (found, found / "checkpoints"):
        if (folder / EMA).is_file():
            return folder / EMA
        latest = latest_checkpoint(folder)
        if latest is not None:
            return latest / EMA
    raise UserError(
        f"checkpoint={path} holds no network, a .safetensors file or a run directory would"
    )


def saved_network(path: str, device: torch.device) -> tuple[Precond, Path]:
    """The network of a file or run directory in eval mode on `device`, and its file.

    UserError where a weight is not finite: every image would be noise or black.
    """
    file = find_network(path)
    network = network_from_file(file).eval().requires_grad_(False).to(device)
    for name, weight in network.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{name} is not finite, in {file}, finite weights would be right")
    return network, file


def extractor_and_reference(
    config: cfg.EvalConfig | cfg.EvaluateConfig,
    reference: str | ImageDataset,
    device: torch.device,
    *,
    progress: bool = False,
) -> tuple[FeatureExtractor, Statistics]:
    """The feature network and the statistics of what generated images are compared with."""
    assert config.extractor is not None
    load = partial(load_extractor, config.extractor, device=device, weights=config.weights)
    if isinstance(reference, str) and reference.endswith(".npz"):
        path, features = checks.existing(reference, "reference"), load()
        return features, load_reference(path, features, config.batch)
    data = open_dataset(reference) if isinstance(reference, str) else reference
    images = data.images(np.arange(len(data))) if config.extractor.startswith("pca") else None
    features = load(data=images)
    return features, dataset_statistics(data, features, config.batch, progress=progress)


def _image_shape(data: ImageDataset) -> dict[str, Any]:
    """What a fresh network takes from the data; it is conditional where its config says so."""
    return {"img_resolution": data.resolution, "img_channels": data.channels, "label_dim": 0}


def _fitting_network(
    architecture: dict[str, Any], data: ImageDataset, where: str, seed: int
) -> Precond:
    """The network of `architecture` with random weights; UserError where it does not fit."""
    check_fit(architecture, data, where)
    try:
        with seeded(seed):
            return network_from_config(architecture)
    except UserError:
        raise
    except Exception as error:  # arguments that do not fit each other fail anywhere
        raise UserError(
            f"no network can be built from {where} ({type(error).__name__}: {error}), "
            "arguments that fit each other would be right"
        ) from error
