"""Where the time of a training step goes: tools/profile_step.py, on torch.profiler.

An iteration's time is divided twice: by phase, the ranges `step/NAME` that the step puts around its
parts (a kernel belongs to those in which it was launched, backward passes included), and by the
kind of work that the names of kernels and operators tell. Every instant counts once; on a GPU it
belongs to the kernel that runs (of several at a time to the first one that began), on a CPU to the
innermost operator. `gaps` is what is left: the device waited. The exported Chrome trace is read
rather than the profiler's events: its format is the same in all releases of PyTorch.
"""

import gzip
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import profile, record_function, schedule
from torch.utils.benchmark import timer

from fastgan import config as cfg
from fastgan.common import distributed
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically
from fastgan.launch import checks
from fastgan.performance.live_step import LiveStep, architecture_of, live_step
from fastgan.performance.machines import full_speed

# Before the clock: compilation and trials of algorithms are over by then.
WARMUP = 3
# In each window. The trace still opens in a browser: an iteration of the largest network has some
# 1e5 events.
PROFILED_ITERATIONS = 2
_NOTE = "measured on a CPU: a check that everything runs, none of these numbers is a speed"
TRACE = "trace.json.gz"
GAPS, OUTSIDE = "gaps", "outside"
_LAUNCHES = ("cuda_runtime", "cuda_driver")
KINDS = ("convolution", "norm", "attention", "optimiser", "copies", "resampling", "other")
# The first pattern found in a name in lower case; Inductor's by the heaviest operation (`tem`:
# templates of products, `for`: foreach kernels). Matrix products outside attention count as
# convolutions (1x1 ones and embeddings), SiLU as the norm that most engines fuse it into.
_RULES = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("copies", r"nchwtonhwc|nhwctonchw|converttensor|transpose_readwrite"),
        ("convolution", r"norm_silu_conv|^triton_tem_fused_(?!.*bmm)"),
        ("optimiser", r"multi_tensor_apply|adam|_foreach_|lerp|^triton_for_"),
        ("attention", r"softmax|flash|fmha|sdpa|scaled_dot_product|attention|bmm"),
        ("norm", r"group_?norm|batch_?norm|layer_?norm|rowwisemoments|bn_(?:fw|bw)|silu|swish"),
        ("norm", r"fusedparamscudakernel|internalgradientscudakernel|gammabeta"),
        ("resampling", r"resample|upsample|interpolate|resize_normalize|avg_?pool|grid_sampl"),
        ("resampling", r"unsafe_index|depthwise|2d_c1_k1|^_adjoint_kernel|^_kernel$"),
        ("norm", r"^_(?:two_tile_)?(?:forward|backward)_kernel"),
        ("convolution", r"conv(?!ert)|cudnn|gemm|xmma|wgrad|dgrad|fprop|winograd|cutlass|nvjet"),
        ("convolution", r"splitkreduce|gemv|\b(?:add)?m[mv]\b|(?:^|add)m[mv]backward|linear$"),
        ("convolution", r"_fused_(?:.*_)?(?:add)?mm(?:_|$)"),
        ("copies", r"_fused_(?:_|\d|to_copy|copy|clone|cat|view|permute|transpose|slice|fill)+$"),
        ("other", r"(?:^triton_[a-z]+|cpp)_fused_"),
        ("copies", r"memcpy|memset|copy|clone|contiguous|\bcat\b|catarray|fill|zero_"),
    )
)
# These count as a whole: their library forms may well call a convolution.
_WHOLE = re.compile(r"fastgan::(group_norm_silu|norm_silu_conv|resample2x|resize_normalize)")


def kind_of(names: Sequence[str], phase: str | None = None) -> str:
    """One of KINDS for work in the innermost `phase` of the step.

    `names`: of the kernel, then of the operators that it was launched in, innermost first. Those of
    elementwise kernels say nothing.
    """
    if phase in ("update", "EMA"):
        return "optimiser"
    names = list(filter(_WHOLE.match, names)) or names
    found = (kind for n in names for kind, pattern in _RULES if pattern.search(n.lower()))
    return next(found, "other")


@dataclass(slots=True, eq=False)
class Span:
    """An event with times in microseconds, and on the host the event that it happened in."""

    name: str
    category: str
    thread: int
    start: float
    end: float
    arguments: dict[str, Any]
    parent: "Span | None" = None

    def around(self) -> "Iterator[Span]":
        """The span itself, then what encloses it, innermost first."""
        span: Span | None = self
        while span is not None:
            yield span
            span = span.parent


def read_events(path: Path) -> list[dict[str, Any]]:
    """The events of a Chrome trace, a `.json.gz`."""
    return json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]


