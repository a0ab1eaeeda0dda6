"""What the report computes from what was measured, and what becomes the project's record."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fastgan_kernels import dispatch

from benchmarks import cases
from benchmarks.gpu_report import cifar10, parts, steps, table
from benchmarks.gpu_report.run import ROOT, Place
from benchmarks.measure import samples
from fastgan import config as cfg
from fastgan.common.errors import UserError
from fastgan.data import open_dataset

H200 = {
    "chip": "NVIDIA H200", "dry_run": False, "datetime": "2030-01-02T03:04:05+00:00",
    "software": {"torch": "2.11"}, "complete": True,
}  # fmt: skip
KEYS = ["id", "metric", "target", "unit", "status", "value", "machine", "command"]
KEYS += ["result_file", "date"]


def facts(batch: int = 64, **changes: Any) -> dict[str, Any]:
    found = {"batch": batch, "interval": 16, "flop_per_image": 5e11, "peak_bytes": 40e9}
    found |= {"first_step_seconds": 12.5, "first_r1_seconds": 3.0, "generator_kept": 2e6}
    return found | changes


def noted(facts: dict[str, Any] | None = None, error: str | None = None) -> dict[str, Any]:
    return {"error": error, "facts": facts, "skipped_updates": 0}


def turns(**variants: dict[str, Any]) -> dict[str, Any]:
    return {"experiment": "x", "matmul_rate": 8e14, "variants": variants, "rounds": []}


def one(seconds: float, r1: float) -> dict[str, Any]:
    return {"iterations": [seconds, seconds, 3 * seconds], "r1": r1}


def step_content() -> dict[str, Any]:
    """The compiled step takes 0.1 s (R1: 0.26) with 64 images, the plain one twice that with 32."""
    content = turns(
        **{
            "plain-published": noted(facts(32, generator_kept=None)),
            "compiled-bf16": noted(facts()),
            "fast-bf16": noted(error="RuntimeError: no such kernel"),
        }
    )
    both = {"plain-published": one(0.2, 0.52), "compiled-bf16": one(0.1, 0.26)}
    content["rounds"] = [{"compiled-bf16": one(0.1, 0.26)}, both, both]
    return table.described(content)


def kernel_rows(seconds: Any, kept: int = 30) -> list[dict[str, Any]]:
    """Of every case of the two ops that targets are about."""
    rows = []
    for op in (table.NORM, table.BLOCK):
        for case in cases.published(op):
            for direction in cases.DIRECTIONS:
                for candidate in cases.REQUIRED:
                    row: dict[str, Any] = {"op": op, "network": case.network.name}
                    row |= {"shape": str(case.shape), "direction": direction}
                    row |= {"candidate": candidate, "count": case.count, "floor_seconds": 1e-6}
                    row |= {"channels": case.channels, "pixels": case.pixels}
                    row |= {"kept_bytes": kept if candidate == "ours" else 60}
                    rows.append(row | {"seconds": samples([seconds(case, candidate)] * 3)})
    return rows


def usual(case: cases.Case, candidate: str) -> float:
    """Ours takes twice the floor, torch.compile three, the library eight times."""
    return {"ours": 2e-6, "compile": 3e-6, "library": 8e-6}[candidate]


def uneven(case: cases.Case, candidate: str) -> float:
    factor = 1.0
    if candidate == "ours":
        if case.op == table.NORM and str(case) == "FFHQ-64-C384-64px":
            factor = 2.0
        if case.op == table.BLOCK and case.channels > 256:
            factor = 0.5
    return factor * usual(case, candidate)


def report() -> dict[str, Any]:
    """What an H200 might have measured."""
    chip = [("copy_bandwidth", 4.3e12), ("matmul_rate_bf16", 8e14), ("matmul_rate_fp32", 5e13)]
    rates = {"table": [{"rate": name, "median": value, "n": 20} for name, value in chip]}
    shares = [("A", 8e12, 0.5), ("B", 3e12, 0.75)]
    convolutions = {
        "table": [
            {"network": n, "flop": flop, "forward": s, "dgrad": s, "dgrad_flipped": s}
            for n, flop, s in shares
        ]
    }
    found = {
        "rates": {"chip": H200 | rates, "convolutions": H200 | convolutions},
        "kernels": {"all": H200 | {"rows": kernel_rows(uneven, 45), "table": []}},
        "steps": {"cifar10_uncond_d2o_f": H200 | step_content()},
    }
    missing = {"parity/x": None, "kernels/y": "it broke"}
    return {"dry_run": False, "missing": missing, "parts": found}


def test_steps_are_medians_and_compared_round_by_round() -> None:
    rows = {row["variant"]: row for row in step_content()["table"]}
    compiled, plain = rows["compiled-bf16"], rows["plain-published"]
    # 15 iterations and one with R1.
    assert compiled["img_s"] == pytest.approx(64 * 16 / (15 * 0.1 + 0.26))
    assert compiled["iteration_ms"] == pytest.approx(100) and compiled["n"] == 9
    assert compiled["r1_adds_ms"] == pytest.approx(160) and compiled["peak_gb"] == 40
    assert compiled["mfu"] == pytest.approx(5e11 * compiled["img_s"] / 8e14)
    assert compiled["vs_plain-published"] == pytest.approx(2 * 2)
    assert plain["vs_compiled-bf16"] == pytest.approx(1 / 4)
    assert plain["kept_vs_compiled-bf16"] is None and compiled["vs_fast-bf16"] is None
    assert rows["fast-bf16"] == {"variant": "fast-bf16", "error": "RuntimeError: no such kernel"}


def test_gains_are_of_rows_that_took_turns() -> None:
    """Of the nearest row above that ran; the same row is a little slower beside the next one."""
    names = ("published", "layout", "precision", "compile", "kernels")
    content = turns(**{name: noted(facts()) for name in names})
    content["variants"]["precision"] = noted(error="out of memory")
    pairs = [("published", 0.4, "layout", 0.2), ("layout", 0.25, "compile", 0.05)]
    pairs += [("compile", 0.06, "kernels", 0.05)]
    content["rounds"] = [{a: one(s, s), b: one(t, t)} for a, s, b, t in pairs]
    found = {row["variant"]: row for row in table.gains(table.described(content))["table"]}
    gains = [found[name].get("vs_above") for name in names]
    assert gains == [None, pytest.approx(2), None, pytest.approx(5), pytest.approx(1.2)]
    assert found["published"]["total"] == 1 and found["kernels"]["total"] == pytest.approx(12)
    later = turns(kernels=noted(facts()), folded=noted(facts()))
    later["rounds"] = [{"kernels": one(0.2, 0.2), "folded": one(0.1, 0.1)}]
    assert [r["total"] for r in table.gains(table.described(later))["table"]] == [None, None]


def test_each_row_adds_what_its_name_says() -> None:
    rows = {row.name: row for row in steps.rows(Path("x.zip"))}
    found = {name: row.config("imagenet64_d2o_f", True) for name, row in rows.items()}
    plain, compiled, fast = cfg.Engine.plain, cfg.Engine.compiled, cfg.Engine.fast
    assert [c.engine for c in found.values()] == [plain] * 3 + [compiled] + [fast] * 5
    bf16 = cfg.Precision.bf16
    assert [c.precision is bf16 for c in found.values()] == [False] * 2 + [True] * 7
    assert [c.kernels.value for c in found.values()] == ["library"] * 3 + ["auto"] * 6
    switches = [(c.fast.fold, c.fast.graphs) for c in found.values()][4:]
    assert switches == [(False, False), (True, False), *[(True, True)] * 3]
    assert [c.data.resident for c in found.values()] == [False] * 7 + [True] * 2
    assert [c.share_fakes for c in found.values()] == [False] * 8 + [True]
    assert [row.channels_last for row in rows.values()] == [False] + [True] * 8
    whole = rows["published"].config("imagenet64_d2o_f", False)
    assert whole.batch == whole.batch_gpu == 128, "as published for one GPU, in one pass"
    assert rows["published"].config("imagenet64_d2o_f", False, 2).batch == 64


class FakeEngines:
    """Variants whose set-up does what `plan` says: an error, or nothing; readings are given."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **plan: list[Exception]) -> None:
        self.plan, self.built = {name: list(events) for name, events in plan.items()}, []
        self.variants: Any = [SimpleNamespace(name=n, channels_last=False, config=self._config(n))
                              for n in plan]  # fmt: skip
        monkeypatch.setattr(steps, "build", self._build)
        monkeypatch.setattr(steps, "_free", lambda: None)

    def _config(self, name: str) -> Any:
        return lambda experiment, tiny, divisor: SimpleNamespace(name=name, batch=64 // divisor)

    def _build(self, config: Any, *_: Any) -> tuple[Any, dict[str, Any]]:
        self.built.append((config.name, config.batch))
        if self.plan[config.name]:
            raise self.plan[config.name].pop(0)
        turn = lambda index, pace: one(0.1, 0.2)  # noqa: E731
        return SimpleNamespace(skipped=3, turn=turn), facts(config.batch)


@pytest.mark.parametrize("beside", [4, 2])
def test_a_variant_that_fails_costs_no_other(
    beside: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch without memory is halved once; all is on disk as it goes."""
    short = torch.OutOfMemoryError("CUDA out of memory")
    fakes = FakeEngines(
        monkeypatch, a=[short], b=[short, short], c=[UserError("no such engine")], d=[]
    )
    place = Place(tmp_path, "steps/x", True)
    content = steps.measure(place, fakes.variants, steps.TRIAL, beside)
    assert fakes.built == [("a", 64), ("a", 32), ("b", 64), ("b", 32), ("c", 64), ("d", 64)]
    rows = {row["variant"]: row for row in content["table"]}
    assert rows["a"]["batch"] == 32 and rows["a"]["error"] is None
    assert rows["a"]["skipped_updates"] == 3 and rows["d"]["img_s"] > 0
    assert "out of memory" in rows["b"]["error"] and "no such engine" in rows["c"]["error"]
    on_disk = json.loads(place.result.read_text())
    assert on_disk["table"] == content["table"] and not on_disk["complete"]


class Numbers:
    """A live step that notes which batches and iterations it was asked for."""

    def __init__(self) -> None:
        self.config = SimpleNamespace(data=cfg.DataConfig(workers=4))
        self.step = SimpleNamespace(settings=SimpleNamespace(r1_interval=16), run=self._run)
        self.drawn: list[int] = []
        self.iterations: list[int] = []
        self.left_out = torch.zeros(())

    def draw(self, number: int) -> tuple[None, None]:
        self.drawn.append(number)
        return None, None

    def _run(self, reals: None, labels: None, iteration: int) -> SimpleNamespace:
        self.iterations.append(iteration)
        assert dispatch._configured == "reference", "the variant's own settings"
        # As a recorded step does: the same tensor, with another value.
        return SimpleNamespace(skipped={"G": self.left_out.fill_(iteration % 2)})


def test_batches_follow_one_another_while_iterations_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    live, before = Numbers(), steps.take_settings()
    running = steps.Running(live, before | {"kernels": "reference"})  # type: ignore[arg-type]

    def timed(calls: list[Any]) -> list[float]:
        for call in calls:
            call()
        return [4.0, 8.0, 3.0]

    monkeypatch.setattr(steps, "timed", timed)
    taken = running.turn(1, steps.ABLATION)
    assert taken == {"iterations": [1.0, 2.0], "r1": 3.0}, "a reading is the mean of four"
    assert live.iterations == list(range(54, 65)), "the last one, 4 x 16, has R1"
    # What four threads had decoded meanwhile is not used.
    assert live.drawn == list(range(6, 17)) and running.skipped == 5
    assert steps.take_settings() == before


@pytest.mark.parametrize(("count", "channels", "classes"), [(6, 3, 1000), (9, 1, 4), (4, 3, 0)])
def test_pictures_are_a_dataset(count: int, channels: int, classes: int, tmp_path: Path) -> None:
    steps.write_pictures(tmp_path / "a.zip", count, 16, channels, classes)
    data = open_dataset(tmp_path / "a.zip")
    assert (len(data), data.resolution, data.channels) == (count, 16, channels)
    assert data.label_dim == classes and (data.labels is None) == (classes == 0)
    images = data.images(np.arange(count))
    assert len({image.tobytes() for image in images}) == count


def test_convolutions_compute_what_autograd_does(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = {name: each[0] for name, each in parts._convolution(2, 3, 5, 8).items()}
    x, weight = (calls["forward"].args[i].clone().requires_grad_() for i in (0, 1))  # type: ignore[attr-defined]
    y = torch.nn.functional.conv2d(x, weight, padding=1)
    dy = calls["dgrad"].args[0]  # type: ignore[attr-defined]
    dx = torch.autograd.grad(y, x, dy)[0]
    for name, expected in (("forward", y), ("dgrad", dx), ("dgrad_flipped", dx)):
        torch.testing.assert_close(calls[name](), expected, rtol=1e-4, atol=1e-4)


def test_a_junit_report_is_counted() -> None:
    text = '<testcase name="a"/><testcase name="b"><skipped message="no GPU"/></testcase>'
    text += (
        '<testcase name="c"><failure message="assert 1 == 2&#10;where">text</failure></testcase>'
    )
    text += '<testcase name="d"><error message="no fixture"/></testcase>'
    found = parts.read_junit(f"<testsuites><testsuite>{text}</testsuite></testsuites>")
    assert found["table"] == [{"passed": 1, "failed": 2, "skipped": 1}]
    assert found["failed"] == ["c: assert 1 == 2", "d: no fixture"]


def test_the_curve_of_a_run(tmp_path: Path) -> None:
    lines = [{"Progress/kimg": k, "Timing/img_per_sec": v} for k, v in ((1.0, 10.0), (2.0, 30.0))]
    lines += [{"Progress/kimg": 2.0, "Metric/FD-resnet56": 7.5}]
    log = tmp_path / "stats.jsonl"
    log.write_text("\n".join(map(json.dumps, lines)) + "\n")
    found = cifar10.curve(log)
    assert found["curve"] == [{"kimg": 2.0, "value": 7.5}] and found["metric"] == "FD-resnet56"
    assert found["img_per_sec"] == {"median": 20.0, "n": 2}


def test_kernels_are_weighted_and_compared_at_the_same_shape() -> None:
    found = table.kernel_numbers(kernel_rows(uneven, 45))
    norms = {str(c): c.count for c in cases.published(table.NORM) if "FFHQ" in str(c)}
    share = sum(norms.values()) / (2 * (sum(norms.values()) + norms["FFHQ-64-C384-64px"]))
    assert found["group_norm_silu_forward_bandwidth"] == pytest.approx(share)
    assert found["group_norm_silu_elsewhere_vs_compile"] == pytest.approx(0.75)
    assert found["frozen_unet_block_narrow_vs_compile"] == pytest.approx(1.5)
    assert found["frozen_unet_block_vs_compile"] == pytest.approx(1.5)
    assert found["frozen_unet_block_kept_memory"] == pytest.approx(0.75)
    even = kernel_rows(usual)
    assert table.kernel_numbers(even)["group_norm_silu_one_pass_vs_eager"] == pytest.approx(4)
    assert table.NORM not in " ".join(table.kernel_numbers(even[1:])), "a shape is absent"
    slow = lambda c, _: 2e-6 if c.network.adm and c.channels in (192, 576, 1152) else 1e-6  # noqa: E731
    adm = table.kernel_numbers(kernel_rows(slow))["group_norm_silu_apexless_channels"]
    assert adm == pytest.approx(0.5)
    line = table.speeds(even, "ours", "forward")
    assert line["x compile"] == pytest.approx(1.5) and line["share of floor"] == pytest.approx(0.5)
    (twice,) = table.both_ways([even[0], even[0] | {"direction": "backward"}])
    assert twice["seconds"]["median"] == pytest.approx(2 * even[0]["seconds"]["median"])


def test_targets_are_recorded_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    rows = [row for row in table.read_targets(ROOT)]
    row = rows[0] | {"metric": "speed, at least", "status": "open", "value": None, "target": 5.0}
    rows.append(row | {"id": "cifar10_uncond_d2o_f_compiled_bf16_vs_plain_published"})
    (tmp_path / "benchmarks/targets.json").write_text(json.dumps(rows))
    folder = tmp_path / table.record(report(), tmp_path)
    assert folder.name == "h200-2030-01-02"
    changed = {r["id"]: r for r in table.read_targets(tmp_path) if r["status"] != "open"}
    assert len(changed) == 10 and changed.keys() - {row["id"] for row in rows} == set()
    missed = changed["cifar10_uncond_d2o_f_compiled_bf16_vs_plain_published"]
    assert missed["value"] == pytest.approx(4) and missed["status"] == "missed"
    assert changed["frozen_unet_block_vs_compile"]["status"] == "measured"
    assert (missed["machine"], missed["date"]) == ("NVIDIA H200", "2030-01-02")
    check_record(tmp_path)
    rates = json.loads((folder / "rates.json").read_text())
    assert rates["copy_bandwidth"] == 4.3e12 and rates["chip"] == "NVIDIA H200"
    assert rates["matmul_rate"] == 8e14 and rates["matmul_rates"]["fp32"] == 5e13
    assert rates["conv_forward_efficiency"] == pytest.approx(11 / (8 / 0.5 + 3 / 0.75))
    text = (folder / "report.md").read_text()
    assert "| compiled-bf16 | 64 | 581.8 | 0.3636 | 100 | 9 | 160 | 40 | 12.5 | 4 |" in text
    assert "- kernels/y: it broke" in text and "- parity/x: not run yet" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dry_run": True}, "measured on NVIDIA H200"),
        (
            {"parts": {"rates": {"a": H200, "b": H200 | {"chip": "NVIDIA A100"}}}},
            "A100, NVIDIA H200",
        ),
        ({"parts": {"rates": {"a": H200 | {"chip": "CPU"}}}}, "measured on CPU"),
    ],
)
def test_what_is_no_measurement_of_an_h200_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        table.record(report() | changes, tmp_path)
    assert not list(tmp_path.iterdir())


def check_record(root: Path) -> None:
    """Open rows hold nothing; measured ones what their file holds and its samples give."""
    for row in table.read_targets(root):
        if row["status"] == "open":
            assert [row[k] for k in ("value", "machine", "result_file", "date")] == [None] * 4
            continue
        file = root / row["result_file"]
        held = json.loads(file.read_text())
        assert held["targets"][row["id"]] == row["value"]
        again = table.numbers({"parts": {file.stem: held["cases"]}})[file.stem]
        assert again[row["id"]] == pytest.approx(row["value"])
        assert row["status"] == ("measured" if table.is_met(row) else "missed")
        assert (row["machine"], row["date"]) == (held["chip"], held["date"])


def test_every_target_is_a_row() -> None:
    rows = table.read_targets(ROOT)
    check_record(ROOT)
    assert all(list(row) == KEYS for row in rows)
    ids = [row["id"] for row in rows]
    assert len(set(ids)) == len(ids) and set(ids) >= table.kernel_numbers(kernel_rows(usual)).keys()
    plan = parts.plan()
    for row in rows:
        assert row["metric"].endswith((", at least", ", at most")) and row["target"] > 0
        words = row["command"].split()
        assert words[:3] == ["python", "tools/gpu_report.py", "--part"] and words[4:] == [
            "--update"
        ]
        assert parts.select(plan, [words[3]]) and row["unit"]
