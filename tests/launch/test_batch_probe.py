"""batch_gpu=auto finds what fits, changes nothing else, and running out of memory is one line."""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import pytest
import torch
import yaml
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from fastgan import config as cfg
from fastgan.common import distributed
from fastgan.common.distributed import World
from fastgan.common.errors import UserError
from fastgan.launch import batch_probe, build
from fastgan.launch.batch_probe import GpuMemory, naming_what_fits, settle_batch_gpu
from fastgan.launch.run_dir import open_run_dir
from fastgan.training.edm_step import EdmStep
from fastgan.training.fast import WARMUP
from fastgan.training.step import PlainStep
from tests.command_line import CommandLine, Ended
from tests.conftest import TINY, live_network
from tests.processes import two_processes
from tests.reliability.projected_heads import ProjectedHeads
from tests.training.toys import ALONE

_WORKER = "from tests.launch.test_batch_probe import worker; worker()"
SMALL = (
    *("experiment=demo", "batch=8", "tick=40", "total_images=16", "snapshot=16"),
    *("loss.r1_interval=3", "data.workers=0"),
)


@dataclass
class Card:
    """A pretended GPU: `take` is an iteration that needs so many bytes."""

    total: int = 100
    said: Exception = field(default_factory=lambda: torch.OutOfMemoryError("CUDA out of memory.\n"))
    _peak: int = 0

    def take(self, needed: float) -> None:
        self._peak = max(self._peak, int(needed))
        if needed > self.total:
            raise self.said

    def forget(self) -> None:
        self._peak = 0

    def peak(self) -> int:
        return self._peak


@dataclass
class Pretended:
    """A step whose memory is a function of its batch; R1 takes more, the first iteration most."""

    config: cfg.TrainConfig
    world: World
    card: Card
    per_image: float
    first: float
    ran: list[int] = field(default_factory=list)
    shapes: set[tuple[int, ...] | None] = field(default_factory=set)

    def run(self, reals: Tensor, labels: Tensor | None, iteration: int) -> None:
        self.shapes |= {tuple(reals.shape), None if labels is None else tuple(labels.shape)}
        interval = self.config.loss.r1_interval
        r1 = 1.5 if interval and iteration % interval == 0 else 1
        first = 1 if self.ran else self.first
        self.card.take(self.config.batch_gpu * self.per_image * r1 * first)
        self.ran.append(iteration)


def config(run_dir: Path | str, batch: int, interval: int = 16) -> cfg.TrainConfig:
    made = cfg.TrainConfig(batch=batch, batch_gpu="auto", run_dir=str(run_dir))
    made.loss.r1_interval = interval
    return made


def settled(
    made: cfg.TrainConfig, card: Card, per_image: float, world: World = ALONE, first: float = 1.0
) -> list[Pretended]:
    """The steps that were tried."""
    steps: list[Pretended] = []

    def build(c: cfg.TrainConfig, w: World) -> Pretended:
        steps.append(Pretended(c, w, card, per_image, first))
        return steps[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_probe, "memory_of", lambda device: card)
        # Seconds for nothing here.
        patch.setattr(torch.compiler, "reset", lambda: None)
        patch.setattr(batch_probe, "gc", SimpleNamespace(collect=lambda: None))
        settle_batch_gpu(made, world, live_network({**TINY, "label_dim": 3}), build)
    return steps


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(st.integers(1, 48), st.floats(0.5, 60), st.sampled_from([0, 1, 2, 16]))
def test_the_largest_divisor_that_leaves_a_tenth(batch: int, per_image: float, r1: int) -> None:
    divisors = [d for d in range(1, batch + 1) if batch % d == 0]
    fitting = [d for d in divisors if int(d * per_image * (1.5 if r1 else 1)) <= 90]
    made = config(os.devnull, batch, r1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_probe, "write_config", lambda c: None)
        if fitting:
            settled(made, Card(), per_image)
            assert made.batch_gpu == max(fitting)
        else:
            with pytest.raises(UserError, match="not even one image"):
                settled(made, Card(), per_image)


