"""Where a step's time goes: timelines to shares, and the command on tiny networks."""

import gzip
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile, record_function

from fastgan.launch.checks import check_train
from fastgan.models.build import PUBLISHED_NETWORKS
from fastgan.performance.kinds import KINDS
from fastgan.performance.live_step import live_step, measured_config, tiny_overrides
from fastgan.performance.phases import PREFIX, marked_phases
from fastgan.performance.profile_report import summary, table
from fastgan.performance.trace import (
    WINDOW,
    Span,
    Timeline,
    Work,
    exclusive_times,
    read_events,
    timeline,
)

TOOL = Path(__file__).parents[2] / "tools" / "profile_step.py"
CPU = torch.device("cpu")
ADDITION = "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>"


def shares(*intervals: tuple[float, float], innermost: bool) -> tuple[list[float], float]:
    """Of [0, 100]."""
    spans = [Span("x", "kernel", 0, start, end) for start, end in intervals]
    return exclusive_times(spans, 0.0, 100.0, innermost=innermost)


def test_every_instant_belongs_to_one() -> None:
    assert shares(innermost=True) == ([], 100.0)
    # One after the other, with a gap before, between and after them.
    assert shares((10, 20), (20, 30), (50, 60), innermost=False) == ([10, 10, 10], 70.0)
    # Nested calls: self times.
    assert shares((0, 90), (10, 50), (20, 30), (60, 70), innermost=True) == ([40, 30, 10, 10], 10.0)
    # Streams: what runs beside an earlier kernel is hidden until that one ends.
    assert shares((0, 40), (10, 20), (30, 60), innermost=False) == ([40, 0, 20], 40.0)
    # Edges of the window, nothing long, nothing at all inside.
    assert shares((-50, 5), (7, 7), (95, 300), (400, 500), innermost=False) == ([5, 0, 5, 0], 90.0)


def test_shares_add_up_to_the_window() -> None:
    draw = torch.Generator().manual_seed(0)
    starts = (torch.rand(200, generator=draw, dtype=torch.float64) * 140 - 20).tolist()
    lengths = (torch.rand(200, generator=draw, dtype=torch.float64) * 3).tolist()
    intervals = sorted((s, s + n) for s, n in zip(starts, lengths, strict=True))
    grid = torch.linspace(0, 100, 100_001, dtype=torch.float64)
    covered = torch.zeros(len(grid), dtype=torch.bool)
    for start, end in intervals:
        covered |= (grid >= start) & (grid < end)
    for innermost in (True, False):
        own, idle = shares(*intervals, innermost=innermost)
        assert sum(own) + idle == pytest.approx(100, abs=1e-9)
        assert idle == pytest.approx(100 * (1 - covered.double().mean().item()), abs=0.05)


def event(cat: str, name: str, tid: int, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "pid": 1, "tid": tid, "ts": ts, "dur": dur} | {
        "args": {key.replace("_", " "): value for key, value in args.items()}
    }


def gpu_events() -> list[dict[str, Any]]:
    """Python on thread 7, autograd's on 8, one stream (70), and a copy on another one (71)."""
    number, fwd = {"Sequence_number": 5}, {"Sequence_number": 5, "Fwd_thread_id": 1}
    node = "autograd::engine::evaluate_function: ConvolutionBackward0"
    return [
        event("user_annotation", WINDOW, 7, 100, 1000),
        event("user_annotation", PREFIX + "generator", 7, 110, 30),
        event("cpu_op", "aten::convolution", 7, 112, 20, External_id=2, **number),
        event("cuda_runtime", "cudaLaunchKernel", 7, 115, 5, correlation=1),
        event("user_annotation", PREFIX + "heads", 7, 150, 30),
        event("cpu_op", "fastgan::op", 7, 151, 20, External_id=3),
        event("cuda_driver", "cuLaunchKernel", 7, 155, 5, correlation=2),
        event("cpu_op", node, 8, 200, 50, External_id=4, **fwd),
        event("cpu_op", "aten::add_", 8, 240, 8, External_id=5),
        {"ph": "s", "cat": "fwdbwd", "name": "fwdbwd", "id": 1, "pid": 1, "tid": 7, "ts": 112},
        {"ph": "f", "cat": "fwdbwd", "name": "fwdbwd", "id": 1, "pid": 1, "tid": 8, "ts": 200},
        event("kernel", "before the window", 70, 20, 30, correlation=9),
        event("kernel", "sm90_xmma_fprop", 70, 200, 300, correlation=1, External_id=2),
        # Triton's launcher is known by its correlation only.
        event("kernel", "_fused_kernel", 70, 500, 100, correlation=2),
        event("kernel", "sm90_xmma_dgrad", 70, 700, 200, correlation=3, External_id=4),
        event("kernel", ADDITION, 70, 900, 50, correlation=4, External_id=5),
        event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 71, 650, 100, correlation=77),
        event("gpu_user_annotation", PREFIX + "heads", 70, 500, 100),
    ]


