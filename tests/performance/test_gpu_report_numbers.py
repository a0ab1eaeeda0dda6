"""What the report computes from what was measured, and what becomes the project's record."""

import copy
import json
import shutil
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fastgan_kernels import dispatch

from benchmarks import summarise
from benchmarks.gpu_report import convolutions, parity, rates, rounds, steps, variants
from benchmarks.gpu_report.markdown import DRY_RUN, markdown
from benchmarks.gpu_report.pack import pack
from benchmarks.gpu_report.parts import ROOT
from benchmarks.gpu_report.record import numbers
from benchmarks.gpu_report.results import samples
from benchmarks.gpu_report.speeds import described, images_per_second
from fastgan import config as cfg
from fastgan.common.errors import UserError
from tests.measured_record import check_record
from tools import gpu_report

H200 = {"chip": "NVIDIA H200", "dry_run": False, "datetime": "2030-01-02T03:04:05+00:00"}


def facts(batch: int = 64, **changes: Any) -> dict[str, Any]:
    peak = {"allocated": 30e9, "reserved": 40e9}
    found = {"batch": batch, "interval": 16, "flop_per_image": 5e11, "compiled_before": False}
    found |= {"build_seconds": 1.0, "first_step_seconds": 12.5, "first_r1_seconds": 3.0}
    found |= {"peak": peak, "peak_r1": peak, "launches": {"launches": 900, "kernels": 950}}
    return found | changes


def noted(facts: dict[str, Any] | None = None, error: str | None = None) -> dict[str, Any]:
    return {"attempts": 1, "error": error, "out_of_memory": [], "facts": facts}


def step_progress() -> dict[str, Any]:
    """The compiled step takes 0.1 s (R1: 0.26) with 64 images, the plain one twice that with 32."""
    fast = {"iterations": [0.1, 0.1, 0.3], "r1": 0.26}
    slow = {"iterations": [0.2, 0.2, 0.1], "r1": 0.52}
    return {
        "experiment": "cifar10_uncond_d2o_f",
        "matmul_rates": [7e14, 8e14, 9e14],
        "variants": {
            "plain-published": noted(facts(32)),
            "compiled-bf16": noted(facts(64, compiled_before=True)) | {"skipped_updates": 3},
            "fast-bf16": noted(error="RuntimeError: no such kernel"),
        },
        "rounds": [{"plain-published": slow, "compiled-bf16": fast}] * 2,
    }


def step_content() -> dict[str, Any]:
    return described(step_progress(), variants.BASELINES)


def report() -> dict[str, Any]:
    """What an H200 might have measured: rates, steps and parity, but no kernels."""
    shape = {"batch": 64, "cin": 256, "cout": 256, "size": 32, "kernel": 3, "stride": 1}
    row = shape | {"count": 1, "arithmetic": "bf16", "direction": "forward", "flop": 8e12}
    row |= {"seconds": samples([0.02]), "flops": 4e14, "share": 0.5}
    chip_rates = {name: samples([8e14]) for name in convolutions.ARITHMETIC}
    found = {
        "chip": H200 | {"software": {}, "device": "cuda", "chip_rates": {}},
        "CIFAR-10": {"rows": [row, row | {"count": 3, "share": 0.7, "seconds": samples([0.01])}]},
    }
    found["chip"]["chip_rates"] = {"copy": samples([4.3e12]), **chip_rates}
    file = {"passed": 7, "failed": 1, "skipped": 2}
    file |= {"failures": [{"test": "test_x", "line": "off by 3"}]}
    environment = {"gpu": None, "nvidia_smi": {"clocks.sm": "1980 MHz"}, "software": {}}
    environment |= {"packages": {}, "commit": {"id": "abc", "changed": False}}
    return {
        "dry_run": False,
        "missing": {"traces/x": None, "kernels/y": "it broke"},
        "environment": H200 | environment,
        "rates": rates.merged(found),
        "parity": H200 | parity.merged({"resample": found["chip"] | file}),
        "steps": H200 | {"experiments": {"cifar10_uncond_d2o_f": step_content()}},
    }


