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
from tests.command_line import CommandLine, dataset_zip, network_file

ROOT = Path(__file__).resolve().parents[1]
CLASSIFIER = packaged_file("assets/digits/classifier.safetensors")
SMALL = ("experiment=demo", "batch=8", "tick=40", "optim.lr_g=1e-3", "optim.decay_from=null")


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> CommandLine:
    return CommandLine(tmp_path / "here", capsys, monkeypatch)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    return str(network_file(tmp_path / "tiny.safetensors"))


@pytest.fixture
def conditional(tmp_path: Path) -> str:
    return str(network_file(tmp_path / "conditional.safetensors", label_dim=10))


def train(command: CommandLine, network: str, total: int, *overrides: str, run_dir: str = "run"):
    return command(
        "train", *SMALL, f"init.path={network}", f"total_images={total}", f"run_dir={run_dir}",
        "snapshot=64", *overrides,
    )  # fmt: skip


def state(run_dir: str) -> dict:
    return json.loads(Path(run_dir, "state.json").read_text())


def final_tensors(run_dir: str) -> dict[str, torch.Tensor]:
    folder = Path(
        run_dir, "checkpoints", Path(run_dir, "checkpoints", "latest").read_text().strip()
    )
    files = ("ema.safetensors", "training.safetensors")
    return {f"{file}/{n}": t for file in files for n, t in load_file(folder / file).items()}


def test_dry_run_says_the_plan_and_writes_nothing(command: CommandLine, tiny: str) -> None:
    ended = train(command, tiny, 160, "dry_run=true")
    assert ended.code == 0 and ended.err == "" and command.files() == []
    assert "160 images of digits/train (997)" in ended.out
    assert "batch 8 = 1 processes x 1 rounds x 8 images" in ended.out


def test_train_sample_evaluate(command: CommandLine, tiny: str) -> None:
    ended = train(
        command, tiny, 128, "eval.extractor=pca:4", "eval.images=32", "eval.reference=digits/val"
    )
    assert ended.code == 0, ended
    # No outputs/, train.log or .hydra of Hydra's.
    assert command.files() == ["run"]
    assert sorted(os.listdir("run")) == [
        "checkpoints", "config.yaml", "log.txt", "samples", "state.json", "stats.jsonl"
    ]  # fmt: skip
    assert state("run") == {"status": "done", "nimg": 128, "exit_code": 0, "message": ""}
    assert sorted(os.listdir("run/samples")) == ["0000000064.png", "0000000128.png"]
    values = [json.loads(line) for line in Path("run/stats.jsonl").read_text().splitlines()]
    assert sum("Metric/FD-pca4" in line for line in values) == 2
    assert any("Loss/R1" not in line and "Loss/G" in line for line in values)

    assert command("sample", "checkpoint=run", "out=a.npz", "seeds=0-4", "device=cpu").code == 0
    pixels = np.load("a.npz")["arr_0"]
    assert pixels.shape == (5, 16, 16, 1) and pixels.dtype == np.uint8 and pixels.std() > 1
    assert command("sample", "checkpoint=run", "out=a.png", "seeds=0-3", "device=cpu").code == 0
    assert Image.open("a.png").size[0] >= 32
    folder = command("sample", "checkpoint=run", "out=many", "seeds=2-4", "batch=2", "device=cpu")
    assert folder.code == 0
    assert sorted(os.listdir("many")) == ["000002.png", "000003.png", "000004.png"]
    # A seed is the same image alone, in another batch and in another format.
    difference = np.asarray(Image.open("many/000003.png")).astype(int) - pixels[3, :, :, 0]
    assert np.abs(difference).max() <= 1

    common = ("reference=digits/test", "seeds=0-39", "device=cpu", "checkpoint=run")
    for out, extractor in (("p.json", "pca:4"), ("c.json", f"classifier:{CLASSIFIER}")):
        ended = command("evaluate", *common, f"out={out}", f"extractor={extractor}")
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
    ended = command(
        "evaluate", *common, f"extractor=classifier:{CLASSIFIER}", "out=s.json",
        "save_reference=ref.npz",
    )  # fmt: skip
    command("sample", "checkpoint=run", "out=forty.npz", "seeds=0-39", "device=cpu")
    ended = command(
        "evaluate", "images=forty.npz", "reference=ref.npz", "out=i.json", "device=cpu",
        f"extractor=classifier:{CLASSIFIER}",
    )  # fmt: skip
    assert ended.code == 0, ended
    found = json.loads(Path("i.json").read_text())["value"]
    assert found == pytest.approx(json.loads(Path("c.json").read_text())["value"], rel=1e-3)


