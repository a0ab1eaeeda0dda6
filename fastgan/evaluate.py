"""python -m fastgan.evaluate checkpoint=... reference=... out=...: a number and its provenance."""

import json
from pathlib import Path
from typing import Any

from fastgan import config as cfg
from fastgan.common import distributed
from fastgan.common.errors import UserError
from fastgan.common.files import file_sha256, replace_atomically
from fastgan.data import open_dataset
from fastgan.evaluation.features import FeatureExtractor
from fastgan.evaluation.frechet import Statistics, write_statistics
from fastgan.evaluation.protocol import (
    dataset_statistics,
    generator_statistics,
    npz_statistics,
    score,
)
from fastgan.launch import build, checks
from fastgan.launch.cli import hydra_command
from fastgan.launch.engine import prepare_process


def evaluate(config: cfg.EvaluateConfig) -> None:
    """Frechet distance of a network's (or finished) images to a reference, as one JSON file."""
    checks.check_sampling(config)
    if (config.checkpoint is None) == (config.images is None):
        raise UserError("one of checkpoint=... and images=... expected, not both and not neither")
    out = Path(config.out)
    if out.exists():
        raise UserError(f"out={out} exists, a new name would be right")
    seeds = checks.seed_range(config.seeds)
    if config.checkpoint is not None:
        build.find_network(config.checkpoint)
    else:
        checks.existing(str(config.images), "images")
    device = distributed.init(config.device.value).device
    prepare_process(config, device)
    network = None
    if config.checkpoint is not None:
        network = build.saved_network(config.checkpoint, device)
    extractor, reference = build.extractor_and_reference(
        config, config.reference, device, progress=True
    )
    if network is not None:
        sample = build.sample_fn(network[0], config.sampler, device)
        generated = generator_statistics(sample, seeds, extractor, config.batch, progress=True)
        made_by: dict[str, Any] = {
            "checkpoint": {"file": str(network[1]), "sha256": file_sha256(network[1])},
            "sampler": {"kind": config.sampler.kind, "steps": config.sampler.steps},
        }
    else:
        generated, made_by = _of_images(config, extractor), {"images": config.images}
    result = {**score(generated, reference, extractor), **made_by}
    if distributed.is_main():
        if config.save_reference is not None:
            write_statistics(config.save_reference, reference)
        text = json.dumps(result, indent=2)
        with replace_atomically(out) as file:
            file.write((text + "\n").encode())
        print(text)


def _of_images(config: cfg.EvaluateConfig, extractor: FeatureExtractor) -> Statistics:
    path = Path(str(config.images))
    if path.suffix == ".npz":
        return npz_statistics(path, extractor, config.batch, progress=True)
    return dataset_statistics(open_dataset(path), extractor, config.batch, progress=True)


if __name__ == "__main__":
    hydra_command("evaluate", cfg.EvaluateConfig, evaluate)
