"""train, sample, evaluate, pretrain: each reads what the others wrote, and refuses in one line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from fastgan.checkpoint.network_file import load_network_file
from fastgan.launch.cli import packaged_file
from tests.command_line import CommandLine, Ended, network_file
from tests.processes import ROOT

CLASSIFIER = packaged_file("assets/digits/classifier.safetensors")
SMALL = ("experiment=demo", "batch=8", "tick=40", "optim.lr_g=1e-3", "optim.decay_from=null")
CPU = "device=cpu"


@pytest.fixture
def conditional(tmp_path: Path) -> str:
    return str(network_file(tmp_path / "conditional.safetensors", label_dim=10))


def train(
    command: CommandLine, network: str, total: int, *overrides: str, run_dir: str = "run"
) -> Ended:
    given = (f"init.path={network}", f"total_images={total}", f"run_dir={run_dir}", "snapshot=64")
    return command("train", *SMALL, *given, *overrides)


def state(run_dir: str) -> dict:
    return json.loads(Path(run_dir, "state.json").read_text())


def average(run_dir: str, nimg: int):  # type: ignore[no-untyped-def]
    return load_network_file(Path(run_dir, "checkpoints", f"{nimg:010d}", "ema.safetensors"))


def test_dry_run_says_the_plan_and_writes_nothing(command: CommandLine, tiny: str) -> None:
    for batch_gpu, told in (("null", "1 rounds x 8"), ("auto", "8 in rounds of batch_gpu=auto")):
        ended = train(command, tiny, 160, "dry_run=true", f"batch_gpu={batch_gpu}")
        assert ended.code == 0 and ended.err == "" and command.files() == []
        assert "160 images of digits/train (997)" in ended.out
        assert f"batch 8 = 1 processes x {told} images" in ended.out


def test_train_sample_evaluate(command: CommandLine, tiny: str) -> None:
    measured = ("eval.extractor=pca:4", "eval.images=32", "eval.reference=digits/val")
    ended = train(command, tiny, 128, *measured)
    assert ended.code == 0, ended
    # No outputs/, train.log or .hydra of Hydra's.
    assert command.files() == ["run"]
    files = ["checkpoints", "config.yaml", "log.txt", "samples", "state.json", "stats.jsonl"]
    assert sorted(os.listdir("run")) == files
    assert state("run") == {"status": "done", "nimg": 128, "exit_code": 0, "message": ""}
    assert sorted(os.listdir("run/samples")) == ["0000000064.png", "0000000128.png"]
    values = [json.loads(line) for line in Path("run/stats.jsonl").read_text().splitlines()]
    assert sum("Metric/FD-pca4" in line for line in values) == 2
    assert any("Loss/R1" not in line and "Loss/G" in line for line in values)
    file = average("run", 128)
    assert file.metadata["base_model"] == "tiny.safetensors"
    assert file.metadata["base_sha256"] == load_network_file(tiny).sha256
    assert file.metadata["license"] == "test-licence" and file.nimg == 128
    assert file.provenance["data"]["dataset"] == "digits/train"

    for more in (
        ["out=a.npz", "seeds=0-39"],
        ["out=a.png", "seeds=0-3"],
        ["out=many", "seeds=2-4", "batch=2"],
    ):
        assert command("sample", "checkpoint=run", CPU, *more).code == 0
    pixels = np.load("a.npz")["arr_0"]
    assert pixels.shape == (40, 16, 16, 1) and pixels.dtype == np.uint8 and pixels.std() > 1
    assert Image.open("a.png").size == (32, 32)
    assert sorted(os.listdir("many")) == ["000002.png", "000003.png", "000004.png"]
    # A seed is the same image alone, in another batch and in another format.
    difference = np.asarray(Image.open("many/000003.png")).astype(int) - pixels[3, :, :, 0]
    assert np.abs(difference).max() <= 1

    common = ("reference=digits/test", "seeds=0-39", CPU, "checkpoint=run")
    classifier = f"extractor=classifier:{CLASSIFIER}"
    for out, *more in (
        ["p.json", "extractor=pca:4"],
        ["c.json", classifier, "save_reference=ref.npz"],
    ):
        ended = command("evaluate", *common, f"out={out}", *more)
        assert ended.code == 0, ended
        result = json.loads(Path(out).read_text())
        assert json.loads(ended.out) == result
        assert result["value"] > 0 and result["n"] == 40 and result["seeds"] == "0-39"
        assert result["reference"]["dataset"]["dataset"] == "digits/test"
        assert result["reference"]["n"] == 400 and result["versions"]["torch"]
        assert result["checkpoint"]["file"].endswith("0000000128/ema.safetensors")
        assert len(result["checkpoint"]["sha256"]) == 64
        assert result["sampler"] == {"kind": "few_step", "steps": 1}
    # The statistics file it writes and finished images give the same number.
    finished = ("images=a.npz", "reference=ref.npz", "out=i.json", CPU, classifier)
    assert command("evaluate", *finished).code == 0
    found = json.loads(Path("i.json").read_text())["value"]
    assert found == pytest.approx(result["value"], rel=1e-3)


def test_stopped_and_continued_equals_uninterrupted(command: CommandLine, tiny: str) -> None:
    for run_dir, total in (("whole", 160), ("parts", 72), ("parts", 160)):
        assert train(command, tiny, total, run_dir=run_dir).code == 0
        assert state(run_dir)["nimg"] == total
    for name in ("ema.safetensors", "training.safetensors"):
        whole, parts = (load_file(f"{r}/checkpoints/0000000160/{name}") for r in ("whole", "parts"))
        assert whole.keys() == parts.keys() and len(whole) > 10
        assert [n for n in whole if not torch.equal(whole[n], parts[n])] == []
    again = train(command, tiny, 160, run_dir="parts")
    assert again.code == 0 and "nothing left to do" in again.err
    assert state("parts")["status"] == "done"


def test_a_folder_of_something_else_is_refused(command: CommandLine, tiny: str) -> None:
    train(command, tiny, 8)
    before = Path("run/config.yaml").read_bytes()
    line = train(command, tiny, 16, "optim.lr_g=0.5").error
    assert "run_dir=run" in line and "optim.lr_g=0.001 (not 0.5)" in line
    assert "seed=42 (not 1)" in train(command, tiny, 16, "seed=1").error
    assert Path("run/config.yaml").read_bytes() == before
    assert state("run") == {"status": "done", "nimg": 8, "exit_code": 0, "message": ""}
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("words")
    assert "run_dir=mine holds other files" in train(command, tiny, 8, run_dir="mine").error
    assert os.listdir("mine") == ["thesis.txt"]
    assert "run_dir=mine/thesis.txt" in train(command, tiny, 8, run_dir="mine/thesis.txt").error
    # A damaged checkpoint, without one before it.
    file = Path("run/checkpoints/0000000008/training.safetensors")
    file.write_bytes(file.read_bytes()[:-20])
    line = train(command, tiny, 16).error
    assert "damaged checkpoint" in line and "0000000008" in line and "latest" in line


def test_a_diverged_run_ends_with_3(command: CommandLine, tmp_path: Path, tiny: str) -> None:
    file, path = load_network_file(tiny), tmp_path / "nan.safetensors"
    tensors = {n: t * float("nan") if "out_conv" in n else t for n, t in file.state.items()}
    save_file(tensors, path, metadata=file.metadata)
    ended = train(command, str(path), 400)
    line = ended.err.splitlines()[-1]
    assert ended.code == 3 and line.startswith("error: loss or gradients not finite")
    assert state("run")["status"] == "diverged" and state("run")["exit_code"] == 3
    why = json.loads(Path("run/diverged/why.json").read_text())
    assert any(name.startswith("model.") for name in why["not_finite"]["generator"])


def test_classes(command: CommandLine, conditional: str) -> None:
    given = ("sample", f"checkpoint={conditional}", "seeds=0-7", CPU)
    for out, more in (("a.npz", ["classes=3"]), ("b.npz", ["classes=4"]), ("c.npz", [])):
        assert command(*given, f"out={out}", *more).code == 0
    three, four, drawn = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in "abc")
    assert (np.abs(three - four).max((1, 2, 3)) > 0).all()
    assert not all(np.abs(drawn[i] - three[i]).max() <= 1 for i in range(8))
    for value in ("10", "cat"):
        assert "classes=" in command(*given, "out=d", f"classes={value}").error
    assert command.files() == ["a.npz", "b.npz", "c.npz"]


def test_what_exists_is_not_overwritten(command: CommandLine, tiny: str) -> None:
    for name in ("x.npz", "x.png", "x.json"):
        Path(name).write_text("old")
    Path("x").mkdir()
    for out in ("x.npz", "x.png", "x", "x.json"):
        name, *more = ("evaluate", "reference=digits") if out == "x.json" else ("sample",)
        line = command(name, f"checkpoint={tiny}", f"out={out}", CPU, *more).error
        assert f"out={out} exists" in line
    assert {Path(name).read_text() for name in ("x.npz", "x.png", "x.json")} == {"old"}


def test_a_pretrained_network_is_fine_tuned(command: CommandLine) -> None:
    ended = command(
        *("pretrain", "experiment=demo_pretrain", "run_dir=pre", "batch=8", "snapshot=32"),
        *("tick=8", "network.model_channels=8", "network.attn_resolutions=[]", "optim.warmup=8"),
        *("network.channel_mult=[1,2]", "total_images=32", "+network.label_dim=10"),
    )
    assert ended.code == 0, ended
    lines = [json.loads(line) for line in Path("pre/stats.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"] for line in lines] == [0.008, 0.016, 0.024, 0.032]
    assert all(line["Loss/denoising"] > 0 for line in lines)
    assert average("pre", 32).config["precond"] == "EDMPrecond"
    heun = ("sampler.kind=heun", "sampler.steps=3")
    assert command("sample", "checkpoint=pre", "out=h.png", CPU, *heun).code == 0
    # 17 iterations: with R1.
    assert train(command, "pre/checkpoints/0000000032/ema.safetensors", 136).code == 0
    assert average("run", 136).config["label_dim"] == 10


def test_random_initial_weights(command: CommandLine, tiny: str) -> None:
    """The control of the method: the same training without the pre-training."""
    network = "{model_type: DhariwalUNet, model_channels: 8, channel_mult: [1,2], num_blocks: 1}"
    more = (f"init.network={network}", f"discriminator.network={tiny}", "freeze.level=0")
    ended = train(command, "null", 16, *more)
    assert ended.code == 0, ended
    assert average("run", 16).metadata["base_model"] == ""


def _python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT}/kernels", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_real_command(tmp_path: Path) -> None:
    """What the tests above call in one process behaves the same as `python -m`."""
    done = _python(tmp_path, "fastgan.train", "experiment=demo", "bach=3", "run_dir=run")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and "'bach'" in line
    assert os.listdir(tmp_path) == []


def test_help(command: CommandLine) -> None:
    ended = command("evaluate", "--help")
    assert ended.code == 0 and "save_reference" in ended.out and command.files() == []


@pytest.mark.slow
def test_torchrun_trains_like_one_process(tmp_path: Path) -> None:
    tiny = network_file(tmp_path / "tiny.safetensors")
    folder = tmp_path / "here"
    folder.mkdir()
    common = ["fastgan.train", *SMALL, f"init.path={tiny}", "total_images=136", "snapshot=64"]
    assert _python(folder, *common, "run_dir=one").returncode == 0
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    measured = ("eval.extractor=pca:4", "eval.images=32")
    done = _python(folder, *launch, *common, "run_dir=two", *measured)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes x 1 rounds x 4") == 1
    # The parameters themselves are compared in float64 where the step is tested.
    lines = [(folder / name / "stats.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = (json.loads(first) for first, *_ in lines)
    for key in ("Progress/kimg", "Loss/G", "Loss/D"):
        assert two[key] == pytest.approx(one[key], rel=1e-3)
    assert sorted(os.listdir(folder)) == ["one", "two"]
    assert len((folder / "two" / "log.txt").read_text().splitlines()) < 12
