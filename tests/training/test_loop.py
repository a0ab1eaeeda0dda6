"""The loop: what it writes and when, how it ends, and that it goes on where it stopped."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from fastgan.checkpoint.network_file import network_from_file
from fastgan.checkpoint.store import latest_checkpoint, load_checkpoint
from fastgan.common.errors import UserError
from fastgan.models import Precond
from fastgan.training.loop import Schedule, run_loop
from fastgan.training.monitor import Diverged
from fastgan.training.state import StepResult, trainable
from fastgan.training.step import PlainStep
from fastgan.training.updater import averaged_copy
from tests.conftest import TINY, live_network
from tests.training.toys import (
    ALONE,
    assert_same,
    diffusion_heads,
    everything,
    generator,
    reals,
    settings,
    watched,
)

REPORTED = {
    "Loss/G",
    "Loss/D",
    "Loss/sign_real",
    "Loss/sign_fake",
    "Loss/diversity",
    "Progress/kimg",
    "Progress/skipped",
    "Timing/img_per_sec",
    "Timing/sec_per_kimg",
    "Resources/peak_gpu_mem_gb",
    "timestamp",
}


class Counting:
    """A step that counts; iteration k reports k and does what `at` says for it."""

    def __init__(self, **at: Any) -> None:
        self.average = averaged_copy(live_network(TINY))
        self.at = {int(k.removeprefix("k")): action for k, action in at.items()}
        self.seen: list[int] = []

    def run(self, reals: torch.Tensor, labels: Any, iteration: int) -> StepResult:
        self.seen.append(iteration)
        action = self.at.get(iteration)
        if isinstance(action, BaseException):
            raise action
        skipped = {"G": torch.tensor(float(action == "skip")), "D": torch.zeros(())}
        return StepResult({"Loss/G": torch.tensor(float(iteration))}, skipped)

    def state(self) -> dict[str, torch.Tensor]:
        return {"generator/x": torch.zeros(1)}

    def load_state(self, state: dict[str, torch.Tensor]) -> None:
        pass

    def blamed(self) -> dict[str, list[str]]:
        return {"generator": ["conv.weight"], "discriminator": []}

    def checksum(self) -> torch.Tensor:
        return torch.zeros(1, dtype=torch.float64)


def train(
    step: Any, run_dir: Path, total: int, *, tick: int = 8, snapshot: int = 16, keep: int = 2, **how
) -> list[int]:
    """Runs the loop with batches of 4; returns the images at which it evaluated."""
    (run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
    evaluated: list[int] = []
    metric = how.get("metric", lambda nimg: {})

    def evaluate(network: Precond, nimg: int) -> dict[str, float]:
        assert network is step.average
        evaluated.append(nimg)
        return metric(nimg)

    run_loop(
        step,
        how.get("draw", lambda k: (reals(k), None)),
        Schedule(4, total, tick, snapshot, keep),
        run_dir,
        ALONE,
        network_config=dict(TINY),
        provenance={"license": "test"},
        evaluate=evaluate,
        explained=how.get("explained", nullcontext),
    )
    return evaluated


def stats(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]


def state(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "state.json").read_text())


def saved(run_dir: Path) -> list[int]:
    return sorted(int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.is_dir())


def test_ticks_and_snapshots(tmp_path: Path) -> None:
    evaluated = train(Counting(), tmp_path, 36, tick=10, snapshot=16)
    # The first batch of 4 that reaches a multiple, and the last one.
    assert [round(1000 * line["Progress/kimg"]) for line in stats(tmp_path)] == [12, 20, 32, 36]
    assert evaluated == [16, 32, 36]
    # Means over the iterations since the line before: 0-2, 3-4, 5-7, 8.
    assert [line["Loss/G"] for line in stats(tmp_path)] == [1.0, 3.5, 6.0, 8.0]
    assert state(tmp_path) == {"status": "done", "nimg": 36, "exit_code": 0, "message": ""}
    log = (tmp_path / "log.txt").read_text().splitlines()
    assert len(log) == 5 and log[0].startswith("first iteration after ")
    assert "0.0 kimg" in log[1] and "G 1.0000" in log[1]


def test_keys_of_a_gan_tick(tmp_path: Path) -> None:
    network = generator()
    step = PlainStep(network, averaged_copy(network), watched(), settings(), ALONE)
    train(step, tmp_path, 72, tick=36, snapshot=72)
    first, second = stats(tmp_path)
    assert set(first) == REPORTED and set(second) == REPORTED | {"Loss/R1"}
    speed = second["Timing/img_per_sec"] * second["Timing/sec_per_kimg"]
    assert speed == pytest.approx(1000) and second["Resources/peak_gpu_mem_gb"] == 0
    assert -1 <= second["Loss/sign_fake"] <= 1


def test_while_it_runs_the_state_says_so(tmp_path: Path) -> None:
    seen = []
    train(Counting(), tmp_path, 16, tick=8, draw=lambda k: (seen.append(state(tmp_path)), None))
    assert [s["nimg"] for s in seen] == [0, 0, 8, 8]
    assert {s["status"] for s in seen} == {"running"} and seen[0]["exit_code"] is None


def test_evaluation_is_left_out_of_the_speed(tmp_path: Path) -> None:
    def slow(nimg: int) -> dict[str, float]:
        time.sleep(0.8)
        return {}

    def draw(iteration: int) -> tuple[torch.Tensor, None]:
        time.sleep(0.02)
        return reals(iteration), None

    # Two of the four iterations of the tick lie before the evaluation, two after it.
    train(Counting(), tmp_path, 16, tick=16, snapshot=8, metric=slow, draw=draw)
    seconds = 16 / stats(tmp_path)[0]["Timing/img_per_sec"]
    assert 4 * 0.02 <= seconds < 0.8


def test_metrics_are_written_and_the_best_checkpoint_kept(tmp_path: Path) -> None:
    values = {4: 9.0, 8: 2.0, 12: math.nan, 16: 5.0, 20: 4.0}
    train(Counting(), tmp_path, 20, snapshot=4, metric=lambda nimg: {"Metric/FD": values[nimg]})
    assert saved(tmp_path) == [8, 16, 20]
    found = [line["Metric/FD"] for line in stats(tmp_path) if "Metric/FD" in line]
    assert found == [9.0, 2.0, None, 5.0, 4.0]
    assert (tmp_path / "checkpoints" / "latest").read_text().strip() == "0000000020"
    assert "Metric/FD 4.0000" in (tmp_path / "log.txt").read_text()


def test_every_line_of_the_statistics_is_strict_json(tmp_path: Path) -> None:
    step = Counting()
    result = StepResult({"Loss/G": torch.tensor(math.nan)}, {"G": torch.zeros(())})
    step.run = lambda *a: result  # type: ignore[method-assign]
    train(step, tmp_path, 8)
    (line,) = (tmp_path / "stats.jsonl").read_text().splitlines()
    refuse = {"parse_constant": lambda name: pytest.fail(f"{name} is no JSON")}
    assert json.loads(line, **refuse)["Loss/G"] is None


def test_ten_skipped_iterations_in_a_row_diverge(tmp_path: Path) -> None:
    skips = {f"k{k}": "skip" for k in [*range(2, 11), *range(12, 22)]}
    step = Counting(**skips)
    with pytest.raises(Diverged, match="in 10 iterations in a row, at 96 images"):
        train(step, tmp_path, 400, tick=12, snapshot=400)
    # 9 skips, one update, then 10 skips: the tick after iteration 23 finds them, although 22 and 23
    # were fine.
    assert step.seen[-1] == 23
    found = state(tmp_path)
    assert (found["status"], found["exit_code"], found["nimg"]) == ("diverged", 3, 96)
    assert "not finite" in found["message"]
    assert [line["Progress/skipped"] for line in stats(tmp_path)] == [1, 3, 3, 2, 3, 3, 3, 1]
    assert "left out 2 updates of G" in (tmp_path / "log.txt").read_text()
    why = json.loads((tmp_path / "diverged" / "why.json").read_text())
    assert (why["nimg"], why["iteration"]) == (96, 24)
    assert why["not_finite"] == {"generator": ["conv.weight"], "discriminator": []}
    assert why["means"] == {"Loss/G": "22.0"}
    assert load_checkpoint(latest_checkpoint(tmp_path / "diverged")).nimg == 96


def test_trouble_is_said_once(tmp_path: Path) -> None:
    step = Counting()
    values = {"Loss/diversity": torch.tensor(0.1)}
    step.run = lambda *a: StepResult(values, {"G": torch.zeros(())})  # type: ignore[method-assign]
    train(step, tmp_path, 32, tick=4)
    assert (tmp_path / "log.txt").read_text().count("G may be collapsing") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (UserError("entry 3 is damaged"), "entry 3 is damaged"),
        (ZeroDivisionError("oh"), "ZeroDivisionError: oh"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (
            RuntimeError("CUDA error.\n\tTry\x1b[31m\nagain"),
            r"RuntimeError: CUDA error. Try\x1b[31m again",
        ),
    ],
)
def test_a_run_that_fails_says_so(tmp_path: Path, error: BaseException, message: str) -> None:
    with pytest.raises(type(error)):
        train(Counting(k3=error), tmp_path, 40)
    assert state(tmp_path) == {
        "status": "failed", "nimg": 12, "exit_code": 1, "message": message
    }  # fmt: skip


def test_a_run_that_fails_says_so_in_the_words_that_explain_it(tmp_path: Path) -> None:
    @contextmanager
    def explained() -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise UserError("out of memory, batch_gpu=2 would be right") from error

    with pytest.raises(UserError, match="batch_gpu=2"):
        train(Counting(k3=RuntimeError("CUDA out of\nmemory")), tmp_path, 40, explained=explained)
    assert state(tmp_path)["message"] == "out of memory, batch_gpu=2 would be right"


def test_resuming_continues_the_count(tmp_path: Path) -> None:
    train(Counting(), tmp_path, 16)
    step = Counting()
    assert train(step, tmp_path, 32) == [32]
    assert step.seen == [4, 5, 6, 7]
    assert [round(1000 * line["Progress/kimg"]) for line in stats(tmp_path)] == [8, 16, 24, 32]


def test_a_finished_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(Counting(), tmp_path, 16)
    step = Counting()
    train(step, tmp_path, 16)
    assert step.seen == [] and state(tmp_path)["status"] == "done" and state(tmp_path)["nimg"] == 16
    assert f"16 images are trained in {tmp_path}, nothing left to do" in capsys.readouterr().err


def test_another_network_is_refused(tmp_path: Path) -> None:
    train(Counting(), tmp_path, 16)
    step = Counting()
    step.average = live_network({**TINY, "model_channels": 16})
    with pytest.raises(UserError, match=r"0000000016 holds another network than this run's"):
        train(step, tmp_path, 32)


@pytest.mark.parametrize("level", [0, 1])
def test_interrupted_and_resumed_equals_uninterrupted_bitwise(tmp_path: Path, level: int) -> None:
    def fresh() -> PlainStep:
        network = generator(level, dtype=torch.float32)
        d = diffusion_heads(network, augment=("color", "translation"))
        return PlainStep(network, averaged_copy(network), d, settings(), ALONE)

    def draw(k: int) -> tuple[torch.Tensor, None]:
        return reals(k, dtype=torch.float32), None

    whole, resumed = fresh(), fresh()
    train(whole, tmp_path / "whole", 80, draw=draw)
    train(fresh(), tmp_path / "parts", 28, snapshot=28, draw=draw)
    # What a fresh process holds in the trained parameters must not matter.
    for parameter in trainable(resumed.generator).values():
        parameter.data.fill_(7.0)
    train(resumed, tmp_path / "parts", 80, draw=draw)
    assert_same(everything(resumed), everything(whole))
    assert latest_checkpoint(tmp_path / "parts" / "checkpoints").name == "0000000080"
    saved_average = network_from_file(
        tmp_path / "parts" / "checkpoints" / "0000000080" / "ema.safetensors"
    )
    assert_same(dict(saved_average.state_dict()), dict(whole.average.state_dict()))
