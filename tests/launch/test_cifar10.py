"""The real path on real images: CIFAR-10, ImageNet's MobileNetV2, FD-R56. Minutes on two cores.

FASTGAN_DATA and FASTGAN_WEIGHTS name the folders of the files (`data` and `weights` by default);
without them there is nothing to run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

DATA = Path(os.environ.get("FASTGAN_DATA", "data")) / "cifar10-32x32-train.zip"
_WEIGHTS = Path(os.environ.get("FASTGAN_WEIGHTS", "weights"))
MOBILENET = _WEIGHTS / "mobilenetv2_100_imagenet.safetensors"
RESNET = _WEIGHTS / "resnet56_cifar10.safetensors"
_AT_HAND = [DATA] if all(p.is_file() for p in (DATA, MOBILENET, RESNET)) else []


def run(module: str, *overrides: str) -> None:
    subprocess.run([sys.executable, "-m", f"fastgan.{module}", *overrides], check=True)


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize("data", _AT_HAND)
def test_pretrain_finetune_sample_evaluate(data: Path, tmp_path: Path) -> None:
    few = ["device=cpu", f"data.path={data}", "data.max_images=256"]
    run(
        "pretrain",
        "experiment=cifar10_narrow_pretrain",
        f"run_dir={tmp_path / 'pre'}",
        *few,
        *("batch=16", "total_images=64", "snapshot=64", "tick=32", "precision=published"),
        *("eval.sampler.steps=2", "eval.batch=16"),
    )
    [teacher] = (tmp_path / "pre/checkpoints").glob("*/ema.safetensors")
    run(
        "train",
        "experiment=cifar10_narrow_d2o_f",
        f"run_dir={tmp_path / 'gan'}",
        f"init.path={teacher}",
        f"discriminator.weights.mobilenetv2_100={MOBILENET}",
        *few,
        *("engine=fast", "share_fakes=true", "batch=8", "batch_gpu=4"),
        *("total_images=24", "snapshot=24", "tick=8"),
    )
    run(
        "sample", f"checkpoint={tmp_path / 'gan'}", f"out={tmp_path / 's.npz'}", "seeds=0-99",
        "device=cpu",
    )  # fmt: skip
    images = np.load(tmp_path / "s.npz")["arr_0"]
    assert images.shape == (100, 32, 32, 3) and images.dtype == np.uint8
    assert len(np.unique(images, axis=0)) == 100  # every seed gives an image of its own
    run(
        "evaluate",
        f"checkpoint={tmp_path / 'gan'}",
        f"out={tmp_path / 'fd.json'}",
        "extractor=resnet56",
        f"weights={RESNET}",
        f"reference={data}",
        *("seeds=0-99", "device=cpu", "batch=100"),
    )
    result = json.loads((tmp_path / "fd.json").read_text())
    assert result["metric"] == "FD-R56" and result["n"] == 100 and result["seeds"] == "0-99"
    assert 0 < result["value"] < 1e4
    assert result["reference"]["n"] == 50_000 and len(result["checkpoint"]["sha256"]) == 64
    # The metric sees that these images, hardly trained, are not CIFAR-10's.
    assert result["value"] > 5
