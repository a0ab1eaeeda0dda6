"""Numbers, seeds, batches: what is accepted, and one line for what is not. Experiments train."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastgan import config as cfg
from fastgan.checkpoint.network_file import load_network_file
from fastgan.common.errors import UserError
from fastgan.launch import checks, run
from fastgan.launch.cli import compose, config_folder
from fastgan.launch.engine import step_settings
from fastgan.models.freeze import is_frozen
from fastgan.train import train
from tests.command_line import dataset_zip, network_file
from tests.training.toys import ALONE

NAMES = sorted(path.stem for path in (config_folder() / "experiment").glob("*.yaml"))
TRAIN = [name for name in NAMES if not name.endswith("pretrain")]
PRETRAIN = [name for name in NAMES if name.endswith("pretrain")]
GIVEN = ["data.path=data.zip", "init.path=network.safetensors"]
LITE0, VGG, DEIT = "tf_efficientnet_lite0", "vgg16_bn", "deit_base_distilled_patch16_224"
# The published recipe: batch, lr of G and D, EMA half-life, local batch of gamma, backbones.
RECIPES = {
    "cifar10": (256, 1e-4, 1e-4, 500_000, 64, [VGG, LITE0], 5_000_000),
    "ffhq64": (256, 2e-5, 4e-5, 500_000, 64, [DEIT, LITE0], 10_000_000),
    "afhqv2": (256, 2e-5, 4e-5, 500_000, 64, [DEIT, LITE0], 10_000_000),
    "imagenet64": (512, 8e-6, 4e-5, 50_000_000, 128, [DEIT, LITE0], 10_000_000),
}
# FID of D2O and of D2O-F.
FID = {
    "cifar10_uncond": (None, 1.54),
    "cifar10_cond": (None, None),
    "ffhq64": (1.08, 0.85),
    "afhqv2_64": (1.23, 1.24),
    "imagenet64": (1.42, 1.16),
}
PUBLISHED = {f"{name}_d2o": fid for name, (fid, _) in FID.items()}
PUBLISHED |= {f"{name}_d2o_f": fid for name, (_, fid) in FID.items()}


@given(st.integers(0, 10**10))
def test_plain_numbers_of_images(n: int) -> None:
    assert checks.images(n, "k") == checks.images(str(n), "k") == n
    assert checks.images(f"{n}k", "k") == 1000 * n and checks.images(f"{n} M", "k") == 10**6 * n


@given(st.integers(0, 10**5), st.integers(0, 10**6 - 1))
def test_fractions_of_a_million_are_exact(whole: int, fraction: int) -> None:
    assert checks.images(f"{whole}.{fraction:06d}M", "k") == whole * 10**6 + fraction


@given(st.text(max_size=8))
def test_any_text_is_a_number_of_images_or_refused_by_its_key(text: str) -> None:
    try:
        assert checks.images(text, "tick") >= 0
    except UserError as error:
        assert "tick=" in str(error) and "\n" not in str(error)


@pytest.mark.parametrize("value", ["5X", "1.5", "-3", "", None, "1.2345k", "k", "1e6", True])
def test_no_number_of_images(value: object) -> None:
    with pytest.raises(UserError, match="total_images="):
        checks.images(value, "total_images")


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 30)), min_size=1, max_size=4))
def test_seed_ranges(ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{a}-{a + n}" if n else str(a) for a, n in ranges)
    assert checks.seed_range(text) == [s for a, n in ranges for s in range(a, a + n + 1)]


@pytest.mark.parametrize(
    "text", ["", "a", "3-1", "1,,2", "-4", "1.5", "0-10000000", "0-9999999,3", "1 2"]
)
def test_no_seeds(text: str) -> None:
    with pytest.raises(UserError, match="seeds="):
        checks.seed_range(text)


def test_classes() -> None:
    assert checks.class_index(None, 0) is None and checks.class_index(0, 3) == 0
    for value in (3, -1, "1", 1.0, True):
        with pytest.raises(UserError, match="classes="):
            checks.class_index(value, 3)


@given(st.integers(1, 64), st.integers(1, 8), st.integers(1, 64))
def test_batches_split_evenly_or_are_refused(batch: int, world: int, batch_gpu: int) -> None:
    config = cfg.RunConfig(batch=batch, batch_gpu=batch_gpu)
    fits = batch % world == 0 and (batch // world) % batch_gpu == 0
    if fits:
        assert checks.local_batches(config, world) == batch_gpu
        assert checks.local_batches(cfg.RunConfig(batch=batch), world) == batch // world
    else:
        with pytest.raises(UserError, match=r"^batch"):
            checks.local_batches(config, world)


def test_all_experiments_are_there() -> None:
    extra = ["demo", "cifar10_narrow_d2o_f"]
    assert sorted(TRAIN) == sorted([*PUBLISHED, *extra])
    assert PRETRAIN == ["cifar10_narrow_pretrain", "demo_pretrain"]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_recipes(name: str) -> None:
    config = compose("train", cfg.TrainConfig, [f"experiment={name}", *GIVEN])
    batch, lr_g, lr_d, half_life, local, backbones, total = RECIPES[name.split("_")[0]]
    s = step_settings(config, ALONE)
    assert (s.batch, s.batch_gpu, s.seed, s.total_images) == (batch, batch, 42, total)
    assert (s.lr_g, s.lr_d, s.decay_from) == (lr_g, lr_d, None)
    assert (s.ema_half_life, s.ema_ramp) == (half_life, 0.05)
    assert (s.r1_gamma, s.r1_interval, s.published_batch_gpu) == (1e-4, 16, local)
    assert (s.loss, s.reduction, s.nonfinite) == ("nonsaturating", "mean", "skip")
    assert (s.steps, s.share_fakes, s.scale_losses) == (1, False, False)
    assert config.discriminator.backbones == backbones and config.discriminator.augment == []
    assert config.freeze.level == (1 if name.endswith("_f") else 0)
    assert config.run_dir == f"runs/{name}" and config.device is cfg.Device.cuda
    plan = run.schedule(config)
    assert (plan.total_images, plan.snapshot) == (total, 250_000)
    fid = PUBLISHED[name]
    assert config.published["fid"] == fid if fid else config.published is None


@pytest.mark.parametrize("name", PRETRAIN)
def test_pretraining_experiments_compose(name: str) -> None:
    config = compose("pretrain", cfg.PretrainConfig, [f"experiment={name}", "data.path=digits"])
    checks.check_run(config)
    assert config.experiment_name == name and config.eval.sampler.kind == "heun"


def experiment_inputs(name: str, folder: Path) -> list[str]:
    """Tiny data and a tiny network of the experiment's own kind, and a tiny backbone."""
    if name == "demo":
        return []
    resolution = 32 if name.startswith("cifar10") else 64
    labels = 1000 if "imagenet" in name else 10 if "_cond" in name else 0
    classes = [0, 1, 2, 3, 4, 5, 6, labels - 1] if labels else None
    kind = {"img_resolution": resolution, "img_channels": 3, "label_dim": labels}
    if "imagenet" not in name:
        kind |= {"model_type": "SongUNet", "embedding_type": "fourier", "channel_mult_noise": 2}
        kind |= {"encoder_type": "residual", "resample_filter": [1, 3, 3, 1]}
    network_file(folder / "network.safetensors", **kind)
    dataset_zip(folder / "data.zip", resolution, classes)
    return [
        f"data.path={folder}/data.zip",
        f"init.path={folder}/network.safetensors",
        "discriminator.backbones=[test_efficientnet]",
        "+discriminator.weights.test_efficientnet=random",
    ]


