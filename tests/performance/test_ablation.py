"""Part `ablation`: its rows, its pictures and decoding, its table, its drawing."""

import copy
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.gpu_report import ablation, ablation_plot, rounds, variants
from benchmarks.gpu_report.markdown import DRY_RUN, markdown
from benchmarks.gpu_report.pictures import write_pictures
from benchmarks.gpu_report.results import samples
from fastgan import config as cfg
from fastgan.data import open_dataset

EXPERIMENT = "imagenet64_d2o_f"


def test_each_row_adds_what_its_name_says() -> None:
    rows = {
        each.name: each.config(EXPERIMENT, None, True)
        for each in ablation.variants("published", "shared", Path("x.zip"))
    }
    assert list(rows) == list(ablation_plot.TITLES)
    plain, compiled, fast = cfg.Engine.plain, cfg.Engine.compiled, cfg.Engine.fast
    engines = [plain] * 3 + [compiled] + [fast] * 5
    assert [config.engine for config in rows.values()] == engines
    bf16 = cfg.Precision.bf16
    assert [c.precision is bf16 for c in rows.values()] == [False] * 2 + [True] * 7
    kernels = [config.kernels.value for config in rows.values()]
    assert kernels == ["library"] * 3 + ["auto"] * 6
    assert [(c.fast.fold, c.fast.graphs) for c in rows.values()][4:] == [
        (False, False),
        (True, False),
        *[(True, True)] * 3,
    ]
    assert [c.data.resident for c in rows.values()] == [False] * 7 + [True] * 2
    assert [c.share_fakes for c in rows.values()] == [False] * 8 + [True]
    assert {(c.data.path, c.data.workers) for c in rows.values()} == {("x.zip", 4)}
    hooks = [each.prepare for each in ablation.variants("published", "shared")]
    assert hooks == [variants.nothing] + [ablation.channels_last] * 8


@pytest.mark.parametrize("experiment", ablation.CASES)
def test_cases_pass_on_their_last_row_and_end_in_time(experiment: str) -> None:
    found = list(ablation.CASES[experiment])
    assert found[0][0] == "published" and found[-1][1] == "shared"
    assert [first for first, _ in found[1:]] == [last for _, last in found[:-1]]
    assert all(seconds < 9 * 60 - 60 for seconds in ablation.CASES[experiment].values())


def test_the_rows_of_a_case_and_its_published_batch() -> None:
    found = ablation.variants("compile", "folded")
    assert [each.name for each in found] == ["compile", "kernels", "folded"]
    config = found[0].config(EXPERIMENT, None, False)
    assert config.batch == config.batch_gpu == 128


@pytest.mark.parametrize(("count", "channels", "label_dim"), [(6, 3, 1000), (9, 1, 4), (4, 3, 0)])
def test_pictures_are_a_dataset(count: int, channels: int, label_dim: int, tmp_path: Path) -> None:
    shape = {"resolution": 16, "channels": channels, "label_dim": label_dim}
    for name in ("a.zip", "b.zip"):
        write_pictures(tmp_path / name, count, **shape)
    data = open_dataset(tmp_path / "a.zip")
    assert (len(data), data.resolution, data.channels) == (count, 16, channels)
    assert data.label_dim == label_dim and (data.labels is None) == (label_dim == 0)
    images = data.images(np.arange(count)).astype(int)
    assert len({image.tobytes() for image in images}) == count
    # Of white noise neighbours differ by more than the deviation.
    assert 10 < np.abs(np.diff(images)).mean() < 0.8 * images.std(), "smooth, and not flat"
    again = open_dataset(tmp_path / "b.zip")
    assert (again.images(np.arange(count)) == images).all(), "the same every time"


class Numbers:
    """A live step that notes which batches and iterations it was asked for."""

    def __init__(self, workers: int = 4) -> None:
        self.config = SimpleNamespace(data=cfg.DataConfig(workers=workers))
        settings = SimpleNamespace(r1_interval=16)
        self.step = SimpleNamespace(settings=settings, settling=1, run=self._run)
        self.drawn: list[int] = []
        self.iterations: list[int] = []
        self.left_out = torch.zeros(())

    def draw(self, number: int) -> tuple[None, None]:
        self.drawn.append(number)
        return None, None

    def _run(self, reals: None, labels: None, iteration: int) -> SimpleNamespace:
        self.iterations.append(iteration)
        # As a recorded step does: the same tensor, with another value.
        return SimpleNamespace(skipped={"G": self.left_out.fill_(iteration % 2)})


def test_batches_follow_one_another_while_iterations_jump() -> None:
    live = Numbers()
    running = variants.Running(live, variants.take_settings())  # type: ignore[arg-type]
    for iteration in (1, 16, 2, 32):
        running.run(iteration)
    assert live.drawn == [1, 2, 3, 4] and running.skipped == 1
    taken = rounds._turn(running, 1, ablation.PACE)
    assert live.iterations[4:] == list(range(54, 65)), "the last one, 4 x 16, has R1"
    assert len(taken) == 3 and all(seconds >= 0 for seconds in taken)
    # What four threads had decoded meanwhile, 5 to 8, is not used.
    assert live.drawn[4:] == list(range(10, 21))


def test_a_reading_is_the_mean_of_its_iterations(monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(calls: list[Any]) -> list[float]:
        for call in calls:
            call()
        return [4.0, 8.0, 3.0]

    monkeypatch.setattr(rounds, "timed", timed)
    running = variants.Running(Numbers(), variants.take_settings())  # type: ignore[arg-type]
    assert rounds._turn(running, 0, ablation.PACE) == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("first", "threads"), [("layout", True), ("resident", False)])