def summary(
    events: Iterable[dict[str, Any]], window: str, iterations: int, *, on_device: bool
) -> dict[str, Any]:
    """Milliseconds per iteration inside the trace's range `window`, which holds `iterations`.

    `phases` has them by path of phases (G/generate; G itself is what is in none of its parts, its
    backward pass first of all) and kind, `kinds` without the phases: with `gaps` these add up to
    `milliseconds`. `on_device`: kernels and copies of the GPU; otherwise operators of the CPU.
    """
    spans = [
        Span(e["name"], e["cat"], e["tid"], e["ts"], e["ts"] + e.get("dur", 0), e.get("args", {}))
        for e in events
        if e.get("ph") == "X"
    ]
    spans.sort(key=lambda span: (span.start, -span.end))
    host = [s for s in spans if s.category in ("cpu_op", "user_annotation", *_LAUNCHES)]
    _nest(host)
    inside = next(span for span in host if span.name == window)
    ranges = [s for s in host if s.name.startswith("step/")]
    ran = _on_device(spans, host, inside) if on_device else _on_host(host, inside)
    phases: dict[str, Counter[str]] = {}
    for span, launch, nanoseconds in ran:
        moment = launch.start if launch else -1.0
        path = [s.name.removeprefix("step/") for s in ranges if s.start <= moment < s.end]
        names = [s.name for s in (launch.around() if launch else ()) if s.category == "cpu_op"]
        # Around a node of a backward pass, it adds up gradients too: none of the node's work.
        names = [n for n in names if not n.startswith("autograd::engine::evaluate_function")]
        kind = kind_of([span.name, *names], path[-1] if path else None)
        phases.setdefault("/".join(path) or OUTSIDE, Counter())[kind] += nanoseconds

    per_iteration = 1 / 1e6 / iterations
    total = 1e3 * (inside.end - inside.start) * per_iteration
    kinds = {kind: per_iteration * sum(p[kind] for p in phases.values()) for kind in KINDS}
    return {
        "milliseconds": total,
        "kinds": kinds | {GAPS: total - sum(kinds.values())},
        "phases": {
            path: {kind: per_iteration * spent for kind, spent in phases[path].items()}
            for path in sorted(phases)
        },
    }


# What ran, the operator or call on the host that started it, nanoseconds that are its own.
_Ran = list[tuple[Span, Span | None, int]]


def _nest(spans: Iterable[Span]) -> None:
    """Gives spans sorted by (start, -end) their parents on the same thread."""
    innermost: dict[int, Span] = {}
    for span in spans:
        parent = innermost.get(span.thread)
        while parent is not None and parent.end <= span.start:
            parent = parent.parent
        span.parent = parent
        innermost[span.thread] = span


def _on_device(spans: Iterable[Span], host: Iterable[Span], window: Span) -> _Ran:
    """What runs beside an earlier kernel, on another stream, counts from that one's end on."""
    by_operator = {s.arguments.get("External id"): s for s in host if s.category == "cpu_op"}
    by_call = {s.arguments.get("correlation"): s for s in host if s.category in _LAUNCHES}
    ran, now = [], window.start
    for span in spans:
        begins, ends = max(span.start, now), min(span.end, window.end)
        if span.category in ("kernel", "gpu_memcpy", "gpu_memset") and begins < ends:
            launch = by_operator.get(span.arguments.get("External id", -1))
            launch = launch or by_call.get(span.arguments.get("correlation", -1))
            ran.append((span, launch, round(1e3 * (ends - begins))))
            now = ends
    return ran


def _on_host(host: Iterable[Span], window: Span) -> _Ran:
    """Operators of the thread that trains, without those that they call."""
    inside = [s for s in host if s.category == "cpu_op" and window in s.around()]
    own = {id(span): span.end - span.start for span in inside}
    for span in inside:
        caller = next((s for s in span.around() if s is not span and id(s) in own), None)
        if caller is not None:
            own[id(caller)] -= span.end - span.start
    return [(span, span, round(1e3 * own[id(span)])) for span in inside]


def profile_step(config: cfg.TrainConfig, out: Path, iterations: int = 10) -> dict[str, Any]:
    """Measures the step of `config`; leaves trace.json.gz and profile.json in folder `out`.

    The speed is that of `iterations` iterations without R1; a profile of those with R1 (where they
    differ) comes beside theirs. Returns what profile.json holds. UserError: a setting that cannot
    run here, a folder that cannot be written, too little memory.
    """
    if iterations < 1:
        raise UserError(f"--iterations {iterations} is out of range, 1 or more would be right")
    if config.batch_gpu == checks.AUTO:
        raise UserError(
            "batch_gpu=auto is settled by trials of a training, a profile has none, batch_gpu=N "
            "with the number in the training's log would be right"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be made ({error.strerror}), {out}, --out FOLDER would name another"
        ) from error
    world = distributed.init(config.device.value)
    try:
        report = _settings(config, world.device) | _measured(config, out, iterations, world)
    except torch.OutOfMemoryError as error:
        raise UserError("out of memory, on the GPU, a smaller batch would be right") from error
    with replace_atomically(out / "profile.json") as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    return report


