"""python -m fastgan.sample checkpoint=... out=...: images from a network."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from fastgan import config as cfg
from fastgan.common import distributed
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically
from fastgan.launch import build, checks
from fastgan.launch.cli import hydra_command
from fastgan.launch.engine import prepare_process
from fastgan.models.sampling import save_grid


def sample(config: cfg.SampleConfig) -> None:
    """Writes the images of the seeds as an .npz, a grid (.png) or a folder of PNG files."""
    checks.check_sampling(config)
    world = distributed.init(config.device.value)
    if world.size > 1:
        raise UserError("fastgan.sample runs as one process, without torchrun would be right")
    prepare_process(config, world.device)
    out, seeds = Path(config.out), checks.seed_range(config.seeds)
    if out.exists():
        raise UserError(f"out={out} exists, a new name would be right")
    network, file = build.saved_network(config.checkpoint, world.device)
    one_class = checks.class_index(config.classes, network.label_dim)
    draw = build.sample_fn(network, config.sampler, world.device, one_class=one_class)
    images = (draw(part) for part in _batches(seeds, config.batch))
    if out.suffix == ".npz":
        pixels = torch.cat(list(images)).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        with replace_atomically(out) as handle:
            np.savez_compressed(handle, arr_0=pixels)
    elif out.suffix == ".png":
        columns = max(1, round(len(seeds) ** 0.5))
        save_grid(torch.cat(list(images)), out, columns)
    else:
        _write_folder(out, seeds, images)
    print(f"{len(seeds)} images of {file} in {out}")


def _write_folder(out: Path, seeds: list[int], images: Iterator[Tensor]) -> None:
    """One PNG per seed, `000000.png`; the folder appears when it is complete."""
    aside = out.with_name(f".{out.name}.part")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        remaining = iter(seeds)
        for batch in images:
            for image, seed in zip(batch.cpu().numpy(), remaining, strict=False):
                picture = image[0] if len(image) == 1 else image.transpose(1, 2, 0)
                Image.fromarray(picture).save(aside / f"{seed:06d}.png")
        os.replace(aside, out)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise UserError(f"out={out}: {error.strerror}, a writable path would be right") from error


def _batches(seeds: list[int], size: int) -> Iterator[list[int]]:
    for start in tqdm(range(0, len(seeds), size), unit="batch", disable=len(seeds) <= size):
        yield seeds[start : start + size]


if __name__ == "__main__":
    hydra_command("sample", cfg.SampleConfig, sample)
