"""tools/budget.py: the model of time and memory by hand, measured rates, and what is printed."""

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastgan import config as cfg
from fastgan.common.errors import UserError
from fastgan.performance.budget import GIB, GPUS, Budget, budgets, report, save_plot, smallest
from fastgan.performance.counts import Layer, flop
from fastgan.performance.iteration import Iteration, Parameters, Work
from fastgan.performance.machines import MACHINES, Assumption, assumptions, measured_rates

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/budget.py"
A100, _, H200 = MACHINES
KEYS = {
    *("experiment", "machine", "gpus", "g_forward_gflop", "d_forward_gflop", "iteration_gflop"),
    *("allreduce_bytes", "floor_img_s", "expected_img_s", "hours_5m", "assumptions"),
}
# An H200 as others measured it, and floors worked out from that by hand, roughly.
H200_SEEN = {"chip": "NVIDIA H200", "copy_bandwidth": 4.3e12, "matmul_rate": 7.9e14}
H200_FLOORS = {"cifar10_uncond_d2o_f": 1500, "ffhq64_d2o_f": 1150, "imagenet64_d2o_f": 630}


def of_one_layer(layer: Layer, gpus: int = 1, batch: int = 8, **changes: float) -> Budget:
    """A budget of G with one layer, twice forward and once in each direction backward."""
    work = Work("generator", layer, 2, 1, 1)
    counted = Iteration((layer,), (), (work,), Parameters(1000, 400, 50, 100), has_r1=True)
    assumed = assumptions(A100, {})
    assumed |= {k: Assumption(v, "", "test") for k, v in changes.items()}
    return Budget("one", A100, gpus, batch, cfg.Precision.bf16, counted, assumed)


def test_a_layer_bound_by_arithmetic() -> None:
    layer = Layer("convolution", flop=10**12, input_grad_flop=10**12, moved=1, moved_back=1)
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
    budget = of_one_layer(Layer("linear", flop=1, input_grad_flop=1), batch=1)
    assert budget.expected_img_s == pytest.approx(0.9 / (4 * 5e-6), rel=1e-3)


def test_weights_and_updates_are_traffic_once_per_iteration() -> None:
    """Adam: four reads and three writes of 4 bytes, and a check; the EMA: two reads, a write."""
    none = Layer("linear", flop=1, input_grad_flop=1)
    updates = {"layer_seconds": 0.0, "copy_bandwidth": 1e6}
    seconds = (32 * 500 + 12 * 400) / 0.8e6 / 0.9
    assert 8 / of_one_layer(none, **updates).expected_img_s == pytest.approx(seconds, rel=1e-3)
    heavy = Layer("linear", flop=1, input_grad_flop=1, weights=10**6)
    seconds += 4 * 2e6 / 0.8e6 / 0.9
    assert 8 / of_one_layer(heavy, **updates).expected_img_s == pytest.approx(seconds, rel=1e-3)


def test_gradients_are_averaged_over_the_slowest_link() -> None:
    layer = Layer("linear", flop=1, input_grad_flop=1)
    alone = of_one_layer(layer, batch=64, node_bandwidth=1e6, network_bandwidth=1e5)

    def extra_seconds(gpus: int) -> float:
        spread = of_one_layer(layer, gpus, 64, node_bandwidth=1e6, network_bandwidth=1e5)
        return 0.9 * 64 * (1 / spread.expected_img_s - 1 / alone.expected_img_s)

    assert extra_seconds(8) == pytest.approx(2 * 7 / 8 * 2000 / 1e6, rel=1e-3)
    assert extra_seconds(16) == pytest.approx(2 * 15 / 16 * 2000 / 1e5, rel=1e-3)


