"""What a user may get wrong in each command: one line that names it, and nothing is written."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastgan.checkpoint.network_file import load_network_file
from tests.command_line import CommandLine, dataset_zip, network_file

PROJECTED = "discriminator.kind=projected"
# Command -> what is given anyway, and overrides -> what the line about them names.
GIVEN = {
    "train": "experiment=demo run_dir=run",
    "pretrain": "experiment=demo_pretrain run_dir=run batch=8 total_images=32 "
    "network.model_channels=8 network.attn_resolutions=[] network.channel_mult=[1,2]",
    "sample": "checkpoint=TINY out=new device=cpu",
    "evaluate": "out=new.json device=cpu extractor=pca:2",
}
WRONG = {
    "train": {
        "batchsize=3": ["'batchsize'", "TrainConfig"],
        "loss.gamma=3": ["loss.gamma"],
        "+loss.gamma=3": ["loss.gamma", "no key"],
        "+x=3": ["x is no key"],
        "~loss": ["loss", "needed"],
        "batch=many": ["batch", "'many'", "Integer"],
        "optim.lr_g=fast": ["optim.lr_g", "'fast'"],
        "share_fakes=perhaps": ["share_fakes"],
        "discriminator.backbones=vgg16_bn": ["discriminator.backbones"],
        "engine=warp": ["engine", "plain"],
        "loss.reduction=sum": ["loss.reduction", "mean", "published"],
        "total_images=5X": ["total_images='5X'", "5M"],
        "total_images=0": ["total_images=0", "at least 1"],
        "tick=0": ["tick=0"],
        "snapshot=x": ["snapshot='x'"],
        "ema.half_life=-1": ["ema.half_life='-1'"],
        "seed=-1": ["seed=-1"],
        "keep=0": ["keep=0"],
        "batch=0": ["batch=0"],
        "batch=32 batch_gpu=5": ["batch_gpu=5", "32 images", "16"],
        "batch_gpu=most": ["batch_gpu='most'"],
        "batch=0 batch_gpu=auto": ["batch=0"],
        "freeze.level=4": ["freeze.level=4", "0, 1, 2 or 3"],
        "generator.steps=0": ["generator.steps=0"],
        "generator.mid_sigma=0.8": ["generator.mid_sigma", "generator.steps=2"],
        "loss.r1_interval=-1": ["loss.r1_interval=-1"],
        "discriminator.sigma=0": ["discriminator.sigma=0"],
        "discriminator.augment=[blur]": ["'blur'", "cutout"],
        "eval.sampler.kind=euler": ["eval.sampler.kind=euler", "heun"],
        "eval.extractor=lpips": ["'lpips'", "inception"],
        "eval.extractor=pca:4 eval.reference=absent.npz": ["absent.npz"],
        "init.path=absent.safetensors": ["init.path=absent.safetensors"],
        "data.path=absent.zip": ["absent.zip", "digits"],
        "data.path=${nope}": ["nope", "data.path"],
        "experiment=nope": ["experiment/nope", "demo", "cifar10_uncond_d2o_f"],
        "init.path=null": ["init.path is null", "init.network"],
        "init.path=null init.network=3": ["init.path is null", "init.network"],
        "init.path=null init.network={model_type:SongUNet}": ["discriminator.network"],
        "discriminator.network=absent": ["discriminator.network=absent"],
        "run_dir": ["run_dir", "EQUAL"],
        "--verbose": ["--verbose"],
        f"{PROJECTED} discriminator.backbones=[nope]": ["'nope'", "timm"],
        PROJECTED: ["no backbones"],
        f"{PROJECTED} discriminator.backbones=[test_efficientnet] +discriminator.weights="
        "{vgg16_bn:x.pth,test_efficientnet:random}": ["discriminator.weights.vgg16_bn"],
        "experiment=cifar10_uncond_d2o_f": ["data.path", "init.path"],
    },
    "pretrain": {
        "+network.label_dim=7": ["7 classes", "digits/train has 10"],
        "+network.depth=7": ["depth"],
        "network.model_type=Transformer": ["model_type='Transformer'", "SongUNet"],
        "network.model_channels=wide": ["no network can be built", "TypeError"],
        "network.channel_mult=[1,2,2,2,2,2]": ["img_resolution 16"],
        "optim.warmup=x": ["optim.warmup='x'"],
        "timeout=0": ["timeout=0"],
        "seed=-1": ["seed=-1"],
    },
    "sample": {
        "checkpoint=absent": ["checkpoint=absent"],
        "seeds=9-1": ["seeds="],
        "seeds=1,5": ["quote"],
        "batch=0": ["batch=0"],
        "sampler.kind=ddim": ["sampler.kind=ddim"],
        "sampler.steps=0": ["sampler.steps=0"],
        "sampler.mid_sigma=0.8": ["sampler.mid_sigma"],
        "sampler.steps=2 sampler.mid_sigma=inf": ["sampler.mid_sigma=inf"],
        "sampler.kind=heun sampler.steps=10001": ["at most 10000"],
        "batch=99999999999999999999": ["batch="],
        "checkpoint=" + "x" * 300: ["does not exist"],
        "checkpoint=.": ["checkpoint=. holds no network"],
        "classes=0": ["classes=0"],
    },
    "evaluate": {
        "reference=digits": ["checkpoint"],
        "reference=digits images=a checkpoint=TINY": ["not both"],
        "reference=absent checkpoint=TINY": ["absent"],
        "reference=absent.npz checkpoint=TINY": ["reference=absent.npz"],
        "reference=digits checkpoint=absent": ["checkpoint=absent"],
        "reference=digits images=absent.npz": ["images=absent.npz"],
        "reference=digits checkpoint=TINY sampler.steps=0": ["sampler.steps=0"],
        "checkpoint=TINY": ["reference"],
    },
}
CASES = [(name, overrides) for name, wrong in WRONG.items() for overrides in wrong]


@pytest.mark.parametrize(("name", "overrides"), CASES)
def test_one_line_names_it(command: CommandLine, tiny: str, name: str, overrides: str) -> None:
    given = f"{GIVEN[name]} {overrides}".replace("TINY", tiny).split()
    line = command(name, *given).error
    assert [part for part in WRONG[name][overrides] if part not in line] == [], line
    assert command.files() == []


def test_weights_that_are_not_finite(command: CommandLine, tmp_path: Path, tiny: str) -> None:
    file = load_network_file(tiny)
    file.state["model.out_conv.bias"][0] = torch.nan
    broken = tmp_path / "broken.safetensors"
    save_file(file.state, broken, file.metadata)
    for name, more in (("sample", ""), ("evaluate", "reference=digits")):
        given = f"{GIVEN[name]} checkpoint={broken} {more}".split()
        line = command(name, *given).error
        assert "model.out_conv.bias is not finite" in line and str(broken) in line
    assert command.files() == []


def test_networks_that_do_not_fit(command: CommandLine, tiny: str, tmp_path: Path) -> None:
    images = dataset_zip(tmp_path / "rgb.zip", 16, None)
    small = network_file(tmp_path / "small.safetensors", img_resolution=8)
    labels = network_file(tmp_path / "seven.safetensors", label_dim=7)
    cases = {
        f"init.path={tiny} data.path={images}": ["img_channels 1", "rgb", "3"],
        f"init.path={small}": ["img_resolution 8", "small.safetensors", "16"],
        f"init.path={labels}": ["7 classes", "digits/train has 10"],
        f"discriminator.network={small}": ["img_resolution 8"],
    }
    # The file's architecture says one thing and its tensors another.
    file = load_network_file(tiny)
    for name, change in (("shape", {"model_channels": 16}), ("kind", {"model_type": "SongUNet"})):
        config = json.dumps(file.config | change)
        path = tmp_path / f"{name}.safetensors"
        save_file(file.state, path, metadata=file.metadata | {"config": config})
        cases[f"init.path={path}"] = [f"{name}.safetensors"]
    for overrides, parts in cases.items():
        line = command("train", *f"{GIVEN['train']} {overrides}".split()).error
        assert [part for part in parts if part not in line] == [], line
    assert command.files() == []