def test_a_trial_is_this_processes_part_alone_with_enough_iterations_of_each_kind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = config(tmp_path, 24)
    world = World(rank=1, local_rank=1, size=2, device=torch.device("cpu"))
    steps = settled(made, Card(), 14, world)
    # 12 images need 252 with R1; 6 need 126, 4 need 84.
    assert [s.config.batch_gpu for s in steps] == [12, 6, 4] and made.batch_gpu == 4
    assert all(s.config.batch == 12 for s in steps) and made.batch == 24
    assert {(s.world.rank, s.world.local_rank, s.world.size) for s in steps} == {(0, 1, 1)}
    assert steps[-1].shapes == {(12, 1, 8, 8), (12, 3)}
    r1 = [k for k in steps[-1].ran if k % 16 == 0]
    plain = [k for k in steps[-1].ran if k % 16]
    # Warm-up, recording and replay of either kind, and 0 is never R1.
    assert min(len(r1), len(plain)) >= WARMUP + 2 and 0 not in r1
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "4 images per pass, 3 rounds" in out
    assert "BatchNorm (published: 64)" in out
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["batch_gpu"] == 4


@pytest.mark.parametrize(("first", "found"), [(1.7, 8), (1.8, 4)])
def test_what_the_first_iteration_alone_takes_does_not_count(
    tmp_path: Path, first: float, found: int
) -> None:
    made = config(tmp_path, 8)
    settled(made, Card(), 7, first=first)  # 95 or 101 at first, 84 later
    assert made.batch_gpu == found


@pytest.mark.parametrize("value", [None, 2])
def test_a_number_or_null_is_left_alone(tmp_path: Path, value: int | None) -> None:
    made = config(tmp_path, 8)
    made.batch_gpu = value
    assert settled(made, Card(), 1000) == [] and made.batch_gpu == value
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("said", ["CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory"])
def test_libraries_say_it_in_words(tmp_path: Path, said: str) -> None:
    made = config(tmp_path, 4)
    settled(made, Card(total=40, said=RuntimeError(said)), 10)
    assert made.batch_gpu == 2


def test_other_errors_are_not_swallowed(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="device-side"):
        said = RuntimeError("device-side assert triggered")
        settled(config(tmp_path, 4), Card(total=1, said=said), 10)
    with pytest.raises(RuntimeError, match="shape"), naming_what_fits("k", 4, [2]):
        raise RuntimeError("shape")


@pytest.mark.parametrize(
    ("batch", "published", "checkpoint", "advised"),
    [
        (24, 64, False, True),
        (24, 6, False, True),
        (24, 4, False, False),
        (4, 64, False, False),  # all at once
        (24, 64, True, False),
    ],
)
def test_a_batch_below_the_published_one_names_the_last_resort(
    *,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    batch: int,
    published: int,
    checkpoint: bool,
    advised: bool,
) -> None:
    made = config(tmp_path, batch)
    made.loss.published_batch_gpu, made.generator.checkpoint = published, checkpoint
    settled(made, Card(), 14)
    assert made.batch_gpu == 4
    told = capsys.readouterr().out
    assert (", generator.checkpoint=true would allow a larger one; " in told) == advised
    with pytest.raises(UserError, match="not even one") as refused:
        made.batch_gpu = "auto"
        settled(made, Card(total=1), 14)
    assert ("generator.checkpoint=true" in str(refused.value)) != checkpoint


def test_a_gpus_peak_counts_what_others_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """80 of 100 are taken, of which PyTorch holds 50 and held 65: 30 + 65."""
    called = []
    given = {"mem_get_info": (20, 100), "memory_reserved": 50, "max_memory_reserved": 65}
    for name, value in given.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *device, name=name: called.append(name))
    memory = GpuMemory(torch.device("cuda", 0))
    memory.forget()
    assert (memory.total, memory.peak()) == (100, 95)
    assert called == ["synchronize", "empty_cache", "reset_peak_memory_stats"]