def test_a_row_reads_the_dataset(first: str, threads: bool, tmp_path: Path) -> None:
    """A step of a small network on pictures: decoded ahead or resident, and ended in the end."""
    write_pictures(tmp_path / "x.zip", 4, resolution=16, channels=3, label_dim=1000)
    (row,) = ablation.variants(first, first, tmp_path / "x.zip")
    config = row.config(EXPERIMENT, 2, True)
    # Rows from `compile` on would take long here, and read no other way.
    config.engine = cfg.Engine.plain
    with ExitStack() as stack:
        running, facts = variants.build(config, row.prepare, stack)
        reals, labels = running.draw()
        batches = running.live.draw
        assert ("ahead by 4 threads" in batches.description) is threads
    assert facts["batch"] == 2 and reals.shape == (2, 3, 16, 16) and labels is not None
    whole = open_dataset(tmp_path / "x.zip").images(np.arange(4))
    pixels = ((reals + 1) * 127.5).round().numpy().astype(np.uint8)
    assert all(any((image == one).all() for one in whole) for image in pixels)
    weights = [p for p in running.live.step.discriminator.parameters() if p.ndim == 4]
    assert any(not p.is_contiguous() for p in weights), "channels_last from `layout` on"
    if threads:
        with pytest.raises(RuntimeError, match="after shutdown"):
            running.draw()


def content(speeds: dict[str, float | None], **changes: Any) -> dict[str, Any]:
    """A case of rows at so many images per second; None: it failed."""
    ran = {name: speed for name, speed in speeds.items() if speed}
    found: dict[str, Any] = {"experiment": EXPERIMENT, "matmul_rate": 8e14, "dry_run": False}
    found |= {key: None for key in ("chip", "device", "datetime", "software")}
    found["variants"] = {name: _row(speed) for name, speed in speeds.items()}
    found["ratios"] = {
        base: {n: samples([speed / ran[base]]) for n, speed in ran.items() if n != base}
        for base in ran
    }
    return found | changes


def _row(speed: float | None) -> dict[str, Any]:
    if speed is None:
        return {"error": "out of memory", "facts": None}
    peak = {"allocated": 20e9, "reserved": 30e9}
    found = {"error": None, "facts": {"batch": 128, "peak_r1": peak}, "img_s": speed, "mfu": 0.25}
    return found | {"iteration_ms": samples([128e3 / speed]), "r1_extra_ms": 40.0}


FOUND = {
    f"{EXPERIMENT}-compile": content(
        {"published": 50.0, "layout": 60.0, "precision": None, "compile": 240.0},
        chip="NVIDIA H200",
    ),
    # The same row in another process is a little slower there.
    f"{EXPERIMENT}-folded": content({"compile": 220.0, "kernels": 264.0, "folded": 330.0}),
}


def test_gains_are_of_rows_that_took_turns() -> None:
    found = ablation.merged(copy.deepcopy(FOUND))
    assert found["chip"] == "NVIDIA H200"
    rows = found["experiments"][EXPERIMENT]["rows"]
    assert list(rows) == ["published", "layout", "precision", "compile", "kernels", "folded"]
    above = {name: each["above"] for name, each in rows.items()}
    assert above["layout"] == "published" and above["folded"] == "kernels"
    assert above["compile"] == "layout", "the nearest row above that ran"
    assert rows["compile"]["gain"]["median"] == pytest.approx(4)
    assert rows["kernels"]["gain"]["median"] == pytest.approx(1.2)
    assert rows["precision"]["total"] is None and rows["published"]["total"] == 1
    assert rows["folded"]["total"] == pytest.approx(1.2 * 4 * 1.2 * 1.25)
    assert rows["compile"]["img_s"] == 240 and rows["compile"]["again"] == 220
    assert rows["kernels"]["again"] is None and rows["folded"]["again"] is None


def test_without_the_case_above_there_is_no_total() -> None:
    last = {f"{EXPERIMENT}-folded": FOUND[f"{EXPERIMENT}-folded"]}
    rows = ablation.merged(last)["experiments"][EXPERIMENT]["rows"]
    assert rows["kernels"]["gain"]["median"] == pytest.approx(1.2)
    assert {each["total"] for each in rows.values()} == {None}


def test_the_table_and_the_drawing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = {"dry_run": False, "missing": {}, "ablation": ablation.merged(FOUND)}
    text = markdown(report)
    lines = {line.split(" | ")[0]: line.split(" | ")[1:] for line in text.splitlines()}
    assert lines["| compile"] == [
        *("128", "240.0", "4.000", "4.80", "533.3", "40.0", "25.0%", "30.0"),
        "220.0 |",
    ]
    assert lines["| precision"][0] == "out of memory" and DRY_RUN not in text
    ablation_plot.write(report, tmp_path)
    picture = Image.open(tmp_path / "ablation.png")
    assert picture.width > 800 and len(picture.convert("RGB").getcolors(10**6) or []) > 20
    ablation_plot.write({"dry_run": False}, tmp_path / "absent")
    assert capsys.readouterr().out == ""


def test_without_matplotlib_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    ablation_plot.write({"ablation": ablation.merged(FOUND)}, tmp_path)
    assert "not drawn" in capsys.readouterr().out and not list(tmp_path.iterdir())