def test_the_network_file_names_its_origin(command: CommandLine, tiny: str) -> None:
    train(command, tiny, 8)
    file = load_network_file("run/checkpoints/0000000008/ema.safetensors")
    assert file.metadata["base_model"] == "tiny.safetensors"
    assert file.metadata["base_sha256"] == load_network_file(tiny).sha256
    assert file.metadata["license"] == "test-licence" and file.nimg == 8
    assert file.provenance["data"]["dataset"] == "digits/train"


def test_stopped_and_continued_equals_uninterrupted(command: CommandLine, tiny: str) -> None:
    assert train(command, tiny, 160, run_dir="whole").code == 0
    assert train(command, tiny, 72, run_dir="parts").code == 0
    assert state("parts")["nimg"] == 72
    assert train(command, tiny, 160, run_dir="parts").code == 0
    whole, parts = final_tensors("whole"), final_tensors("parts")
    assert whole.keys() == parts.keys() and len(whole) > 20
    assert [n for n in whole if not torch.equal(whole[n], parts[n])] == []
    again = train(command, tiny, 160, run_dir="parts")
    assert again.code == 0 and "nothing left to do" in again.err
    assert state("parts")["status"] == "done"


def test_a_run_with_other_settings_is_refused(command: CommandLine, tiny: str) -> None:
    train(command, tiny, 8)
    before = Path("run/config.yaml").read_bytes()
    line = train(command, tiny, 16, "optim.lr_g=0.5").error
    assert "run_dir=run" in line and "optim.lr_g=0.001 (not 0.5)" in line
    assert "seed=42 (not 1)" in train(command, tiny, 16, "seed=1").error
    assert Path("run/config.yaml").read_bytes() == before
    assert state("run") == {"status": "done", "nimg": 8, "exit_code": 0, "message": ""}


def test_other_peoples_folders_are_left_alone(command: CommandLine, tiny: str) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("words")
    assert "run_dir=mine holds other files" in train(command, tiny, 8, run_dir="mine").error
    assert os.listdir("mine") == ["thesis.txt"]
    assert "run_dir=mine/thesis.txt" in train(command, tiny, 8, run_dir="mine/thesis.txt").error


def test_a_damaged_checkpoint_is_one_line(command: CommandLine, tiny: str) -> None:
    train(command, tiny, 8)
    file = Path("run/checkpoints/0000000008/training.safetensors")
    file.write_bytes(file.read_bytes()[:-20])
    line = train(command, tiny, 16).error
    assert "damaged checkpoint" in line and "0000000008" in line and "latest" in line
    Path("run/checkpoints/latest").write_text("nothing\n")
    assert "damaged checkpoint" in train(command, tiny, 16).error
    assert os.listdir("run/samples") == ["0000000008.png"]


def test_a_diverged_run_ends_with_3(command: CommandLine, tmp_path: Path) -> None:
    path = network_file(tmp_path / "nan.safetensors")
    file = load_network_file(path)
    tensors = {n: t * float("nan") if "out_conv" in n else t for n, t in file.state.items()}
    save_file(tensors, path, metadata=file.metadata)
    ended = train(command, str(path), 400)
    line = ended.err.splitlines()[-1]
    assert ended.code == 3 and line.startswith("error: loss or gradients not finite")
    assert state("run")["status"] == "diverged" and state("run")["exit_code"] == 3
    why = json.loads(Path("run/diverged/why.json").read_text())
    assert any(name.startswith("model.") for name in why["not_finite"]["generator"])


def test_classes(command: CommandLine, conditional: str, tiny: str) -> None:
    for out, more in (("a.npz", ["classes=3"]), ("b.npz", ["classes=4"]), ("c.npz", [])):
        ended = command(
            "sample", f"checkpoint={conditional}", f"out={out}", "seeds=0-7", "device=cpu", *more
        )
        assert ended.code == 0, ended
    three, four, drawn = (np.load(f"{name}.npz")["arr_0"].astype(int) for name in "abc")
    assert (np.abs(three - four).max((1, 2, 3)) > 0).all()
    same = [np.abs(drawn[i] - three[i]).max() <= 1 for i in range(8)]
    assert not all(same)
    for network, value in ((conditional, "10"), (conditional, "cat"), (tiny, "0")):
        line = command("sample", f"checkpoint={network}", "out=d", f"classes={value}",
                       "device=cpu").error  # fmt: skip
        assert "classes=" in line
    assert command.files() == ["a.npz", "b.npz", "c.npz"]