def test_what_does_not_fit_another_process_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = iter([1.0, 1.0, 0.0])
    monkeypatch.setattr(distributed, "all_reduce_sum", lambda verdict: verdict + next(others))
    made = config(tmp_path, 12)
    settled(made, Card(total=1000), 1)
    assert made.batch_gpu == 4


@pytest.mark.slow
def test_processes_agree_on_what_fits_the_smallest(tmp_path: Path) -> None:
    """All 12 fit into the first one's 200 bytes; 6 do not into the second one's 70, in R1."""
    two_processes(_WORKER, str(tmp_path), timeout=60)
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["4", "4"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["batch_gpu"] == 4


def worker() -> None:
    world = distributed.init("cpu", timeout_seconds=30)
    folder = Path(sys.argv[1])
    made = config(folder, 24)
    settled(made, Card(total=200 if world.rank == 0 else 70), 10, world)
    (folder / str(world.rank)).write_text(str(made.batch_gpu))
    distributed.barrier()
    distributed.shutdown()


def limited(monkeypatch: pytest.MonkeyPatch, kind: Any, most: int) -> None:
    """Steps of `kind` with more images per pass run out of memory, in the midst of an iteration."""
    run = kind.run

    def short(self, reals, labels, iteration):  # type: ignore[no-untyped-def]
        if self.settings.batch_gpu > most:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return run(self, reals, labels, iteration)

    monkeypatch.setattr(kind, "run", short)


def refusal(ended: Ended) -> str:
    """The one line of an error, behind the bar that a training draws."""
    assert ended.code == 1 and "Traceback" not in ended.err
    line = ended.err.splitlines()[-1]
    assert line.startswith("error: ") and ended.err.count("error: ") == 1
    return line


def assert_same(runs: tuple[str, str], nimg: int) -> None:
    folders = [Path(run, "checkpoints", f"{nimg:010d}") for run in runs]
    for file in ("ema.safetensors", "training.safetensors"):
        given, found = (load_file(folder / file) for folder in folders)
        assert given.keys() == found.keys() and given
        assert all(torch.equal(t, found[n]) for n, t in given.items())


def chosen(run_dir: str) -> object:
    return yaml.safe_load(Path(run_dir, "config.yaml").read_text())["batch_gpu"]


def test_training_is_the_same_as_with_the_number_and_resumes_with_it(
    command: CommandLine, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of heads in which every pass moves something: BatchNorm and spectral norm."""
    small = (*SMALL, f"init.path={tiny}")
    monkeypatch.setattr(build, "discriminator", lambda *given: ProjectedHeads().float())
    assert command("train", *small, "run_dir=given", "batch_gpu=4").code == 0
    with monkeypatch.context() as patch:
        limited(patch, PlainStep, 4)
        patch.setattr(batch_probe, "memory_of", lambda device: Card())
        before = torch.get_rng_state()
        ended = command("train", *small, "run_dir=found", "batch_gpu=auto")
        assert ended.code == 0, ended
        assert torch.equal(torch.get_rng_state(), before)
    assert "1 processes x 8 in rounds of batch_gpu=auto images" in ended.out
    assert "batch_gpu=auto: 4 images per pass, 2 rounds" in ended.out and chosen("found") == 4
    assert_same(("given", "found"), 16)

    # Now all would fit, but the run was begun with 4.
    for run, wish in (("found", "auto"), ("found", "4"), ("given", "4")):
        more = ("total_images=24", f"run_dir={run}", f"batch_gpu={wish}")
        ended = command("train", *small, *more)
        assert ended.code == 0 and chosen(run) == 4 and "batch_gpu=auto:" not in ended.out
    assert_same(("given", "found"), 24)
    assert "batch_gpu=4 (not 8)" in command("train", *small, "run_dir=found", "batch_gpu=8").error


def test_a_saved_batch_gpu_that_is_no_number_is_refused(tmp_path: Path) -> None:
    made = config(tmp_path, 8)
    made.batch_gpu = 4
    open_run_dir(made)
    (tmp_path / "checkpoints" / "0000000008").mkdir()
    file = tmp_path / "config.yaml"
    file.write_text(file.read_text().replace("batch_gpu: 4", "batch_gpu: 2020-01-01"))
    with pytest.raises(UserError, match=r"batch_gpu=.*not auto"):
        open_run_dir(config(tmp_path, 8))


def test_on_a_cpu_auto_is_all_at_once(command: CommandLine) -> None:
    ended = command("train", *SMALL, "total_images=8", "run_dir=run", "batch_gpu=auto")
    assert ended.code == 0 and chosen("run") == 8
    assert "batch_gpu=auto: 8 images per pass, 1 rounds" in ended.out and "on a CPU" in ended.out


def test_running_out_of_memory_is_a_line_with_what_to_try_which_then_works(
    command: CommandLine, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = (*SMALL, f"init.path={tiny}")
    limited(monkeypatch, PlainStep, 2)
    for given, right in (("null", "batch_gpu=4,"), ("4", "batch_gpu=2,")):
        line = refusal(command("train", *small, "run_dir=run", f"batch_gpu={given}"))
        assert "out of memory, with batch_gpu=" in line and right in line
        assert "or generator.checkpoint=true would be right" in line
        failed = json.loads(Path("run/state.json").read_text())
        assert failed["status"] == "failed" and failed["exit_code"] == 1
        assert "error: " + failed["message"] == line
    # Nothing was saved, so that the same folder may be begun again.
    assert command("train", *small, "run_dir=run", "batch_gpu=2").code == 0
    assert chosen("run") == 2 and Path("run/checkpoints/0000000016").is_dir()
    limited(monkeypatch, PlainStep, 0)
    other = ("run_dir=other", "batch_gpu=1")
    line = refusal(command("train", *small, *other))
    assert "with batch_gpu=1, generator.checkpoint=true, precision=bf16" in line
    line = refusal(command("train", *small, *other, "generator.checkpoint=true"))
    assert "with batch_gpu=1, precision=bf16" in line


def test_pretraining_too(command: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    small = (
        *("experiment=demo_pretrain", "batch=8", "total_images=8", "snapshot=8", "tick=8"),
        *("network.model_channels=8", "data.workers=0", "optim.cosine=false"),
        *("eval.sampler.kind=few_step", "eval.sampler.steps=1"),
    )
    limited(monkeypatch, EdmStep, 4)
    line = refusal(command("pretrain", *small, "run_dir=run"))
    assert "batch_gpu=4, the next smaller one, would be" in line
    monkeypatch.setattr(batch_probe, "memory_of", lambda device: Card())
    ended = command("pretrain", *small, "run_dir=run", "batch_gpu=auto")
    assert ended.code == 0 and chosen("run") == 4, ended
    assert "batch_gpu=auto: 4 images per pass, 2 rounds; " in ended.out
    assert command("pretrain", *small, "run_dir=given", "batch_gpu=4").code == 0
    assert_same(("run", "given"), 8)


def test_evaluation_and_other_commands_name_their_own_batch(
    command: CommandLine, tiny: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*arguments: object, **more: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr("fastgan.launch.run.save_grid", short)
    ended = command("train", *SMALL, "run_dir=run", "eval.batch=32")
    assert "with eval.batch=32, eval.batch=16" in refusal(ended)
    monkeypatch.setattr("fastgan.launch.build.few_step", short)
    ended = command("sample", f"checkpoint={tiny}", "out=a.npz", "device=cpu")
    assert "out of memory" in ended.error and "smaller batch" in ended.error
