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
from benchmarks.gpu_report.parts import OPS
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
KEYS += ["result_file", "path", "date"]


def facts(batch: int = 64, **changes: Any) -> dict[str, Any]:
    found = {"batch": batch, "interval": 16, "flop_per_image": 5e11, "peak_bytes": 40e9}
    return found | {"first_step_seconds": 12.5, "generator_kept": 2e6} | changes


def turns(rounds: list[dict[str, Any]], **variants: Any) -> dict[str, Any]:
    """Steps of variants by their facts, or by the line in which they failed."""
    noted = {
        name: {"facts": None, "error": v} if isinstance(v, str) else {"facts": v, "error": None}
        for name, v in variants.items()
    }
    return table.described({"matmul_rate": 8e14, "variants": noted, "rounds": rounds})


def one(seconds: float, r1: float) -> dict[str, float]:
    return {"iteration": seconds, "r1": r1}


def step_content() -> dict[str, Any]:
    """The compiled step takes 0.1 s (R1: 0.26) with 64 images, the plain one twice that with 32."""
    both = {"plain-published": one(0.2, 0.52), "compiled-bf16": one(0.1, 0.26)}
    variants = {"plain-published": facts(32, generator_kept=None), "compiled-bf16": facts()}
    broken = {"fast-bf16": "RuntimeError: no such kernel"}
    return turns([{"compiled-bf16": one(0.1, 0.26)}, both, both], **variants, **broken)


def kernel_rows(op: str, network: str, seconds: dict[str, float]) -> list[dict[str, Any]]:
    """A network's cases of an op; `seconds` by candidate."""
    return [
        {
            **{"network": case.network.name, "shape": str(case.shape), "direction": direction},
            **{"candidate": candidate, "count": case.count, "floor_seconds": 1e-6},
            **{"channels": case.channels, "pixels": case.pixels},
            **{"kept_bytes": 45 if candidate == "ours" else 60},
            **{"seconds": samples([seconds[candidate]] * 3)},
        }
        for case in cases.published(OPS[op].name)
        if case.network.name.startswith(network)
        for direction in cases.DIRECTIONS
        for candidate in cases.REQUIRED
    ]


# Ours takes twice the floor, torch.compile three, the library eight times.
USUAL = {"ours": 2e-6, "compile": 3e-6, "library": 8e-6}


def measured() -> dict[str, Any]:
    """What an H200 might have measured: by case, ImageNet's kernels a little slower."""
    found: dict[str, Any] = {case.name: {} for case in parts.plan()}
    found["rates/chip"] = H200 | {"copy_bandwidth": 4.3e12, "table": {}}
    found["steps/cifar10_uncond_d2o_f"] = H200 | step_content()
    for op in ("norm_silu", "frozen_block"):
        for network in ("CIFAR", "FFHQ", "ImageNet"):
            seconds = USUAL | ({"ours": 2.5e-6} if network == "ImageNet" else {})
            rows = kernel_rows(op, network, seconds)
            found[f"kernels/{op}-{network}"] = H200 | {"table": table.kernel_table(rows)}
    found["kernels/resample-FFHQ"] = {"complete": False, "error": "it broke"}
    return found


def test_steps_are_medians_and_compared_round_by_round() -> None:
    rows = step_content()["table"]
    compiled, plain = rows["compiled-bf16"], rows["plain-published"]
    # 15 iterations and one with R1.
    assert compiled["img_s"] == pytest.approx(64 * 16 / (15 * 0.1 + 0.26))
    assert compiled["iteration_ms"] == pytest.approx(100) and compiled["n"] == 3
    assert compiled["r1_adds_ms"] == pytest.approx(160) and compiled["peak_gb"] == 40
    assert compiled["mfu"] == pytest.approx(5e11 * compiled["img_s"] / 8e14)
    assert compiled["vs_plain-published"] == compiled["total"] == pytest.approx(2 * 2)
    assert plain["vs_compiled-bf16"] == pytest.approx(1 / 4)
    assert "kept_vs_compiled-bf16" not in plain and "vs_fast-bf16" not in compiled
    assert rows["fast-bf16"] == {"error": "RuntimeError: no such kernel"}