def test_memory_by_part() -> None:
    found = of_one_layer(Layer("convolution", kept=GIB // 16), gpus=2).memory_gib()
    assert found["activations_g"] == pytest.approx(4 * 2 / 16)
    assert found["weights"] * GIB == pytest.approx(4 * 1150 + 2 * 600)
    assert found["optimiser"] * GIB == pytest.approx(8 * 500)
    assert found["ema"] * GIB == pytest.approx(4 * 400)
    assert found["gradients"] * GIB == pytest.approx(4 * 400)
    assert found["peak"] == pytest.approx(0.5, abs=1e-4)
    real = budgets("cifar10_uncond_d2o_f", [], {}, [8])[0].memory_gib()
    fixed = sum(real[name] for name in ("weights", "gradients", "optimiser", "ema"))
    # D's graph and the graph of its gradient, without G's.
    assert real["peak"] == pytest.approx(fixed + 2 * real["activations_d"])


def test_strict_float32_slows_the_discriminator_only() -> None:
    rows = {
        p: budgets("cifar10_uncond_d2o_f", [f"precision={p}"], {}, [8])[0]
        for p in ("bf16", "published")
    }
    d_flop = sum(w.flop for w in rows["bf16"].iteration.work if w.part != "generator")
    slower = 256 / rows["published"].floor_img_s - 256 / rows["bf16"].floor_img_s
    arithmetic = 32 * d_flop / 0.75 * (1 / 19.5e12 - 1 / 312e12)
    assert slower == pytest.approx(arithmetic, rel=0.01)


@pytest.mark.parametrize("experiment", H200_FLOORS)
def test_published_experiments_against_estimates_by_others(experiment: str, tmp_path: Path) -> None:
    measured = measured_rates(rates(tmp_path, H200_SEEN))
    found = budgets(experiment, [], measured)
    assert [(b.machine.name, b.gpus) for b in found] == [
        (m.name, g) for m in MACHINES for g in GPUS
    ]
    by = {(b.machine.name, b.gpus): b for b in found}
    assert by["H200", 1].floor_img_s == pytest.approx(H200_FLOORS[experiment], rel=0.08)
    assert all(b.expected_img_s < b.floor_img_s for b in found)
    assert all(by["A100", g].expected_img_s < by["H200", g].expected_img_s for g in GPUS)
    if experiment == "imagenet64_d2o_f":
        assert 40 < 5e6 / by["A100", 8].floor_img_s / 60 < 60


def test_the_smallest_machine_is_the_smallest() -> None:
    example = budgets("imagenet64_d2o_f", [], {}, [1])[0]
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


def test_the_report_answers_the_question() -> None:
    found = budgets("ffhq64_d2o_f", ["batch=24"], {})
    text = report(found)
    assert "=> fits 6 hours on 8 x A100" in text
    assert re.search(r"=> fewest GPUs for 6 hours: [12] x A100 \([0-9.]+ h\), 1 x H100", text)
    assert text.count("batch 24 does not split over 16 GPUs") == 3
    assert "no speed here was measured" in text
    for name in found[0].assumptions:
        assert f"  {name} " in text
    slow = report(budgets("ffhq64_d2o_f", ["precision=published", "batch=8"], {}))
    assert "=> does not fit 6 hours on 8 x A100" in slow


def test_a_plot_is_a_picture(tmp_path: Path) -> None:
    found = budgets("ffhq64_d2o_f", ["batch=24"], {}) + budgets("afhqv2_64_d2o_f", [], {})
    save_plot(found, tmp_path / "plot.png")
    picture = Image.open(tmp_path / "plot.png")
    assert picture.width > 1000 and len(picture.convert("RGB").getcolors(10**6)) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is not installed, .*fastgan\[plot\]"):
        save_plot(budgets("ffhq64_d2o_f", [], {}), tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_the_command_prints_what_others_read() -> None:
    options = ("--json", "--experiment", "ffhq64_d2o_f", "demo", "--set", "share_fakes=true")
    command = [sys.executable, str(TOOL), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    rows = json.loads(done.stdout)
    assert [(r["experiment"], r["machine"], r["gpus"]) for r in rows] == [
        (e, m.name, g) for e in ("ffhq64_d2o_f", "demo") for m in MACHINES for g in GPUS
    ]
    assert all(set(row) >= KEYS for row in rows)
    first = rows[0]
    assert first["g_forward_gflop"] == pytest.approx(84.9, abs=0.05)
    assert first["d_forward_gflop"] == pytest.approx(35.3 + 0.7 + 1.5 + 2.3 + 0.3 + 2.3, abs=0.2)
    # 2 G, 4 D but once less what is frozen in it, the heads' own gradients on fakes and reals.
    passes = 2 * 84.9 + 4 * 42.3 - (42.3 - 4.5) + 2 * 4.5 + 2 * 4.5
    assert first["iteration_gflop"] == pytest.approx(passes, rel=0.05)
    assert first["hours_5m"] == pytest.approx(5e6 / first["expected_img_s"] / 3600)
    assert {"value", "unit", "source"} == set(first["assumptions"]["copy_bandwidth"])
    undivided = [row for row in rows if row["experiment"] == "demo" and row["gpus"] == 64]
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
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["budget.py", *arguments])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(TOOL), run_name="__main__")
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert (end.value.code, out, len(lines)) == (1, "", 1)
    assert lines[0].startswith("error: ") and said in lines[0]


def test_the_document_has_the_counts() -> None:
    """Its first table: GFLOP of G, of D and of an iteration, M parameters, all-reduce MB."""
    text = (ROOT / "docs/budget.md").read_text()
    for experiment in ("cifar10_uncond_d2o_f", "imagenet64_d2o_f"):
        counted = budgets(experiment, [], {}, [1])[0].iteration
        numbers = (flop(counted.generator), flop(counted.discriminator), counted.flop)
        cells = " | ".join(f"{number / 1e9:.1f}" for number in numbers)
        assert f"| `{experiment}` | {cells} |" in text