def test_images_per_second_count_the_sixteenth_iteration() -> None:
    assert images_per_second(64, 0.1, 0.26, 16) == pytest.approx(64 * 16 / (15 * 0.1 + 0.26))


def test_steps_are_described_by_medians_and_compared_round_by_round() -> None:
    content = step_content()
    compiled = content["variants"]["compiled-bf16"]
    assert compiled["iteration_ms"]["median"] == pytest.approx(100)
    assert compiled["iteration_ms"]["n"] == 6 and compiled["r1_extra_ms"] == pytest.approx(160)
    assert compiled["img_s"] == pytest.approx(64 / 0.11)
    assert content["matmul_rate"] == 8e14
    assert compiled["mfu"] == pytest.approx(5e11 * 64 / 0.11 / 8e14)
    assert content["variants"]["fast-bf16"]["error"].startswith("RuntimeError")
    ratio = content["ratios"]["plain-published"]
    assert ratio.keys() == {"compiled-bf16"} and ratio["compiled-bf16"]["n"] == 2
    assert ratio["compiled-bf16"]["median"] == pytest.approx(2 * 2)
    inverse = content["ratios"]["compiled-bf16"]["plain-published"]["median"]
    assert inverse == pytest.approx(1 / 4)


def test_an_efficiency_weighs_shapes_by_their_time_in_a_pass() -> None:
    """Once 20 ms at 50% and three times 10 ms at 70%."""
    found = report()["rates"]
    expected = (20 * 0.5 + 30 * 0.7) / 50
    assert found["conv_forward_efficiency"] == pytest.approx(expected)
    assert found["by_network"]["CIFAR-10"]["conv_forward_efficiency"] == pytest.approx(expected)
    assert found["chip"] == "NVIDIA H200"
    assert (found["copy_bandwidth"], found["matmul_rate"]) == (4.3e12, 8e14)


def test_directions_compute_what_autograd_does() -> None:
    shape = convolutions.Shape(2, 3, 5, 8, 4, 2)
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    weight = torch.randn(5, 3, 4, 4, requires_grad=True)
    y = torch.nn.functional.conv2d(x, weight, stride=2, padding=1)
    dy = torch.randn_like(y)
    dx, dw = torch.autograd.grad(y, (x, weight), dy)
    for direction, expected in (("forward", y), ("dgrad", dx), ("wgrad", dw)):
        found = convolutions._call(direction, x.detach(), dy, weight.detach(), shape)()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    shape = convolutions.Shape(2, 3, 5, 8, 3, 1)
    weight = torch.randn(5, 3, 3, 3)
    y = torch.nn.functional.conv2d(x, weight, padding=1)
    dy = torch.randn_like(y)
    found = convolutions._call("dgrad_flipped", x.detach(), dy, weight, shape)()
    torch.testing.assert_close(found, torch.autograd.grad(y, x, dy)[0], rtol=1e-4, atol=1e-4)
    assert shape.flop == 2 * 2 * 8 * 8 * 5 * 3 * 9


def test_the_heads_that_are_measured_are_the_discriminators() -> None:
    """10 strided convolutions per branch; those of one image take about 11 GFLOP with VGG."""
    found = convolutions.head_shapes(convolutions.DISCRIMINATORS[32], 32, 1)
    assert sum(found.values()) == 20
    assert {(s.kernel, s.stride) for s in found} == {(4, 2)}
    assert sum(s.flop * n for s, n in found.items()) == pytest.approx(11.4e9, rel=0.05)


def test_a_junit_report_is_counted() -> None:
    cases = '<testcase name="a"/><testcase name="b"><skipped message="no GPU"/></testcase>'
    cases += (
        '<testcase name="c"><failure message="assert 1 == 2&#10;where">text</failure></testcase>'
    )
    cases += '<testcase name="d"><error message="no fixture"/></testcase>'
    found = parity.read_junit(f"<testsuites><testsuite>{cases}</testsuite></testsuites>")
    assert (found["passed"], found["failed"], found["skipped"]) == (1, 2, 1)
    first, second = found["failures"]
    assert first == {"test": "c", "line": "assert 1 == 2"} and second["line"] == "no fixture"