def test_timeline_of_a_gpu() -> None:
    found = timeline(gpu_events(), on_device=True)
    assert [(w.phase, w.kind, w.microseconds) for w in found.works] == [
        ("generator", "convolution", 300),
        ("heads", "heads", 100),
        (None, "copies", 100),  # nothing says who launched it
        ("generator", "convolution", 150),  # autograd's thread; the copy hides 50 of it
        ("generator", "other", 50),  # a sum of gradients, not the convolution's work
    ]
    assert (found.launches, found.total, found.idle) == (4, 1000, 300)
    assert found.phases == {"generator", "heads"}


def test_summary_of_a_gpu() -> None:
    found = summary(timeline(gpu_events(), on_device=True), 2)
    assert found["launches"] == 2 and found["launched"] == "device kernels"
    nonzero = {kind: ms for kind, ms in found["kinds"].items() if ms}
    assert nonzero == pytest.approx(
        {"convolution": 0.225, "heads": 0.05, "copies": 0.05, "other": 0.025, "gaps": 0.15}
    )
    assert found["phases"]["generator"] == pytest.approx({"convolution": 0.225, "other": 0.025})
    assert found["longest"][0] == {
        "name": "sm90_xmma_fprop",
        "kind": "convolution",
        "milliseconds": pytest.approx(0.15),
        "calls": 0.5,
    }
    assert found["attribution"].startswith("86% of the busy time")


def test_a_compiled_discriminator_is_said() -> None:
    work = Work("triton_tem_fused_convolution_1", "discriminator", "convolution", 5.0)
    marks = frozenset({"generator", "discriminator"})
    found = Timeline([work], 1, True, total=10.0, idle=5.0, phases=marks)
    assert "D is compiled as a whole" in summary(found, 1)["attribution"]


def test_backward_of_backward_belongs_to_its_forward(tmp_path: Path) -> None:
    """As in R1: matrix products in one phase, convolutions in the other."""
    x = torch.randn(1, 2, 8, 8, requires_grad=True)
    kernel = torch.randn(2, 2, 3, 3, requires_grad=True)
    weight = torch.randn(128, 128, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(WINDOW):
        with record_function(PREFIX + "generator"):
            h = F.conv2d(x, kernel, padding=1).flatten(1)
        with record_function(PREFIX + "discriminator"):
            y = (h @ weight).square().sum()
        (slope,) = torch.autograd.grad(y, x, create_graph=True)
        slope.square().sum().backward()
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    found = timeline(read_events(tmp_path / "trace.json"), on_device=False)
    phases: dict[str, list[str | None]] = {}
    for work in found.works:
        phases.setdefault(work.name, []).append(work.phase)
    assert set(phases["aten::mm"]) == {"discriminator"} and len(phases["aten::mm"]) >= 4
    convolutions = phases["aten::convolution_backward"] + phases["aten::convolution"]
    assert set(convolutions) == {"generator"} and len(convolutions) >= 3
    assert sum(w.microseconds for w in found.works) + found.idle == pytest.approx(found.total)


def test_marks_change_nothing() -> None:
    config = measured_config(
        "cifar10_cond_d2o_f", [*tiny_overrides("cifar10_cond_d2o_f"), "device=cpu"]
    )
    one, two = live_step(config, CPU), live_step(config, CPU)
    before = set(vars(two.step)), set(vars(two.step.discriminator.heads[0]))
    with marked_phases(two.step) as phases:
        assert set(vars(two.step)) > before[0]
        marked = two.run(1).scalars
    assert marked.items() >= one.run(1).scalars.items()
    assert phases > {"generator", "backbone", "mixing", "heads", "optimiser", "ema"}
    assert (set(vars(two.step)), set(vars(two.step.discriminator.heads[0]))) == before
    for (name, a), b in zip(one.state().items(), two.state().values(), strict=True):
        assert torch.equal(a, b), name


TRAINED = [
    path.stem
    for path in sorted((TOOL.parents[1] / "configs" / "experiment").glob("*.yaml"))
    if "pretrain" not in path.stem
]


@pytest.mark.parametrize("experiment", TRAINED)
def test_tiny_experiments_keep_their_kind(experiment: str) -> None:
    config = measured_config(experiment, [*tiny_overrides(experiment), "batch=4"])
    check_train(config)
    assert config.batch == 4
    dataset = experiment.removesuffix("_f").removesuffix("_d2o")
    if dataset in PUBLISHED_NETWORKS:
        kept = ("model_type", "encoder_type", "embedding_type", "label_dim", "resample_filter")
        tiny, large = config.init.network, PUBLISHED_NETWORKS[dataset]
        assert {k: tiny.get(k) for k in kept} == {k: large.get(k) for k in kept}
        assert tiny["model_channels"] < large["model_channels"]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


@pytest.fixture
def run_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """The command without a process of its own: status, stdout, stderr."""

    def call(*arguments: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOL), run_name="__main__")
        return (ended.value.code, *capsys.readouterr())

    return call


