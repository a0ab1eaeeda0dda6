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
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fastgan import config as cfg
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically
from fastgan.launch import checks
from fastgan.performance.iteration import iteration_flop
from fastgan.performance.live_step import LiveStep, live_step
from fastgan.performance.machines import product_rate

WINDOW = "profiled iterations"
"""The range that the analysis is confined to."""
# Their trace still opens in a browser: an iteration of the largest network has some 1e5 events.
PROFILED_ITERATIONS = 2
_NOTE = "measured on a CPU: a check that everything runs, none of these numbers is a speed"
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
    events: Iterable[dict[str, Any]], iterations: int, *, on_device: bool
) -> dict[str, Any]:
    """Milliseconds per iteration inside the trace's range WINDOW, which holds `iterations`.

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
    window = next(span for span in host if span.name == WINDOW)
    ranges = [s for s in host if s.name.startswith("step/")]
    ran = _on_device(spans, host, window) if on_device else _on_host(host, window)
    phases: dict[str, Counter[str]] = {}
    longest: Counter[tuple[str, str]] = Counter()
    for span, launch, nanoseconds in ran:
        moment = launch.start if launch else -1.0
        path = [s.name.removeprefix("step/") for s in ranges if s.start <= moment < s.end]
        names = [s.name for s in (launch.around() if launch else ()) if s.category == "cpu_op"]
        # Around a node of a backward pass, it adds up gradients too: none of the node's work.
        names = [n for n in names if not n.startswith("autograd::engine::evaluate_function")]
        kind = kind_of([span.name, *names], path[-1] if path else None)
        phases.setdefault("/".join(path) or OUTSIDE, Counter())[kind] += nanoseconds
        longest[span.name, kind] += nanoseconds

    per_iteration = 1 / 1e6 / iterations
    total = 1e3 * (window.end - window.start) * per_iteration
    kinds = {kind: per_iteration * sum(p[kind] for p in phases.values()) for kind in KINDS}
    counted = [s for s in spans if s.category == ("kernel" if on_device else "cpu_op")]
    return {
        "milliseconds": total,
        "kinds": kinds | {GAPS: total - sum(kinds.values())},
        "phases": {
            path: {kind: per_iteration * spent for kind, spent in phases[path].items()}
            for path in sorted(phases)
        },
        "launches": sum(window.start <= s.start < window.end for s in counted) / iterations,
        "longest": [
            {"name": name, "kind": kind, "milliseconds": per_iteration * spent}
            for (name, kind), spent in longest.most_common(25)
        ],
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


@dataclass(frozen=True)
class Request:
    """What to measure: iterations on the clock after `warmup` others, and R1's too if `r1`."""

    experiment: str
    iterations: int
    warmup: int
    r1: bool
    tiny: bool
    out: Path


def profile_step(config: cfg.TrainConfig, request: Request) -> dict[str, Any]:
    """Measures the step of `config`; leaves traces and profile.json in the request's folder.

    Returns what profile.json holds; times in it are per iteration. UserError: a setting that cannot
    run here, a folder that cannot be written, too little memory.
    """
    device = torch.device(config.device.value)
    _check(config, request, device)
    try:
        report = _provenance(config, request, device) | _measured(config, request, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with {config.batch_gpu or config.batch} images per pass, "
            f"on {torch.cuda.get_device_name(device)}, a smaller batch_gpu would fit"
        ) from error
    with replace_atomically(request.out / "profile.json") as file:
        file.write((json.dumps(report, indent=1) + "\n").encode())
    return report


def _check(config: cfg.TrainConfig, request: Request, device: torch.device) -> None:
    for option, value in (("iterations", request.iterations), ("warmup", request.warmup)):
        if value < 1:
            raise UserError(f"--{option} {value} is out of range, 1 or more would be right")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no GPU is there, device=cpu would be a dry run")
    if config.batch_gpu == checks.AUTO:
        raise UserError(
            "batch_gpu=auto is settled by trials of a training, a profile has none, batch_gpu=N "
            "with the number in the training's log would be right"
        )
    if request.r1 and not config.loss.r1_interval:
        raise UserError(
            "R1 is off, --r1 with loss.r1_interval=0, loss.r1_interval=16 would be published"
        )
    try:
        request.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be made ({error.strerror}), {request.out}, --out FOLDER would name another"
        ) from error


def _measured(config: cfg.TrainConfig, request: Request, device: torch.device) -> dict[str, Any]:
    # First, while there is memory; on a CPU nothing is a speed, nor a share of one.
    rate = median(product_rate(device, torch.bfloat16)) if device.type == "cuda" else None
    # Of an iteration without R1, as those on the clock are.
    flop = iteration_flop(replace(config, loss=replace(config.loss, r1_interval=0)))
    interval = config.loss.r1_interval
    plain = (k for k in count(1) if not interval or k % interval)
    live = live_step(config, device)
    with live.draw:
        found = _clocked(live, plain, request, device)
        profiles = {"step": _profiled(live, plain, device, request.out / "trace.json.gz")}
        if request.r1:
            r1 = count(interval, interval)
            for _ in range(live.step.settling):
                live.run(next(r1))
            profiles["r1"] = _profiled(live, r1, device, request.out / "trace-r1.json.gz")
    return found | {
        "gflop_per_image": flop / 1e9,
        "matmul_flop_per_sec": rate,
        "mfu": flop * found["img_per_sec"] / rate if rate else None,
        "profiles": profiles,
    }


