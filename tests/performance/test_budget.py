"""tools/budget.py: the model of time by hand, MFU, and what is printed."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastgan import config as cfg
from fastgan.common.distributed import World
from fastgan.common.errors import UserError
from fastgan.performance.budget import GPUS, Model, budgets, save_plot
from fastgan.performance.iteration import Iteration, Layer, Work, count_iteration
from fastgan.performance.live_step import measured_config
from fastgan.performance.machines import MACHINES, assumptions, full_speed
from fastgan.training.monitor import Monitor
from tests.performance.conftest import Tool

ROOT = Path(__file__).parents[2]
A100 = MACHINES[0]


def of_one_layer(layer: Layer, gpus: int = 1, images: int = 8, **changes: float) -> Model:
    """G with one layer, twice forward and once in each direction backward, on A100."""
    counted = Iteration((Work("generator", layer, 2, 1, 1),), trained=400, heads=100)
    assumed = {name: a.value for name, a in assumptions(A100).items()}
    return Model(counted, cfg.Precision.bf16, gpus, images, assumed | changes)


HEAVY = Layer("product", 10**12, moved=1, moved_back=1)
NORM = Layer("norm", moved=2 * 10**9, moved_back=3 * 10**9, trains=True, input_grad=True)


@pytest.mark.parametrize(
    ("layer", "floor", "busy"),
    [
        (HEAVY, 4e12 / (0.75 * 312e12), (2 / 0.5 + 2 / 0.25) * 1e12 / (0.8 * 312e12)),
        # One pass backward gives both gradients; 2 bytes an element.
        (NORM, 2 * (2 * 2e9 + 3e9) / 2.039e12, 2 * (2 * 2e9 + 3e9) / (0.8 * 2.039e12)),
        (Layer("product", 1), 0, 4 * 5e-6 / 8),
    ],
    ids=["arithmetic", "memory", "the least time"],
)
def test_what_bounds_a_layer(layer: Layer, floor: float, busy: float) -> None:
    model = of_one_layer(layer, conv_forward_efficiency=0.5, conv_dgrad_efficiency=0.25)
    assert model.floor_seconds() == pytest.approx(8 * floor, rel=1e-3, abs=1e-7)
    assert model.expected_seconds() == pytest.approx(8 * busy / 0.9, rel=1e-3)


def test_weights_and_updates_are_traffic_once_per_iteration() -> None:
    """Adam: four reads and three writes of 4 bytes, and a check; the EMA: two reads, a write."""
    updates = {"layer_seconds": 0.0, "copy_bandwidth": 1e6}
    seconds = (32 * 500 + 12 * 400) / 0.8e6 / 0.9
    light = of_one_layer(Layer("product", 1), **updates)
    assert light.expected_seconds() == pytest.approx(seconds, rel=1e-3)
    seconds += 4 * 2e6 / 0.8e6 / 0.9
    heavy = of_one_layer(Layer("product", 1, weights=10**6), **updates)
    assert heavy.expected_seconds() == pytest.approx(seconds, rel=1e-3)


@pytest.mark.parametrize(("gpus", "bandwidth"), [(8, 1e6), (16, 1e5)])
def test_gradients_are_averaged_over_the_slowest_link(gpus: int, bandwidth: float) -> None:
    links = {"node_bandwidth": 1e6, "network_bandwidth": 1e5}
    alone, spread = (of_one_layer(Layer("product", 1), n, **links) for n in (1, gpus))
    extra = 0.9 * (spread.expected_seconds() - alone.expected_seconds())
    assert extra == pytest.approx(2 * (gpus - 1) / gpus * 2000 / bandwidth, rel=1e-3)


def test_a_published_experiment() -> None:
    """Against the first table of the document, and float32 for D."""
    found = budgets("ffhq64_d2o_f", [])
    by = {(row["machine"], row["gpus"]): row for row in found}
    assert list(by) == [(m.name, g) for m in MACHINES for g in GPUS]
    assert all(row["expected_img_s"] < row["floor_img_s"] for row in found)
    hours = {g: [by[m.name, g]["hours_5m"] for m in MACHINES] for g in GPUS}
    assert all(a100 > h200 for a100, _, h200 in hours.values())

    document = (ROOT / "docs/budget.md").read_text()
    told = [found[0][f"{key}_gflop"] for key in ("g_forward", "d_forward", "iteration")]
    # 3 G and its weight gradients, 4 D, the heads' own gradients on fakes and reals; and R1.
    assert told == pytest.approx([84.9, 35.3 + 0.7 + 1.5 + 2.3 + 0.3 + 2.3, 454.2], abs=0.2)
    assert "| `ffhq64_d2o_f` | {:.1f} | {:.1f} | {:.1f} |".format(*told) in document
    cells = [f"{by[m.name, g]['hours_5m']:.2f}" for m in MACHINES for g in (1, 8, 64)]
    assert f"| `ffhq64_d2o_f` | {' | '.join(cells)} |" in document

    strict = budgets("ffhq64_d2o_f", ["precision=published"])[1]
    slower = 256 / strict["floor_img_s"] - 256 / by["A100", 8]["floor_img_s"]
    counted = count_iteration(measured_config("ffhq64_d2o_f", []))
    d_flop = sum(w.flop for w in counted.work if w.part != "generator")
    arithmetic = 32 * d_flop / 0.75 * (1 / 19.5e12 - 1 / 312e12)
    assert slower == pytest.approx(arithmetic, rel=0.01)


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
    monitor = Monitor(
        tmp_path, total_images=8, nimg=0, device=torch.device("cpu"), main=True, full_speed=speed
    )
    monitor.advance(8)
    monitor.tick({})
    monitor.close()
    line = json.loads((tmp_path / "stats.jsonl").read_text())
    assert ("Timing/mfu" in line) == (speed is not None)
    if speed is not None:
        assert line["Timing/mfu"] == pytest.approx(line["Timing/img_per_sec"] / speed)


def test_the_command_answers_in_a_table_and_a_picture(tool: Tool, tmp_path: Path) -> None:
    plot = tmp_path / "plot.png"
    asked = ("--experiment", "ffhq64_d2o_f", "demo", "--set", "batch=24", "--plot", str(plot))
    code, text, err = tool("budget.py", *asked)
    assert (code or 0, err) == (0, "")
    assert "no speed here was measured" in text
    assert len(re.findall(r"(?m)^demo +H200 +8 +3 +[\d,]+ +[\d,]+ +\d+\.\d\d$", text)) == 1
    assert text.count("batch 24 does not split over 16 GPUs") == 6
    assert all(f"\n{name} " in text for name in assumptions(A100))
    picture = Image.open(plot)
    assert picture.width > 800 and len(picture.convert("RGB").getcolors(10**6)) > 50
    assert [p.name for p in tmp_path.iterdir()] == ["plot.png"]


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"matplotlib is not installed, .*fastgan\[plot\]"):
        save_plot([], tmp_path / "plot.png")
    assert not list(tmp_path.iterdir())


def test_the_command_prints_what_others_read(tool: Tool) -> None:
    _, out, _ = tool("budget.py", "--json", "--experiment", "demo", "--set", "batch=48")
    rows = json.loads(out)
    keys = "experiment machine gpus batch precision computed g_forward_gflop d_forward_gflop "
    keys += "iteration_gflop allreduce_bytes batch_gpu floor_img_s expected_img_s hours_5m problem "
    assert all(list(row) == [*keys.split(), "assumptions"] for row in rows)
    assert rows[0]["hours_5m"] == pytest.approx(5e6 / rows[0]["expected_img_s"] / 3600)
    assert {"value", "unit", "source"} == set(rows[0]["assumptions"]["copy_bandwidth"])
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
def test_a_mistake_is_one_line(arguments: list[str], said: str, tool: Tool) -> None:
    code, out, err = tool("budget.py", *arguments)
    assert (code, out, len(err.splitlines())) == (1, "", 1)
    assert err.startswith("error: ") and said in err