def _settings(config: cfg.TrainConfig, device: torch.device) -> dict[str, Any]:
    on_gpu = device.type == "cuda"
    return {
        "command": " ".join(sys.argv),
        "torch": torch.__version__,
        "engine": config.engine.value,
        "precision": config.precision.value,
        "kernels": os.environ.get("FASTGAN_KERNELS") or config.kernels.value,
        "batch": config.batch,
        "batch_gpu": config.batch_gpu or config.batch,
        "device_name": torch.cuda.get_device_name(device) if on_gpu else "CPU",
        "note": None if on_gpu else _NOTE,
    }


def _measured(
    config: cfg.TrainConfig, out: Path, iterations: int, world: distributed.World
) -> dict[str, Any]:
    interval = config.loss.r1_interval
    numbers: dict[str, Iterator[int]] = {"step": count(1)}
    if interval > 1:
        numbers = {"step": (k for k in count(1) if k % interval), "r1": count(interval, interval)}
    live = live_step(config, world.device)

    def seconds(kind: str) -> float:
        start = timer()  # synchronises
        live.run(next(numbers[kind]))
        return timer() - start

    with live.draw:
        for kind in numbers:
            for _ in range(max(WARMUP, live.step.settling)):
                seconds(kind)
        taken = median(seconds("step") for _ in range(iterations))
        _record(live, numbers, out / TRACE)
    # What is on the clock has R1 where every iteration has.
    counted = replace(config, loss=replace(config.loss, r1_interval=int(interval == 1)))
    peak = full_speed(counted, architecture_of(config), world)
    events, on_device = read_events(out / TRACE), world.device.type == "cuda"
    return {
        "img_per_sec": config.batch / taken,
        "seconds_per_iteration": taken,
        "mfu": config.batch / taken / peak if peak else None,
        "profiles": {
            kind: summary(events, kind, PROFILED_ITERATIONS, on_device=on_device)
            for kind in numbers
        },
    }


def _record(live: LiveStep, numbers: dict[str, Iterator[int]], path: Path) -> None:
    """Some iterations of each kind under torch.profiler, in a range of the kind's name."""
    # The first iteration is for the profiler to warm up, and is not recorded.
    once = schedule(wait=0, warmup=1, active=1, repeat=1)
    # acc_events: without it some releases warn that they clear events, of which there are none.
    with profile(schedule=once, acc_events=True) as profiler:
        live.run(next(numbers["step"]))
        timer()
        profiler.step()
        for kind, of_kind in numbers.items():
            with record_function(kind):
                for _ in range(PROFILED_ITERATIONS):
                    k = next(of_kind)
                    with record_function(f"iteration {k}"):
                        live.run(k)
                timer()
        profiler.step()
    profiler.export_chrome_trace(str(path))


def table(report: dict[str, Any]) -> str:
    """What is printed: the speed and its share of the peak, then milliseconds of every profile."""
    keys = ("engine", "precision", "kernels", "batch", "batch_gpu")
    settings = " ".join(f"{key}={report[key]}" for key in keys)
    mfu = report["mfu"]
    lines = [
        f"{settings} on {report['device_name']}",
        *([report["note"]] if report["note"] else []),
        f"img/s: {report['img_per_sec']:.4g} ({1e3 * report['seconds_per_iteration']:.1f} ms per "
        "iteration without the profiler)",
        f"MFU: {f'{mfu:.1%} of the datasheet bf16 rate' if mfu else 'not known on this device'}",
    ]
    for kind, found in report["profiles"].items():
        lines += ["", f"{kind}, milliseconds per iteration", *_rows(found)]
    return "\n".join(lines)


def _rows(found: dict[str, Any]) -> Iterator[str]:
    """Phases by kind, then all of them together."""
    shown = [kind for kind, milliseconds in found["kinds"].items() if milliseconds]
    yield f"{'phase':<14}{'all':>10}{'share':>8}" + "".join(f"{kind:>13}" for kind in shown)
    for path, kinds in [*found["phases"].items(), ("all", found["kinds"])]:
        spent = [kinds.get(kind, 0.0) for kind in shown]
        cells = "".join(f"{milliseconds:>13.3f}" for milliseconds in spent)
        yield f"{path:<14}{sum(spent):>10.3f}{sum(spent) / found['milliseconds']:>8.1%}{cells}"