def test_gains_are_of_rows_that_took_turns() -> None:
    """Of the nearest row above that ran; the same row is a little slower beside the next one."""
    pairs = [("published", 0.4, "precision", 0.2), ("precision", 0.25, "kernels", 0.05)]
    pairs += [("kernels", 0.06, "graphs", 0.05)]
    rounds = [{a: one(s, s), b: one(t, t)} for a, s, b, t in pairs]
    found = turns(rounds, published=facts(), precision=facts(), compile="no memory",
                  kernels=facts(), graphs=facts())["table"]  # fmt: skip
    gains = [row.get("vs_above") for row in found.values()]
    assert gains == [None, pytest.approx(2), None, pytest.approx(5), pytest.approx(1.2)]
    assert found["published"]["total"] == 1 and found["graphs"]["total"] == pytest.approx(12)
    later = turns([{"b": one(0.2, 0.2), "c": one(0.1, 0.1)}], a="broken", b=facts(), c=facts())
    assert [row.get("total") for row in later["table"].values()] == [None] * 3


def test_each_row_adds_what_its_name_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "measure", lambda place, variants, beside: variants)
    monkeypatch.setattr(steps, "DRY_ROWS", tuple(steps.ROWS))
    place = Place(tmp_path, "ablation/imagenet64_d2o_f", True)
    rows = steps.ablation(place)
    found = [steps.config_of(place, overrides) for overrides in rows.values()]
    plain, compiled, fast = cfg.Engine.plain, cfg.Engine.compiled, cfg.Engine.fast
    assert [c.engine for c in found] == [plain] * 2 + [compiled] + [fast] * 5
    assert [c.precision is cfg.Precision.bf16 for c in found] == [False] + [True] * 7
    assert [c.kernels.value for c in found] == ["library"] * 2 + ["auto"] * 6
    switches = [(c.fast.fold, c.fast.graphs) for c in found][3:]
    assert switches == [(False, False), (True, False), *[(True, True)] * 3]
    assert [c.data.resident for c in found] == [False] * 6 + [True] * 2
    assert [c.share_fakes for c in found] == [False] * 7 + [True]
    assert all(c.data.path.endswith("pictures.zip") for c in found)
    whole = Place(tmp_path, place.name, False)
    config = steps.config_of(whole, rows["published"])
    assert config.batch == config.batch_gpu == 128, "as published for one GPU, in one pass"
    assert steps.config_of(whole, rows["published"], 2).batch == 64


