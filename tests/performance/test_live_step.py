"""Steps to measure: the published networks, and steps that need no files."""

import json

import pytest
import torch

from fastgan.common.errors import UserError
from fastgan.launch.checks import check_train
from fastgan.models import network_from_config
from fastgan.models.build import PUBLISHED_NETWORKS
from fastgan.performance.live_step import live_step, measured_config, tiny_overrides
from tests.conftest import GOLDEN

CPU = torch.device("cpu")
FILES = {
    "cifar10_uncond": "edm-cifar10-32x32-uncond-ve",
    "cifar10_cond": "edm-cifar10-32x32-cond-ve",
    "ffhq64": "edm-ffhq-64x64-uncond-ve",
    "afhqv2_64": "edm-afhqv2-64x64-uncond-ve",
    "imagenet64": "edm-imagenet-64x64-cond-adm",
}
SMALL = [
    "init.network={model_type: SongUNet, model_channels: 32, channel_mult: [1, 2], num_blocks: 1, "
    "img_resolution: 16, img_channels: 3, label_dim: 10}",
    "discriminator.backbones=[mobilenetv2_050]",
    "device=cpu",
    "batch=2",
]


@pytest.mark.parametrize("name", FILES)
def test_published_networks_have_the_parameters_of_the_released_files(name: str) -> None:
    layout = json.loads((GOLDEN / "edm_checkpoint_layouts.json").read_text())[FILES[name]]
    with torch.device("meta"):
        network = network_from_config({"precond": "EDMPrecond", **PUBLISHED_NETWORKS[name]})
    assert PUBLISHED_NETWORKS[name] == layout["init_kwargs"]
    assert sum(p.numel() for p in network.parameters()) > 50e6


def test_a_step_runs_without_any_file() -> None:
    live = live_step(measured_config("cifar10_cond_d2o_f", SMALL), CPU)
    before = {n: t.clone() for n, t in live.step.state().items()}
    result = live.run(16)
    assert {"Loss/G", "Loss/D", "Loss/R1"} <= result.scalars.keys()
    assert result.skipped == {"G": 0, "D": 0, "R1": 0}
    assert any((t != before[n]).any() for n, t in live.step.state().items() if n in before)


def test_an_experiment_is_measured_at_its_own_settings() -> None:
    config = measured_config("imagenet64_d2o_f", [])
    assert config.batch == 512 and config.optim.lr_d == 4e-5 and config.freeze.level == 1
    assert config.init.network == PUBLISHED_NETWORKS["imagenet64"]
    assert set(config.discriminator.weights.values()) == {"random"}


def test_an_experiment_without_a_network_asks_for_one() -> None:
    with pytest.raises(UserError, match=r"cifar10_narrow_d2o_f .* init\.network="):
        measured_config("cifar10_narrow_d2o_f", ["init.path=null"])


@pytest.mark.parametrize("experiment", ["cifar10_uncond_d2o", "imagenet64_d2o_f", "demo"])
def test_tiny_experiments_keep_their_kind(experiment: str) -> None:
    config = measured_config(experiment, [*tiny_overrides(experiment), "batch=4"])
    check_train(config)
    assert config.batch == 4
    large = PUBLISHED_NETWORKS.get(experiment.removesuffix("_f").removesuffix("_d2o"))
    if large is not None:
        kept = ("model_type", "encoder_type", "embedding_type", "label_dim", "resample_filter")
        tiny = config.init.network
        assert {k: tiny.get(k) for k in kept} == {k: large.get(k) for k in kept}
        assert tiny["model_channels"] < large["model_channels"]
