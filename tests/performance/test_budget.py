"""tools/budget.py: the model of time by hand, measured rates, MFU, and what is printed."""

import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastgan import config as cfg
from fastgan.common.distributed import World
from fastgan.common.errors import UserError
from fastgan.performance.budget import GPUS, Budget, budgets, report, save_plot, smallest
from fastgan.performance.iteration import Iteration, Layer, Work, flop
from fastgan.performance.live_step import measured_config
from fastgan.performance.machines import (
    MACHINES,
    Assumption,
    assumptions,
    full_speed,
    measured_rates,
    product_rate,
)
from fastgan.training.monitor import Monitor

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
A100, _, H200 = MACHINES
# An H200 as others measured it, and the floor worked out from that by hand, roughly.
H200_SEEN = {"chip": "NVIDIA H200", "copy_bandwidth": 4.3e12, "matmul_rate": 7.9e14}
H200_FLOOR = 1150


def of_one_layer(layer: Layer, gpus: int = 1, batch: int = 8, **changes: float) -> Budget:
    """A budget of G with one layer, twice forward and once in each direction backward."""
    counted = Iteration((Work("generator", layer, 2, 1, 1),), 1000, trained=400, heads=100)
    assumed = assumptions(A100, {})
    assumed |= {k: Assumption(v, "", "test") for k, v in changes.items()}
    return Budget("one", A100, gpus, batch, cfg.Precision.bf16, counted, assumed)


def test_a_layer_bound_by_arithmetic() -> None:
    layer = Layer("product", 10**12, moved=1, moved_back=1)
    budget = of_one_layer(layer, conv_forward_efficiency=0.5, conv_dgrad_efficiency=0.25)
    seconds = (2 / 0.5 + 2 / 0.25) * 1e12 / (0.8 * 312e12)
    assert budget.expected_img_s == pytest.approx(0.9 / seconds, rel=1e-4)
    assert budget.floor_img_s == pytest.approx(0.75 * 312e12 / 4e12, rel=1e-4)
    assert budget.hours_5m == pytest.approx(5e6 / budget.expected_img_s / 3600)


def test_a_norm_bound_by_memory() -> None:
    """One pass backward gives both gradients; 2 bytes an element."""
    layer = Layer("norm", moved=2 * 10**9, moved_back=3 * 10**9, trains=True, input_grad=True)
    elements = 2 * 2e9 + 3e9
    budget = of_one_layer(layer)
    assert budget.floor_img_s == pytest.approx(2.039e12 / (2 * elements), rel=1e-3)
    assert budget.expected_img_s == pytest.approx(0.9 * 0.8 * 2.039e12 / (2 * elements), rel=1e-3)


def test_a_small_layer_takes_the_least_time() -> None:
    budget = of_one_layer(Layer("product", 1), batch=1)
    assert budget.expected_img_s == pytest.approx(0.9 / (4 * 5e-6), rel=1e-3)


def test_weights_and_updates_are_traffic_once_per_iteration() -> None:
    """Adam: four reads and three writes of 4 bytes, and a check; the EMA: two reads, a write."""
    updates = {"layer_seconds": 0.0, "copy_bandwidth": 1e6}
    seconds = (32 * 500 + 12 * 400) / 0.8e6 / 0.9
    found = of_one_layer(Layer("product", 1), **updates)
    assert 8 / found.expected_img_s == pytest.approx(seconds, rel=1e-3)
    seconds += 4 * 2e6 / 0.8e6 / 0.9
    heavy = of_one_layer(Layer("product", 1, weights=10**6), **updates)
    assert 8 / heavy.expected_img_s == pytest.approx(seconds, rel=1e-3)


@pytest.mark.parametrize(("gpus", "bandwidth"), [(8, 1e6), (16, 1e5)])
def test_gradients_are_averaged_over_the_slowest_link(gpus: int, bandwidth: float) -> None:
    links = {"node_bandwidth": 1e6, "network_bandwidth": 1e5}
    alone, spread = (of_one_layer(Layer("product", 1), n, 64, **links) for n in (1, gpus))
    extra = 0.9 * 64 * (1 / spread.expected_img_s - 1 / alone.expected_img_s)
    assert extra == pytest.approx(2 * (gpus - 1) / gpus * 2000 / bandwidth, rel=1e-3)