def test_conditional_training(command: CommandLine, conditional: str) -> None:
    assert train(command, conditional, 136).code == 0
    assert load_network_file("run/checkpoints/0000000136/ema.safetensors").config["label_dim"] == 10


def test_what_exists_is_not_overwritten(command: CommandLine, tiny: str) -> None:
    for name in ("x.npz", "x.png", "x.json"):
        Path(name).write_text("old")
    Path("x").mkdir()
    for out in ("x.npz", "x.png", "x"):
        line = command("sample", f"checkpoint={tiny}", f"out={out}", "device=cpu").error
        assert f"out={out} exists" in line
    line = command(
        "evaluate", f"checkpoint={tiny}", "out=x.json", "reference=digits", "device=cpu"
    ).error
    assert "out=x.json exists" in line
    assert {Path(name).read_text() for name in ("x.npz", "x.png", "x.json")} == {"old"}


@pytest.mark.parametrize(
    ("overrides", "part"),
    [
        ("checkpoint=absent", "checkpoint=absent"),
        ("seeds=9-1", "seeds="),
        ("seeds=1,5", "quote"),
        ("batch=0", "batch=0"),
        ("sampler.kind=ddim", "sampler.kind=ddim"),
        ("sampler.steps=0", "sampler.steps=0"),
        ("sampler.mid_sigma=0.8", "sampler.mid_sigma"),
        ("sampler.steps=2 sampler.mid_sigma=inf", "sampler.mid_sigma=inf"),
        ("sampler.kind=heun sampler.steps=10001", "at most 10000"),
        ("batch=99999999999999999999", "batch="),
        ("checkpoint=" + "x" * 300, "does not exist"),
        ("checkpoint=.", "checkpoint=. holds no network"),
    ],
)
def test_sampling_mistakes(command: CommandLine, tiny: str, overrides: str, part: str) -> None:
    given = [f"checkpoint={tiny}"] * ("checkpoint" not in overrides)
    line = command("sample", *given, "out=new", "device=cpu", *overrides.split()).error
    assert part in line and command.files() == []


def test_weights_that_are_not_finite(command: CommandLine, tmp_path: Path, tiny: str) -> None:
    file = load_network_file(tiny)
    file.state["model.out_conv.bias"][0] = torch.nan
    broken = tmp_path / "broken.safetensors"
    save_file(file.state, broken, file.metadata)
    for name, *more in (("sample", "out=new"), ("evaluate", "out=new.json", "reference=digits")):
        more += ["extractor=pca:2"] if name == "evaluate" else []
        line = command(name, f"checkpoint={broken}", "device=cpu", *more).error
        assert "model.out_conv.bias is not finite" in line and str(broken) in line
    assert command.files() == []


def test_evaluation_mistakes(command: CommandLine, tiny: str) -> None:
    common = ("out=new.json", "device=cpu", "extractor=pca:2")
    for overrides, part in (
        (["reference=digits"], "checkpoint"),
        (["reference=digits", "images=a", f"checkpoint={tiny}"], "not both"),
        (["reference=absent", f"checkpoint={tiny}"], "absent"),
        (["reference=absent.npz", f"checkpoint={tiny}"], "reference=absent.npz"),
        (["reference=digits", "checkpoint=absent"], "checkpoint=absent"),
        (["reference=digits", "images=absent.npz"], "images=absent.npz"),
        (["reference=digits", f"checkpoint={tiny}", "sampler.steps=0"], "sampler.steps=0"),
    ):
        assert part in command("evaluate", *common, *overrides).error
    assert command.files() == []


def test_networks_that_do_not_fit(command: CommandLine, tiny: str, tmp_path: Path) -> None:
    images = dataset_zip(tmp_path / "rgb.zip", 16, None)
    line = train(command, tiny, 8, f"data.path={images}").error
    assert "img_channels 1" in line and "rgb" in line and "3" in line
    small = network_file(tmp_path / "small.safetensors", img_resolution=8)
    line = train(command, str(small), 8).error
    assert "img_resolution 8" in line and "small.safetensors" in line and "16" in line
    labels = network_file(tmp_path / "seven.safetensors", label_dim=7)
    line = train(command, str(labels), 8).error
    assert "7 classes" in line and "digits/train has 10" in line
    for name, change in (("shape", {"model_channels": 16}), ("kind", {"model_type": "SongUNet"})):
        # The file's architecture says one thing and its tensors another.
        file = load_network_file(tiny)
        config = json.dumps(file.config | change)
        path = tmp_path / f"{name}.safetensors"
        save_file(file.state, path, metadata=file.metadata | {"config": config})
        assert f"{name}.safetensors" in train(command, str(path), 8).error
    other = network_file(tmp_path / "other.safetensors", img_resolution=8)
    assert "img_resolution 8" in train(command, tiny, 8, f"discriminator.network={other}").error
    assert command.files() == []