def _clocked(
    live: LiveStep, numbers: Iterator[int], request: Request, device: torch.device
) -> dict[str, Any]:
    """Seconds of the first and of `iterations` later steps, and the memory that these need."""
    skipped = []

    def seconds() -> float:
        _synchronise(device)
        start = time.perf_counter()
        result = live.run(next(numbers))
        _synchronise(device)
        taken = time.perf_counter() - start
        skipped.append(sum(map(int, result.skipped.values())))
        return taken

    first = seconds()
    for _ in range(max(request.warmup, live.step.settling) - 1):
        seconds()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    taken = [seconds() for _ in range(request.iterations)]
    memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "img_per_sec": live.config.batch / median(taken),
        "seconds_per_iteration": {"median": median(taken), "n": len(taken), "samples": taken},
        # A network that no longer trains skips part of the work.
        "skipped_updates": sum(skipped[-request.iterations :]),
        "seconds_to_first_step": first,
        "peak_memory_bytes": memory,
    }


def _profiled(
    live: LiveStep, numbers: Iterator[int], device: torch.device, path: Path
) -> dict[str, Any]:
    """Iterations under torch.profiler, their trace in `path` and the summary of it."""
    on_device = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_device else [])]
    # The first iteration is for the profiler to warm up, and is not recorded.
    once = schedule(wait=0, warmup=1, active=1, repeat=1)
    # acc_events: without it some releases warn that they clear events, of which there are none.
    with profile(activities=activities, schedule=once, acc_events=True) as profiler:
        live.run(next(numbers))
        _synchronise(device)
        profiler.step()
        with record_function(WINDOW):
            for _ in range(PROFILED_ITERATIONS):
                k = next(numbers)
                with record_function(f"iteration {k}"):
                    live.run(k)
            _synchronise(device)
        profiler.step()
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        written = Path(aside, path.name)
        profiler.export_chrome_trace(str(written))
        found = summary(read_events(written), PROFILED_ITERATIONS, on_device=on_device)
        written.replace(path)
    return {"trace": path.name, **found}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _provenance(config: cfg.TrainConfig, request: Request, device: torch.device) -> dict[str, Any]:
    return {
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": {"torch": torch.__version__, "cuda": torch.version.cuda},
        "command": " ".join(sys.argv),
        "experiment": request.experiment,
        "engine": config.engine.value,
        "precision": config.precision.value,
        "kernels": os.environ.get("FASTGAN_KERNELS") or config.kernels.value,
        "batch": config.batch,
        "batch_gpu": config.batch_gpu or config.batch,
        "tiny": request.tiny,
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "note": None if device.type == "cuda" else _NOTE,
    }


def table(report: dict[str, Any]) -> str:
    """What is printed: speed, share of the peak and memory, then milliseconds of every profile."""
    clocked, memory = report["seconds_per_iteration"], report["peak_memory_bytes"]
    keys = ("engine", "precision", "kernels", "batch", "batch_gpu")
    settings = " ".join(f"{key}={report[key]}" for key in keys)
    rate = (report["matmul_flop_per_sec"] or 0) / 1e12
    share = (
        f"{report['mfu']:.1%} of {rate:.3g} TFLOP/s in products" if rate else "not known on a CPU"
    )
    size = " (shrunk)" if report["tiny"] else ""
    lines = [
        f"{report['experiment']}{size} {settings} on {report['device_name']}",
        *([report["note"]] if report["note"] else []),
        f"img/s: {report['img_per_sec']:.4g} (median of {clocked['n']} iterations, "
        f"{1e3 * clocked['median']:.1f} ms each without the profiler)",
        f"MFU: {share} ({report['gflop_per_image']:.4g} GFLOP per image)",
        f"peak memory: {f'{memory / 2**30:.2f} GiB' if memory else 'not counted on a CPU'}",
        f"time to first step: {report['seconds_to_first_step']:.1f} s",
    ]
    for name, found in report["profiles"].items():
        with_r1 = "with" if name == "r1" else "without"
        lines += ["", f"Step {with_r1} R1, milliseconds per iteration", *_rows(found)]
        lines.append(f"{found['launches']:.0f} launches per iteration")
    return "\n".join(lines)


def _rows(found: dict[str, Any]) -> Iterator[str]:
    """Phases by kind, then all of them together."""
    total, shown = found["milliseconds"], [k for k in KINDS if found["kinds"][k]]
    yield f"{'phase':<14}{'all':>10}{'share':>8}" + "".join(f"{kind:>13}" for kind in shown)
    for path, kinds in [*found["phases"].items(), ("all", found["kinds"])]:
        spent = [kinds.get(kind, 0.0) for kind in shown]
        cells = "".join(f"{milliseconds:>13.3f}" for milliseconds in spent)
        yield f"{path:<14}{sum(spent):>10.3f}{sum(spent) / total:>8.1%}{cells}"
    gaps = found["kinds"][GAPS]
    yield f"{GAPS:<14}{gaps:>10.3f}{gaps / total:>8.1%}"