def test_a_published_experiment(tmp_path: Path) -> None:
    """Against an estimate by others, the first table of the document, and float32 for D."""
    measured = measured_rates(rates(tmp_path, H200_SEEN))
    found = budgets("ffhq64_d2o_f", [], measured)
    by = {(b.machine.name, b.gpus): b for b in found}
    assert list(by) == [(m.name, g) for m in MACHINES for g in GPUS]
    assert by["H200", 1].floor_img_s == pytest.approx(H200_FLOOR, rel=0.08)
    assert all(b.expected_img_s < b.floor_img_s for b in found)
    assert all(by["A100", g].expected_img_s < by["H200", g].expected_img_s for g in GPUS)

    counted = found[0].iteration
    parts = (counted.layers("generator"), counted.layers("features", "heads"))
    numbers = (*map(flop, parts), counted.flop)
    cells = " | ".join(f"{number / 1e9:.1f}" for number in numbers)
    assert f"| `ffhq64_d2o_f` | {cells} |" in (ROOT / "docs/budget.md").read_text()

    strict = budgets("ffhq64_d2o_f", ["precision=published"], {}, [8])[0]
    d_flop = sum(w.flop for w in counted.work if w.part != "generator")
    slower = 256 / strict.floor_img_s - 256 / by["A100", 8].floor_img_s
    arithmetic = 32 * d_flop / 0.75 * (1 / 19.5e12 - 1 / 312e12)
    assert slower == pytest.approx(arithmetic, rel=0.01)


def test_the_smallest_machine_is_the_smallest() -> None:
    example = of_one_layer(Layer("product", 10**12), batch=512)
    found = smallest(example, example.hours_5m / 3)
    # 512 images do not split over 3 GPUs, and 4 are not quite 4 times as fast as one.
    assert found is not None and found.gpus == 4
    assert smallest(example, 1e-6) is None


def rates(folder: Path, content: object, name: str = "h200-20990101") -> Path:
    (folder / name).mkdir()
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / name / "rates.json").write_text(text)
    return folder


def test_measured_rates_replace_the_datasheet(tmp_path: Path) -> None:
    rates(tmp_path, H200_SEEN | {"matmul_rate": 5e14}, "h200-20990101")
    newer = {"conv_forward_efficiency": 0.6, "conv_dgrad_efficiency": 0.5, "other": "text"}
    newer["matmul_rates"] = {"bf16": 7.9e14, "fp32": 5.1e13}
    rates(tmp_path, H200_SEEN | newer, "h200-20990102")
    measured = measured_rates(tmp_path)
    assert set(measured) == {"H200"}
    found = assumptions(H200, measured)
    assert found["matmul_rate"].value == 7.9e14 and found["sustained_share"].value == 1
    assert found["conv_dgrad_efficiency"].value == 0.5 and found["float32_rate"].value == 5.1e13
    assert found["copy_bandwidth"].source == "measured, h200-20990102/rates.json"
    assert assumptions(A100, measured)["matmul_rate"].source == "datasheet"


def test_a_measured_efficiency_moves_the_floor(tmp_path: Path) -> None:
    folder = rates(tmp_path, H200_SEEN | {"conv_forward_efficiency": 0.9})
    assert assumptions(H200, measured_rates(folder))["floor_efficiency"].value == 0.9


@pytest.mark.parametrize(
    "content", [{"chip": "CPU"}, H200_SEEN | {"dry_run": True}, {"chip": "NVIDIA GH200 480GB"}, {}]
)
def test_what_is_no_measurement_of_these_machines(content: Any, tmp_path: Path) -> None:
    assert measured_rates(rates(tmp_path, content)) == {}
    assert measured_rates(tmp_path / "absent") == {}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (H200_SEEN | {"copy_bandwidth": 4300}, "copy_bandwidth is 4300"),
        (H200_SEEN | {"matmul_rate": "fast"}, "matmul_rate is 'fast'"),
        (H200_SEEN | {"conv_forward_efficiency": float("nan")}, "conv_forward_efficiency is nan"),
        (H200_SEEN | {"conv_dgrad_efficiency": True}, "conv_dgrad_efficiency is True"),
        ("[1, 2]", "no JSON object"),
        ("{", "cannot read the rates"),
        ("[" * 100_000, "cannot read the rates"),
    ],
)
def test_broken_rates_are_refused_by_name(content: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)) as refusal:
        measured_rates(rates(tmp_path, content))
    assert "rates.json" in str(refusal.value)