@pytest.mark.parametrize("beside", [4, 2])
def test_a_variant_that_fails_costs_no_other(
    beside: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch without memory is halved once; all is on disk as it goes."""
    short = torch.OutOfMemoryError("CUDA out of memory")
    plan = {"a": [short], "b": [short, short], "c": [UserError("no such engine")], "d": []}
    built = []

    def build(config: Any, stack: Any) -> tuple[Any, dict[str, Any]]:
        built.append((config.name, config.batch))
        if plan[config.name]:
            raise plan[config.name].pop(0)
        return SimpleNamespace(turn=lambda *pace: one(0.1, 0.2)), facts(config.batch)

    def config_of(place: Place, overrides: tuple[str], divisor: int) -> Any:
        return SimpleNamespace(name=overrides[0], batch=64 // divisor)

    monkeypatch.setattr(steps, "build", build)
    monkeypatch.setattr(steps, "_free", lambda: None)
    monkeypatch.setattr(steps, "config_of", config_of)
    place = Place(tmp_path, "steps/x", True)
    content = steps.measure(place, {name: (name,) for name in plan}, beside)
    assert built == [("a", 64), ("a", 32), ("b", 64), ("b", 32), ("c", 64), ("d", 64)]
    rows = content["table"]
    assert rows["a"]["batch"] == 32 and rows["a"]["error"] is None and rows["d"]["img_s"] > 0
    assert "out of memory" in rows["b"]["error"] and "no such engine" in rows["c"]["error"]
    on_disk = json.loads(place.result.read_text())
    assert on_disk["table"] == rows and not on_disk["complete"]


def test_batches_follow_one_another_while_iterations_jump(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, iterations = [], []

    def run(reals: None, labels: None, iteration: int) -> None:
        iterations.append(iteration)
        assert dispatch._configured == "reference", "the variant's own settings"

    def timed(calls: list[Any]) -> list[float]:
        return [[call(), 4.0][1] for call in calls]

    step = SimpleNamespace(settings=SimpleNamespace(r1_interval=16), run=run)
    config = SimpleNamespace(data=cfg.DataConfig(workers=4))
    live: Any = SimpleNamespace(
        config=config, step=step, draw=lambda number: (drawn.append(number), None)
    )
    before = steps.take_settings()
    monkeypatch.setattr(steps, "timed", timed)
    taken = steps.Running(live, before | {"kernels": "reference"}).turn(1, 2, 4)
    assert taken == {"iteration": 1.0, "r1": 4.0}, "the mean of four"
    assert iterations == list(range(58, 65)), "the last one, 4 x 16, has R1"
    # What four threads had decoded meanwhile is not used.
    assert drawn == list(range(6, 13)) and steps.take_settings() == before


@pytest.mark.parametrize(("count", "channels", "classes"), [(6, 3, 1000), (9, 1, 4), (4, 3, 0)])
def test_pictures_are_a_dataset(count: int, channels: int, classes: int, tmp_path: Path) -> None:
    steps.write_pictures(tmp_path / "a.zip", count, 16, channels, classes)
    data = open_dataset(tmp_path / "a.zip")
    assert (len(data), data.resolution, data.channels) == (count, 16, channels)
    assert data.label_dim == classes and (data.labels is None) == (classes == 0)
    assert len({image.tobytes() for image in data.images(np.arange(count))}) == count


def test_convolutions_compute_what_autograd_does() -> None:
    calls = {name: each[0] for name, each in parts._convolution(2, 3, 5, 8).items()}
    x, weight = (calls["forward"].args[i].clone().requires_grad_() for i in (0, 1))  # type: ignore[attr-defined]
    y = torch.nn.functional.conv2d(x, weight, padding=1)
    dx = torch.autograd.grad(y, x, calls["dgrad"].args[0])[0]  # type: ignore[attr-defined]
    for name, expected in (("forward", y), ("dgrad", dx), ("dgrad_flipped", dx)):
        torch.testing.assert_close(calls[name](), expected, rtol=1e-4, atol=1e-4)


def test_a_training_comes_home_with_its_curve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = []

    def run(command: str, *given: str) -> None:
        words.extend([command, *given])
        (run_dir / "samples").mkdir(parents=True)
        lines = [{"Progress/kimg": 2.0, "Timing/img_per_sec": 9.0}]
        lines += [{"Progress/kimg": 2.0, "Metric/FD-resnet56": 7.5}]
        (run_dir / "stats.jsonl").write_text("\n".join(map(json.dumps, lines)))
        (run_dir / cifar10.EMA).touch()

    place = Place(tmp_path / "out", "cifar10/pretrain", True)
    run_dir = place.caches / "cifar10/pretrain"
    monkeypatch.setattr(cifar10, "run", run)
    monkeypatch.setattr(cifar10, "latest_checkpoint", lambda folder: folder.parent)
    found = cifar10.cifar10(place)
    assert found["curve"] == {"2 kimg": {"FD-resnet56": 7.5}}
    assert words[:2] == ["pretrain", "experiment=cifar10_narrow_pretrain"]
    assert f"run_dir={run_dir}" in words and "eval.images=16" in words
    assert {file.name for file in place.folder.iterdir()} == {
        cifar10.EMA, "samples", "stats.jsonl"
    }  # fmt: skip
    with pytest.raises(UserError, match=r"cifar10-32x32-train\.zip is not there.*gpu-report\.md"):
        monkeypatch.setenv("FASTGAN_DATA", str(tmp_path))
        cifar10.Study(Place(tmp_path / "out", "cifar10/real", False))


def test_kernels_are_weighted_and_compared_at_the_same_shape() -> None:
    rows = kernel_rows("norm_silu", "FFHQ", USUAL)
    slow = [r for r in rows if r["candidate"] == "ours" and r["shape"] == "C384-64px"]
    for row in slow:
        row["seconds"] = samples([4e-6])
    found = table.kernel_table(rows)
    number = sum(r["count"] for r in rows if r["candidate"] == "ours") / 2
    share = number / (2 * number + 2 * slow[0]["count"])
    assert found["all forward ours"]["share of floor"] == pytest.approx(share)
    assert found["64px both ours"]["x compile, lowest"] == pytest.approx(0.75)
    assert found["up to 32px both ours"]["x library"] == pytest.approx(4)
    assert found["up to 32px backward ours"]["share of floor"] == pytest.approx(0.5)
    assert found["all forward ours"]["kept x compile, highest"] == pytest.approx(0.75)
    assert found["all both compile"]["share of floor"] == pytest.approx(1 / 3)
    rows = kernel_rows("norm_silu", "ImageNet", USUAL)
    for row in rows:
        if row["candidate"] == "ours" and row["channels"] in (192, 576, 1152):
            row["seconds"] = samples([4e-6])
    line = table.kernel_table(rows)["192, 576, 1152 channels both ours"]
    assert line["x other shapes"] == pytest.approx(0.5)


def test_targets_are_recorded_with_their_file(tmp_path: Path) -> None:
    (tmp_path / "benchmarks").mkdir()
    rows = table.read_targets(ROOT)
    path = "table/compiled-bf16/vs_plain-published"
    rows.append(rows[10] | {"id": "compiled", "metric": "speed, at least", "target": 5.0,
                            "path": path})  # fmt: skip
    (tmp_path / "benchmarks/targets.json").write_text(json.dumps(rows))
    folder = tmp_path / table.record(measured(), tmp_path)
    assert folder.name == "h200-2030-01-02"
    changed = {r["id"]: r for r in table.read_targets(tmp_path) if r["status"] != "open"}
    assert len(changed) == 10
    missed = changed["compiled"]
    assert missed["value"] == pytest.approx(4) and missed["status"] == "missed"
    assert (missed["machine"], missed["date"]) == ("NVIDIA H200", "2030-01-02")
    assert missed["result_file"].endswith("h200-2030-01-02/steps/cifar10_uncond_d2o_f.json")
    # Of three networks the worst.
    slowest = changed["group_norm_silu_forward_bandwidth"]
    assert slowest["value"] == pytest.approx(0.4) and slowest["status"] == "missed"
    assert changed["frozen_unet_block_vs_compile"]["value"] == pytest.approx(1.2)
    assert changed["frozen_unet_block_vs_compile"]["status"] == "measured"
    check_record(tmp_path)
    assert json.loads((folder / "rates/chip.json").read_text())["copy_bandwidth"] == 4.3e12
    text = (folder / "report.md").read_text()
    assert "| compiled-bf16 | - | 64 | 581.8 | 0.3636 | 100 | 3 | 160 | 40 | 12.5 | 4 |" in text
    assert "- kernels/resample-FFHQ: it broke" in text and "- parity/kernels: not run yet" in text
    # Recorded again: from the new files.
    table.record(measured() | {"kernels/norm_silu-FFHQ": {}}, tmp_path)
    check_record(tmp_path)
    for without in ({}, {"complete": False}, {"failed": ["a shape"]}):
        some = measured()
        some["kernels/norm_silu-FFHQ"] = without and some["kernels/norm_silu-FFHQ"] | without
        assert table.value_of(rows[0], some) is None, "all networks, and every shape"


@pytest.mark.parametrize(
    ("results", "said"),
    [
        ({}, "measured on nothing, --update"),
        ({"a": H200, "b": H200 | {"chip": "NVIDIA A100"}}, "A100, NVIDIA H200"),
        ({"a": H200 | {"chip": "CPU", "dry_run": True}}, "measured on CPU"),
    ],
)
def test_what_is_no_measurement_of_an_h200_is_refused(
    results: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        table.record(results, tmp_path)
    assert not list(tmp_path.iterdir())


def check_record(root: Path) -> None:
    """Open rows hold nothing; measured ones what their files hold."""
    for row in table.read_targets(root):
        if row["status"] == "open":
            assert [row[k] for k in ("value", "machine", "date")] == [None] * 3
            continue
        files = sorted(root.glob(row["result_file"]))
        held = {f"{f.parent.name}/{f.stem}": json.loads(f.read_text()) for f in files}
        assert held and table.value_of(row, held) == pytest.approx(row["value"])
        assert row["status"] == ("measured" if table.is_met(row) else "missed")
        assert {each["chip"] for each in held.values()} == {row["machine"]}


def test_every_target_is_a_row() -> None:
    rows, plan = table.read_targets(ROOT), parts.plan()
    check_record(ROOT)
    assert all(list(row) == KEYS for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    for row in rows:
        assert row["metric"].endswith((", at least", ", at most")) and row["target"] > 0
        words = row["command"].split()
        assert words[:3] == ["python", "tools/gpu_report.py", "--part"] and words[4] == "--update"
        cases = [f"{case.name}.json" for case in parts.select(plan, [words[3]])]
        named = Path(row["result_file"])
        assert row["unit"] and any(Path(case).match(str(named)) for case in cases)
        if named.parts[-2] == "kernels":
            assert table.value_of(row, measured()) is not None, row["path"]