class FakeEngines:
    """Variants whose set-up does what `plan` says: an error, or nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **plan: list[Exception | None]) -> None:
        self.plan, self.built = {name: list(events) for name, events in plan.items()}, []
        fakes = [
            SimpleNamespace(name=name, config=self._config(name), prepare=variants.nothing)
            for name in plan
        ]
        monkeypatch.setattr(steps, "all_variants", lambda: fakes)
        monkeypatch.setattr(rounds, "build", self._build)
        monkeypatch.setattr(rounds, "_turn", lambda running, i, pace: [0.1] * pace.samples + [0.2])
        monkeypatch.setattr(rounds, "product_rate", lambda *_: {"median": 1e12})

    def _config(self, name: str) -> Any:
        return lambda experiment, batch, tiny: SimpleNamespace(name=name, batch=batch or 64)

    def _build(self, config: Any, *_: Any) -> tuple[Any, dict[str, Any]]:
        self.built.append((config.name, config.batch))
        event = self.plan[config.name].pop(0) if self.plan[config.name] else None
        if event is not None:
            raise event
        return SimpleNamespace(skipped=0), facts(config.batch)


def run_steps(folder: Path) -> dict[str, Any]:
    progress = rounds.Progress(folder / "x.progress.json", "demo")
    return steps.measure(progress, False)


def test_a_variant_without_memory_halves_its_batch_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = torch.OutOfMemoryError("CUDA out of memory")
    fakes = FakeEngines(monkeypatch, a=[short], b=[short, short], c=[UserError("no such engine")])
    found = run_steps(tmp_path)["variants"]
    assert fakes.built == [("a", 64), ("a", 32), ("b", 64), ("b", 32), ("c", 64)]
    assert found["a"]["facts"]["batch"] == 32 and found["a"]["out_of_memory"] == [64]
    assert found["b"]["error"] == "out of memory with 64 and 32 images"
    assert found["c"]["error"] == "no such engine"
    assert found["a"]["iteration_ms"]["n"] == steps.PACE.rounds * steps.PACE.samples >= 10
    assert "img_s" not in found["b"]


def test_steps_go_on_after_a_process_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes = FakeEngines(monkeypatch, a=[], b=[RuntimeError("illegal address\nmore")])
    with pytest.raises(rounds.Broken):
        run_steps(tmp_path)
    found = run_steps(tmp_path)["variants"]
    assert found["b"]["error"] == "RuntimeError: illegal address" and found["a"]["img_s"] > 0
    assert fakes.built == [("a", 64), ("b", 64), ("a", 64)]


def test_steps_go_on_with_the_next_round_and_the_first_facts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeEngines(monkeypatch, a=[], b=[])
    indices = []

    def turn(running: Any, index: int, pace: rounds.Pace) -> list[float]:
        indices.append(index)
        if len(indices) == 5:
            raise KeyboardInterrupt
        return [float(len(indices))] * (pace.samples + 1)

    monkeypatch.setattr(rounds, "_turn", turn)
    with pytest.raises(KeyboardInterrupt):
        run_steps(tmp_path)
    assert json.loads((tmp_path / "x.progress.json").read_text())["matmul_rates"] == [1e12]
    content = run_steps(tmp_path)
    assert indices[:4] == [0, 0, 0, 0], "a turn after each set-up, once, and a round"
    assert indices[4:] == [1, 1, 1, 2, 2, 3, 3], "the round that was stopped is measured anew"
    assert content["variants"]["a"]["iteration_ms"]["n"] == 12
    assert content["variants"]["a"]["attempts"] == 1


def test_a_batch_is_halved_where_recording_had_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ends a recording is another error; nothing more is to be had from that process."""
    capture = RuntimeError("operation failed due to a previous error during capture")
    capture.__context__ = torch.OutOfMemoryError("CUDA out of memory")
    fakes = FakeEngines(monkeypatch, a=[], b=[capture])
    with pytest.raises(rounds.Broken):
        run_steps(tmp_path)
    found = run_steps(tmp_path)["variants"]
    assert found["b"]["error"] is None and found["b"]["facts"]["batch"] == 32
    assert fakes.built == [("a", 64), ("b", 64), ("a", 64), ("b", 32)]