PRETRAIN = (
    "experiment=demo_pretrain", "run_dir=pre", "batch=8", "snapshot=16", "tick=8",
    "network.model_channels=8", "network.attn_resolutions=[]", "network.channel_mult=[1,2]",
    "optim.warmup=8",
)  # fmt: skip


def test_a_pretrained_network_is_fine_tuned(command: CommandLine) -> None:
    ended = command("pretrain", *PRETRAIN, "total_images=32", "+network.label_dim=10")
    assert ended.code == 0, ended
    lines = [json.loads(line) for line in Path("pre/stats.jsonl").read_text().splitlines()]
    assert [line["Progress/kimg"] for line in lines] == [0.008, 0.016, 0.024, 0.032]
    assert all(line["Loss/denoising"] > 0 for line in lines)
    checkpoint = "pre/checkpoints/0000000032/ema.safetensors"
    assert load_network_file(checkpoint).config["precond"] == "EDMPrecond"
    heun = ("sampler.kind=heun", "sampler.steps=3")
    assert command("sample", "checkpoint=pre", "out=h.png", "device=cpu", *heun).code == 0
    assert train(command, checkpoint, 16).code == 0
    assert load_network_file("run/checkpoints/0000000016/ema.safetensors").config["label_dim"] == 10


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ("+network.label_dim=7", ["7 classes", "digits/train has 10"]),
        ("+network.depth=7", ["depth"]),
        ("network.model_type=Transformer", ["model_type='Transformer'", "SongUNet"]),
        ("network.model_channels=wide", ["no network can be built", "TypeError"]),
        ("network.channel_mult=[1,2,2,2,2,2]", ["img_resolution 16"]),
        ("optim.warmup=x", ["optim.warmup='x'"]),
        ("seed=-1", ["seed=-1"]),
    ],
)
def test_pretraining_mistakes(command: CommandLine, overrides: str, parts: list[str]) -> None:
    line = command("pretrain", *PRETRAIN, "total_images=32", overrides).error
    assert [part for part in parts if part not in line] == [], line
    assert command.files() == []


def test_random_initial_weights(command: CommandLine, tiny: str) -> None:
    """The control of the method: the same training without the pre-training."""
    network = "{model_type: DhariwalUNet, model_channels: 8, channel_mult: [1,2], num_blocks: 1}"
    ended = train(
        command, "null", 16, f"init.network={network}", f"discriminator.network={tiny}",
        "freeze.level=0",
    )  # fmt: skip
    assert ended.code == 0, ended
    metadata = load_network_file("run/checkpoints/0000000016/ema.safetensors").metadata
    assert metadata["base_model"] == ""


def _python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )


def test_the_real_commands(tmp_path: Path) -> None:
    """What the tests above call in one process behaves the same as `python -m`."""
    for arguments, part in (
        (["fastgan.train", "experiment=demo", "bach=3", "run_dir=run"], "'bach'"),
        (["fastgan.sample", "checkpoint=absent", "out=x", "device=cpu"], "checkpoint=absent"),
    ):
        done = _python(tmp_path, *arguments)
        assert done.returncode == 1 and done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("error: ") and part in line
    assert _python(tmp_path, "fastgan.evaluate", "--help").returncode == 0
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_torchrun_trains_like_one_process(tmp_path: Path) -> None:
    tiny = network_file(tmp_path / "tiny.safetensors")
    folder = tmp_path / "here"
    folder.mkdir()
    common = ["fastgan.train", *SMALL, f"init.path={tiny}", "total_images=136", "snapshot=64"]
    assert _python(folder, *common, "run_dir=one").returncode == 0
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    done = _python(
        folder, *launch, *common, "run_dir=two", "eval.extractor=pca:4", "eval.images=32"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes x 1 rounds x 4") == 1
    # The parameters themselves are compared in float64 where the step is tested.
    lines = [(folder / name / "stats.jsonl").read_text().splitlines() for name in ("one", "two")]
    one, two = (json.loads(first) for first, *_ in lines)
    for key in ("Progress/kimg", "Loss/G", "Loss/D"):
        assert two[key] == pytest.approx(one[key], rel=1e-3)
    assert sorted(os.listdir(folder)) == ["one", "two"]
    assert len((folder / "two" / "log.txt").read_text().splitlines()) < 12