def every_experiment() -> list:
    """One of each kind of network, and with and without classes; the others are slow."""
    fast = ("demo", "cifar10_cond_d2o_f", "imagenet64_d2o")
    return [n if n in fast else pytest.param(n, marks=pytest.mark.slow) for n in TRAIN]


@pytest.mark.parametrize("name", every_experiment())
def test_every_experiment_trains(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "GRID_SEEDS", [0, 1])
    small = ["device=cpu", "batch=2", "total_images=2", f"run_dir={tmp_path}/run"]
    inputs = experiment_inputs(name, tmp_path)
    config = compose("train", cfg.TrainConfig, [f"experiment={name}", *inputs, *small])
    train(config)
    state = json.loads((tmp_path / "run" / "state.json").read_text())
    assert (state["status"], state["nimg"]) == ("done", 2)
    before = load_network_file(config.init.path)
    after = load_network_file(tmp_path / "run" / "checkpoints" / "0000000002" / "ema.safetensors")
    # An average of one update is the network itself: what trains has moved, nothing else has.
    moved = {n for n, t in after.state.items() if not torch.equal(t, before.state[n].float())}
    trains = {n for n in before.state if not is_frozen(n, config.freeze.level)}
    assert moved <= trains and len(moved) > len(trains) / 2
    assert after.config["precond"] == "D2OPrecond" and after.metadata["license"]
    assert after.metadata["base_sha256"] == before.sha256