def test_a_process_in_which_a_recording_broke_off_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    refused = UserError("the iteration cannot be recorded")
    refused.__cause__ = RuntimeError("stream is capturing")
    FakeEngines(monkeypatch, a=[refused], b=[])
    with pytest.raises(rounds.Broken):
        run_steps(tmp_path)
    assert "RuntimeError: stream is capturing" in capfd.readouterr().err, "the log has it all"
    found = run_steps(tmp_path)["variants"]
    assert found["a"]["error"] == "the iteration cannot be recorded" and found["b"]["img_s"] > 0


def test_a_set_up_that_never_ends_is_left_out_in_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped = [KeyboardInterrupt()] * 2
    FakeEngines(monkeypatch, a=stopped, b=[])  # type: ignore[arg-type]
    for _ in stopped:
        with pytest.raises(KeyboardInterrupt):
            run_steps(tmp_path)
    found = run_steps(tmp_path)["variants"]
    assert found["a"]["error"] == "its set-up did not end, 2 times" and found["b"]["img_s"] > 0


def test_variants_find_their_own_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    before = variants.take_settings()
    monkeypatch.setattr(dispatch, "_configured", "reference")
    torch.backends.cudnn.benchmark = True
    mine = variants.take_settings()
    variants.restore_settings(before)
    live = SimpleNamespace(config=SimpleNamespace(data=cfg.DataConfig()))
    with variants.Running(live, mine).turn():  # type: ignore[arg-type]
        assert dispatch._configured == "reference" and torch.backends.cudnn.benchmark
    assert variants.take_settings() == before


def test_the_published_batch_of_one_gpu_is_one_pass() -> None:
    published = variants.of_engine(cfg.Engine.plain, cfg.Precision.published)
    config = published.config("imagenet64_d2o_f", None, False)
    assert config.batch == config.batch_gpu == 128 and config.precision is cfg.Precision.published
    shared = variants.of_engine(cfg.Engine.compiled, cfg.Precision.bf16, share_fakes=True)
    config = shared.config("cifar10_uncond_d2o_f", 32, False)
    assert (config.batch, config.batch_gpu, config.share_fakes) == (32, 32, True)
    assert shared.name == "compiled-bf16-shared" and config.engine is cfg.Engine.compiled