def test_the_command(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    fast = ["--iterations", 2, "--warmup", 1, "--tiny"]
    done = run("experiment=imagenet64_d2o_f", *fast, "device=cpu", "--out", out)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["profile.json", "trace.json.gz"]
    report = json.loads((out / "profile.json").read_text())
    assert report["device"] == "cpu" and "none of these numbers is a speed" in report["note"]
    assert (report["batch"], report["engine"], report["precision"]) == (2, "plain", "published")
    assert report["software"]["torch"] == torch.__version__ and "--tiny" in report["command"]
    clocked = report["seconds_per_iteration"]
    assert clocked["n"] == len(clocked["samples"]) == 2
    assert report["img_per_sec"] == pytest.approx(2 / clocked["median"])
    assert report["seconds_to_first_step"] > 0 and report["gflop_per_image"] > 1
    assert report["peak_memory_bytes"] is None and report["mfu"] is None
    kinds = check_profile(report["profiles"]["step"], out)
    named = ("convolution", "norm", "attention", "backbone", "mixing", "heads", "optimiser")
    assert all(kinds[kind] > 0 for kind in named), kinds
    assert done.stdout.startswith(table(report)) and str(out) in done.stdout
    assert "not counted on a CPU" in done.stdout and report["note"] in done.stdout


def test_r1_is_profiled_apart(
    tmp_path: Path, run_here: Callable[..., tuple[object, str, str]]
) -> None:
    fast = ["--iterations", 1, "--warmup", 1, "--r1", "--tiny", "device=cpu"]
    every_second = "loss.r1_interval=2"
    status, told, _ = run_here("experiment=demo", every_second, *fast, "--out", tmp_path)
    assert status == 0 and "Step with R1" in told
    names = ["profile.json", "trace-r1.json.gz", "trace.json.gz"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names
    profiles = json.loads((tmp_path / "profile.json").read_text())["profiles"]
    plain, r1 = (check_profile(profiles[name], tmp_path) for name in ("step", "r1"))
    # Another update of the heads, behind two backward passes through the encoder.
    assert profiles["r1"]["launches"] > 1.2 * profiles["step"]["launches"]
    assert plain["backbone"] > 0 and r1["backbone"] > 0
    for name, parity in (("step", 1), ("r1", 0)):
        events = read_events(tmp_path / profiles[name]["trace"])
        ran = [e["name"].split() for e in events if e["name"].startswith("iteration ")]
        assert len(ran) == 2 and {int(number) % 2 for _, number in ran} == {parity}


def check_profile(profiled: dict[str, Any], out: Path) -> dict[str, float]:
    """What holds of every profile; its kinds."""
    kinds = profiled["kinds"]
    assert set(kinds) == {*KINDS, "gaps"}
    assert sum(kinds.values()) == pytest.approx(profiled["milliseconds"], rel=1e-6)
    by_phase = sum(ms for phase in profiled["phases"].values() for ms in phase.values())
    assert by_phase + kinds["gaps"] == pytest.approx(profiled["milliseconds"], rel=1e-6)
    assert profiled["launches"] > 1000 and "operators" in profiled["launched"]
    assert int(profiled["attribution"].split("%")[0]) > 80
    with gzip.open(out / profiled["trace"], "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(e.get("cat") == "cpu_op" for e in events) > 1000
    assert {PREFIX + "generator", PREFIX + "heads"} <= {e["name"] for e in events}
    return kinds


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["experiment=imagenet128", "--tiny"], "imagenet64_d2o_f"),
        (["experiment=demo", "engine=warp"], "engine"),
        (["experiment=demo", "--iterations", 0], "--iterations 0"),
        (["experiment=demo", "--warmup", 0], "--warmup 0"),
        (["engine=plain"], "experiment=cifar10_uncond_d2o_f"),
        (["experiment=demo", "batch_gpu=auto", "device=cpu"], "batch_gpu=N"),
        (["experiment=demo", "loss.r1_interval=0", "--r1"], "loss.r1_interval=16"),
        (["experiment=demo", "--out", __file__, "device=cpu"], "--out FOLDER"),
        (["--fast"], "--fast"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[object], told: str, run_here: Callable[..., tuple[object, str, str]]
) -> None:
    status, out, error = run_here(*arguments)
    assert (status, out) == (1, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert told in error


def test_a_gpu_that_is_not_there(
    run_here: Callable[..., tuple[object, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, error = run_here("experiment=demo", "device=cuda")
    assert status == 1 and "device=cpu would be a dry run" in error