def test_full_speed_is_the_peak_of_all_gpus_over_the_work_of_an_image(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = measured_config("ffhq64_d2o_f", [])

    def found(name: str, device: str) -> float | None:
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
        world = World(rank=0, local_rank=0, size=8, device=torch.device(device))
        return full_speed(config, config.init.network, world)

    # 312 TFLOP/s each; an iteration has about 454 GFLOP an image, by the method's own counts.
    assert found(A100.chip, "cuda") == pytest.approx(8 * 312e12 / 454e9, rel=0.01)
    assert found(A100.chip, "cpu") is None and found("Some other GPU", "cuda") is None


@pytest.mark.parametrize("speed", [None, 1000.0])
def test_a_tick_reports_mfu_where_it_is_known(tmp_path: Path, speed: float | None) -> None:
    monitor = Monitor(tmp_path, total_images=8, nimg=0, device=CPU, main=True, full_speed=speed)
    monitor.advance(8)
    monitor.tick({})
    monitor.close()
    line = json.loads((tmp_path / "stats.jsonl").read_text())
    assert ("Timing/mfu" in line) == (speed is not None)
    if speed is not None:
        assert line["Timing/mfu"] == pytest.approx(line["Timing/img_per_sec"] / speed)


def test_the_rate_of_a_product() -> None:
    found = product_rate(CPU, torch.float32, side=64)
    assert len(found) > 1 and all(1e6 < rate < 1e13 for rate in found)


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """tools/budget.py without a process of its own: status, stdout, stderr."""

    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["budget.py", *arguments])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / "tools/budget.py"), run_name="__main__")
        return (ended.value.code, *capsys.readouterr())

    return call


def test_the_command_answers_in_words_and_a_picture(
    command: Callable[..., tuple[object, str, str]], tmp_path: Path
) -> None:
    plot = tmp_path / "plot.png"
    asked = ("--experiment", "ffhq64_d2o_f", "demo", "--set", "batch=24", "--plot", str(plot))
    code, text, err = command(*asked)
    assert (code or 0, err) == (0, "")
    assert "=> fits 6 hours on 8 x A100" in text and "no speed here was measured" in text
    assert re.search(r"=> fewest GPUs for 6 hours: [12] x A100 \([0-9.]+ h\), 1 x H100", text)
    assert text.count("batch 24 does not split over 16 GPUs") == 6
    assert all(f"  {name} " in text for name in assumptions(A100, {}))
    picture = Image.open(plot)
    assert picture.width > 800 and len(picture.convert("RGB").getcolors(10**6)) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]
    slow = report(budgets("ffhq64_d2o_f", ["precision=published", "batch=8"], {}))
    assert "=> does not fit 6 hours on 8 x A100" in slow


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is not installed, .*fastgan\[plot\]"):
        save_plot([of_one_layer(Layer("product", 1))], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_the_command_prints_what_others_read(
    command: Callable[..., tuple[object, str, str]],
) -> None:
    _, out, _ = command("--json", "--experiment", "ffhq64_d2o_f", "--set", "batch=48")
    rows = json.loads(out)
    assert [(r["experiment"], r["machine"], r["gpus"]) for r in rows] == [
        ("ffhq64_d2o_f", m.name, g) for m in MACHINES for g in GPUS
    ]
    first = rows[0]
    assert first["g_forward_gflop"] == pytest.approx(84.9, abs=0.05)
    assert first["d_forward_gflop"] == pytest.approx(35.3 + 0.7 + 1.5 + 2.3 + 0.3 + 2.3, abs=0.2)
    # 3 G and its weight gradients, 4 D, the heads' own gradients on fakes and reals; and R1.
    assert first["iteration_gflop"] == pytest.approx(454.2, abs=0.05)
    assert first["allreduce_bytes"] == pytest.approx(123e6, rel=0.01)
    assert first["hours_5m"] == pytest.approx(5e6 / first["expected_img_s"] / 3600)
    assert first["floor_img_s"] > first["expected_img_s"]
    assert {"value", "unit", "source"} == set(first["assumptions"]["copy_bandwidth"])
    undivided = [row for row in rows if row["gpus"] == 64]
    assert all(r["hours_5m"] is None and "does not split" in r["problem"] for r in undivided)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--experiment", "cifar100"], "Could not find 'experiment/cifar100', one of"),
        (["--set", "batches=3"], "batches"),
        (["--plot"], "--plot"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], said: str, command: Callable[..., tuple[object, str, str]]
) -> None:
    code, out, err = command(*arguments)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("error: ") and said in err