def test_tables_say_what_was_measured() -> None:
    text = markdown(report())
    rows = [line.split(" | ") for line in text.splitlines()]
    steps = {row[0].removeprefix("| "): row for row in rows if len(row) == 14}
    assert steps["compiled-bf16"][1:4] == ["64", "581.8", "36.4%"]
    assert steps["compiled-bf16"][4:8] == ["100.0", "160.0", "6", "40.0"]
    assert steps["compiled-bf16"][8:] == ["12.5 (cached)", "3.0", "900", "4.00", "-", "- |"]
    assert "- compiled-bf16 skipped 3 updates" in text
    assert steps["fast-bf16"][1] == "RuntimeError: no such kernel"
    assert "| copy, TB/s | 4.300 |" in text and "| CIFAR-10 | 62% | - |" in text
    assert "| 256 to 256, 32 px | 64 | 1 | 400.0 (50%) |" in text
    assert "| all | 7 | 1 | 2 |" in text and "- `test_x`: off by 3" in text
    assert "- traces/x: not run yet" in text and "- kernels/y: it broke" in text
    assert DRY_RUN not in text and DRY_RUN in markdown(report() | {"dry_run": True})


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root whose record a test may change, with rows that the report measures."""
    (tmp_path / "benchmarks").mkdir()
    rows = summarise.read_targets(ROOT)
    blank = dict.fromkeys(("value", "machine", "result_file", "date"))
    wanted = {"cifar10_uncond_d2o_f_compiled_bf16_vs_plain_published": 4.5, "copy_bandwidth": 4e12}
    row = {"metric": "speed, at least", "unit": "x", "status": "open", "command": "", **blank}
    rows = [r | blank | {"status": "open"} for r in rows if r["id"] not in wanted]
    rows += [row | {"id": name, "target": target} for name, target in wanted.items()]
    (tmp_path / "benchmarks/targets.json").write_text(json.dumps(rows))
    shutil.copy(ROOT / "benchmarks/README.md", tmp_path / "benchmarks/README.md")
    return tmp_path


def test_targets_that_exist_are_recorded_with_their_file(root: Path, tmp_path: Path) -> None:
    gpu_report.record(report(), tmp_path / "no-kernels", root)
    rows = {row["id"]: row for row in summarise.read_targets(root)}
    changed = {name: row for name, row in rows.items() if row["status"] != "open"}
    ratio = changed.pop("cifar10_uncond_d2o_f_compiled_bf16_vs_plain_published")
    assert ratio["value"] == pytest.approx(4) and ratio["status"] == "missed"
    bandwidth = changed.pop("copy_bandwidth")
    assert bandwidth["value"] == 4.3e12 and bandwidth["status"] == "measured" and not changed
    check_record(root)
    for row in (ratio, bandwidth):
        assert (row["machine"], row["date"]) == ("NVIDIA H200", "2030-01-02")
    folder = root / "benchmarks/results/h200-2030-01-02"
    names = {"environment.json", "rates.json", "parity.json", "steps.json", "report.md"}
    assert {path.name for path in folder.iterdir()} == names
    assert (folder / "report.md").read_text() == markdown(report())
    assert (
        "| 4.3e+12 | measured | NVIDIA H200, 2030-01-02 |"
        in (root / "benchmarks/README.md").read_text()
    )


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        (None, {"dry_run": True}, "results of a CPU"),
        ("steps", {"chip": "NVIDIA A100"}, "measured on NVIDIA A100, NVIDIA H200"),
        ("environment", None, "part environment"),
    ],
)
def test_what_is_no_measurement_of_an_h200_is_refused(
    part: str | None, changes: dict[str, Any] | None, said: str, root: Path
) -> None:
    content = copy.deepcopy(report())
    if changes is None:
        del content[part]
    else:
        (content if part is None else content[part]).update(changes)
    before = {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    with pytest.raises(UserError, match=said):
        gpu_report.record(content, root / "out", root)
    assert {path: path.read_bytes() for path in root.rglob("*.*") if path.is_file()} == before


def test_numbers_have_the_names_that_the_page_gives() -> None:
    found = numbers(report())
    names = {"copy_bandwidth", "matmul_rate", "conv_forward_efficiency"}
    assert set(found["rates"]) == names
    start = "cifar10_uncond_d2o_f_compiled_bf16_"
    kinds = ("img_s", "mfu", "iteration_ms", "peak_gb", "vs_plain_published")
    assert {name for name in found["steps"] if name.startswith(start)} == {
        start + kind for kind in kinds
    }
    assert found["steps"][start + "peak_gb"] == 40


def test_an_archive_comes_in_pieces(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (folder / "caches/inductor").mkdir(parents=True)
    (folder / "caches/inductor/graph").write_text("large")
    (folder / ".half.json").write_text("{")
    noise = torch.randint(256, (3000,), generator=torch.Generator(), dtype=torch.uint8)
    (folder / "x.json").write_bytes(bytes(noise.tolist()))
    (whole,) = pack(folder, tmp_path / "a.tar.gz")
    pieces = pack(folder, tmp_path / "b.tar.gz", piece_bytes=1024)
    assert [piece.name for piece in pieces] == [f"b.tar.gz.{i:02}" for i in range(len(pieces))]
    assert len(pieces) >= 3 and all(piece.stat().st_size <= 1024 for piece in pieces)
    joined = tmp_path / "joined.tar.gz"
    joined.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    for file in (whole, joined):
        with tarfile.open(file) as archive:
            assert sorted(archive.getnames()) == ["out", "out/x.json"]
    assert pack(folder, tmp_path / "b.tar.gz") == [tmp_path / "b.tar.gz"]
    assert not list(tmp_path.glob("b.tar.gz.*")), "pieces of an earlier archive are gone"
    with pytest.raises(UserError, match="is inside"):
        pack(folder, folder / "a.tar.gz")
