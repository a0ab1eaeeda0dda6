"""The page against numbers computed here, for runs in every state."""

import base64
import hashlib
import json
import math
import runpy
import statistics
import sys
from pathlib import Path

import pytest

from fastgan.common.errors import UserError
from fastgan.run_report.page import names_of, write_report
from fastgan.run_report.run import read_run
from tests.command_line import CommandLine, network_file
from tests.run_report.pages import (
    Page,
    add_checkpoint,
    add_sample,
    make_run,
    metric,
    page_of,
    set_state,
    tick,
)

TOOL = Path(__file__).parents[2] / "tools" / "report.py"


def everything_in(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_a_real_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = CommandLine(tmp_path / "here", capsys, monkeypatch)
    ended = command(
        "train", "experiment=demo", "batch=8", "tick=16", "optim.lr_g=1e-3", "total_images=64",
        "optim.decay_from=null", f"init.path={network_file(tmp_path / 'tiny.safetensors')}",
        "snapshot=32", "run_dir=run", "eval.extractor=pca:4", "eval.images=32",
        "eval.reference=digits/val",
    )  # fmt: skip
    assert ended.code == 0
    run = Path("run")
    before = everything_in(run)
    page = page_of(run)
    after = everything_in(run)
    assert after.keys() - before.keys() == {"run/report.html"}
    assert {name: after[name] for name in before} == before

    records = [json.loads(line) for line in (run / "stats.jsonl").read_text().splitlines()]
    speeds = [r["Timing/img_per_sec"] for r in records if "Timing/img_per_sec" in r]
    assert f"median {statistics.median(speeds):.4g} img/s" in page.fact("Speed")
    assert page.fact("Speed").endswith("over 4 ticks)")
    (key,) = {key for r in records for key in r if key.startswith("Metric/")}
    best, at = min((r[key], r["Progress/kimg"]) for r in records if key in r)
    assert page.fact(f"Best {key[7:]}") == f"{best:.4g} at {at:.1f} thousand images"
    assert page.fact("Images") == "64 of 64"
    warned = [x for x in (run / "log.txt").read_text().splitlines() if x.startswith("warning:")]
    assert page.pre[: len(page.pre) - 1] == (["\n".join(warned)] if warned else [])
    assert "done" in page.words and page.pre[-1] == (run / "config.yaml").read_text()
    for folder in ("0000000032", "0000000064"):
        content = (run / "checkpoints" / folder / "ema.safetensors").read_bytes()
        assert hashlib.sha256(content).hexdigest() in page.words
    grids = [base64.b64decode(uri.partition(",")[2]) for uri in page.images()]
    assert grids == [(run / f"samples/00000000{n}.png").read_bytes() for n in (32, 64)]
    assert page.titles() == [
        key[7:], "Losses", "Mean sign of D's logits", "Diversity", "Updates left out",
        "Images per second",
    ]  # fmt: skip
    # One feature network, the diffusion encoder.
    assert f"Loss/G {math.log(2):.2f} and Loss/D {2 * math.log(2):.2f} (dotted)" in page.text


def test_what_was_measured_stands_beside_its_grid_and_checkpoint(tmp_path: Path) -> None:
    lines = [tick(4), metric(4, 3.0), tick(8), metric(8, 2.0), tick(12), metric(12, 5.0)]
    run = make_run(tmp_path / "run", lines)
    for nimg, value in ((4000, 3.0), (8000, 2.0), (12_000, 5.0)):
        add_sample(run, nimg)
        add_checkpoint(run, nimg, f"{nimg:064x}", **{"Metric/FD-x": value})
    page = page_of(run)
    assert page.fact("Best FD-x") == "2 at 8.0 thousand images"
    captions = [word for word in page.words if "thousand images: " in word]
    assert captions == [f"{k}.0 thousand images: FD-x = {v}" for k, v in ((4, 3), (8, 2), (12, 5))]
    # Every row of the table: images, metrics, best or not, sha256.
    cells = page.table_cells
    start = cells.index("4.0")
    assert cells[start : start + 10] == [
        "4.0", "FD-x = 3", f"{4000:064x}", "8.0", "FD-x = 2", "best", f"{8000:064x}", "12.0",
        "FD-x = 5", f"{12_000:064x}",
    ]  # fmt: skip


def test_the_head_of_a_running_run(tmp_path: Path) -> None:
    measured = [(80.0, 30), (200.0, 31), (50.0, 0)]
    keys = ("Timing_img_per_sec", "Resources_peak_gpu_mem_gb", "Timing_mfu")
    lines = [
        tick(k, **dict(zip(keys, (*values, 0.3 + k / 100), strict=True)))
        for k, values in enumerate(measured)
    ]
    run = make_run(tmp_path / "run", lines)
    set_state(run, "running", 2000)
    page = page_of(run)
    assert page.fact("Images") == "2,000 of 8,000"
    assert page.fact("Speed") == "median 80 img/s (50 to 200 over 3 ticks)"
    assert page.fact("MFU") == "median 31.0%"
    assert page.fact("Peak GPU memory") == "31 GiB"
    assert page.fact("Wall time").startswith("0:00:20 from the first tick to the last (2023-11-14")
    assert page.fact("Left") == "about 0:01:15 at the median speed"  # 6000 / 80


def test_before_the_first_tick(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert "not known" in page.words and page.fact("Images") == "0 of 8,000"
    assert page.titles() == [] and page.images() == []
    assert page.words.count("None yet.") == 2  # samples, checkpoints
    assert "Wall time" not in page.words and "Speed" not in page.words


def test_pretraining(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [tick(1, Loss_denoising=700.0)])
    (run / "config.yaml").write_text("experiment_name: pre\ntotal_images: 1M\nnoise: {mean: 0}\n")
    page = page_of(run)
    assert "run, pre-training" in page.words and "Denoising loss" in page.titles()
    assert page.fact("Images") == "1,000 of 1,000,000"


def test_grids_warnings_and_state(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    set_state(run, "failed", 1000, "why it <ended>, as it did")
    contents = [add_sample(run, 1000 * k) for k in range(1, 22)]
    warnings = [f"left out {k} updates of G: loss or gradients not finite" for k in range(150)]
    (run / "log.txt").write_text("first iteration after 2 s\n" + "\n".join(warnings) + "\nok\n")
    page = page_of(run)
    assert "The last 100 of 150:" in page.words
    assert page.pre[0] == "\n".join(warnings[50:])
    assert ("span", {"class": "state failed"}) in page.tags
    assert "why it <ended>, as it did" in page.words and "Left" not in page.words
    shown = [contents.index(base64.b64decode(uri.partition(",")[2])) for uri in page.images()]
    assert shown == [0, 4, 8, 12, 16, 20]


def test_against_another_run(tmp_path: Path) -> None:
    lines = [tick(1), metric(1, 4.0)]
    ours = make_run(tmp_path / "ours", lines, seed=1, run_dir="a")
    other = make_run(tmp_path / "other", [tick(1), metric(1, 3.0), tick(2)], seed=2, run_dir="b")
    set_state(other, "done", 2000)
    page = page_of(ours, other)
    cells = page.table_cells
    assert cells[: cells.index("seed") + 3] == [
        "state", "not known", "done", "images", "1,000", "2,000", "best FD-x",
        "4 at 1.0 thousand images", "3 at 1.0 thousand images", "median img/s", "100", "100",
        "seed", "1", "2",
    ]  # fmt: skip
    assert "run_dir" not in cells and "loss.kind" not in cells
    for label in ("ours: G", "ours: D", "other: G", "other: D", "ours", "other"):
        assert label in page.words
    assert not (other / "report.html").exists()


def test_runs_of_the_same_name(tmp_path: Path) -> None:
    runs = [read_run(make_run(tmp_path / parent / "run")) for parent in ("a/x", "b/x", "b/y")]
    assert names_of(runs[:1]) == ["run"] and names_of(runs[1:]) == ["x/run", "y/run"]
    assert names_of(runs) == ["a/x/run", "b/x/run", "b/y/run"]


def test_mistakes_are_one_line_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, linked = make_run(tmp_path / "run", [tick(1)]), tmp_path / "linked"
    linked.mkdir()
    (linked / "config.yaml").symlink_to(run / "config.yaml")
    for path in (tmp_path, tmp_path / "absent", tmp_path / ("x" * 300), linked):
        for given in ((path, ()), (run, [path])):
            with pytest.raises(UserError, match=r"no such run, .*config\.yaml"):
                write_report(given[0], against=given[1])
    with pytest.raises(UserError, match=r"config\.yaml.*ends with \.html"):
        write_report(run, out=run / "config.yaml")
    with pytest.raises(UserError, match="6 runs, in --against, at most 5"):
        write_report(run, against=[run] * 6)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is not installed.*fastgan\[plot\]"):
        write_report(run)
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "stats.jsonl"]


def test_as_a_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, out = make_run(tmp_path / "run", [tick(1)]), tmp_path / "paper" / "a <b>.html"

    def report(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr("sys.argv", ["tools/report.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(TOOL), run_name="__main__")
        return end.value.code, *capsys.readouterr()

    assert report(run, "--against", run, "--out", out) == (0, f"{out}\n", "")
    words = Page(out.read_text()).words
    assert any(f"tools/report.py {run} --against {run} --out '{out}'" in word for word in words)
    assert not (run / "report.html").exists()
    code, printed, error = report(tmp_path)
    assert (code, printed) == (1, "") and error.startswith(f"error: no such run, {tmp_path}, ")
    assert error.count("\n") == 1
