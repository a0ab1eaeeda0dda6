"""One training step under the clock and under the profiler: the report of tools/profile_step.py."""

import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import torch
from benchmarks.gpu_report.rates import product_rate
from benchmarks.gpu_report.results import header, samples, write_json
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from fastgan import config as cfg
from fastgan.common.errors import UserError
from fastgan.launch import checks
from fastgan.performance.iteration import iteration_flop
from fastgan.performance.live_step import LiveStep, live_step
from fastgan.performance.phases import marked_phases
from fastgan.performance.profile_report import summary
from fastgan.performance.trace import WINDOW, read_events, timeline
from fastgan.training.monitor import Skips

# Their trace still opens in a browser: an iteration of the largest network has some 1e5 events.
PROFILED_ITERATIONS = 2
CPU_NOTE = "measured on a CPU: a check that everything runs, none of these numbers is a speed"
REPORT = "profile.json"


@dataclass(frozen=True)
class Request:
    """What to measure: iterations on the clock after `warmup` others, and R1's too if `r1`."""

    experiment: str
    iterations: int
    warmup: int
    r1: bool
    tiny: bool
    out: Path

    def __post_init__(self) -> None:
        """UserError: a number of iterations below 1."""
        for option in ("iterations", "warmup"):
            value = getattr(self, option)
            if value < 1:
                raise UserError(f"--{option} {value} is out of range, 1 or more would be right")


def profile_step(config: cfg.TrainConfig, request: Request) -> dict[str, Any]:
    """Measures the step of `config`; leaves traces and profile.json in the request's folder.

    Returns what profile.json holds; times in it are per iteration. UserError: a setting that cannot
    run here, a folder that cannot be written, too little memory.
    """
    device = _device(config)
    if config.batch_gpu == checks.AUTO:
        raise UserError(
            "batch_gpu=auto is settled by trials of a training, a profile has none, batch_gpu=N "
            "with the number in the training's log would be right"
        )
    if request.r1 and not config.loss.r1_interval:
        raise UserError(
            "R1 is off, --r1 with loss.r1_interval=0, loss.r1_interval=16 would be published"
        )
    _make_folder(request.out)
    try:
        report = _measured(config, request, device)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of memory with {config.batch_gpu or config.batch} images per pass, "
            f"on {_device_name(device)}, a smaller batch_gpu would fit"
        ) from error
    write_json(request.out / REPORT, report)
    return report


def _measured(config: cfg.TrainConfig, request: Request, device: torch.device) -> dict[str, Any]:
    # First, while there is memory; on a CPU nothing is a speed, nor a share of one.
    rate = product_rate("bf16", tiny=False)["median"] if device.type == "cuda" else None
    live = live_step(config, device)
    with live.draw:
        speed, profiles = _run(live, request, device)
    flop = _flop_per_image(config)
    arithmetic = {
        "gflop_per_image": flop / 1e9,
        "matmul_flop_per_sec": rate,
        "mfu": flop * speed["img_per_sec"] / rate if rate else None,
    }
    return {**_provenance(config, request, device), **speed, **arithmetic, "profiles": profiles}


def _run(
    live: LiveStep, request: Request, device: torch.device
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Speeds, and the profiles of an iteration without R1 and, if asked for, of one with it."""
    interval = live.config.loss.r1_interval
    plain = (k for k in count(1) if not interval or k % interval)
    speed = _clocked(live, plain, request, device)
    profiles = {"step": _profiled(live, plain, device, request.out / "trace.json.gz")}
    if request.r1:
        r1 = count(interval, interval)
        for _ in range(live.step.settling):
            live.run(next(r1))
        profiles["r1"] = _profiled(live, r1, device, request.out / "trace-r1.json.gz")
    return speed, profiles


def _clocked(
    live: LiveStep, numbers: Iterator[int], request: Request, device: torch.device
) -> dict[str, Any]:
    """Seconds of the first and of `iterations` later steps, and the memory that these need."""
    first = _seconds(lambda: live.run(next(numbers)), device)
    for _ in range(max(request.warmup, live.step.settling) - 1):
        live.run(next(numbers))
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    skips = Skips(device)
    taken = [
        _seconds(lambda: skips.add(live.run(next(numbers)).skipped), device)
        for _ in range(request.iterations)
    ]
    return {
        "img_per_sec": live.config.batch / median(taken),
        "seconds_per_iteration": samples(taken),
        # A network that no longer trains skips part of the work.
        "skipped_updates": sum(skips.take().values()),
        "seconds_to_first_step": first,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if on_gpu else None,
    }


def _profiled(
    live: LiveStep, numbers: Iterator[int], device: torch.device, path: Path
) -> dict[str, Any]:
    """Iterations under torch.profiler, their trace in `path` and the summary of it."""
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    # The first iteration is for the profiler to warm up, and is not recorded.
    once = schedule(wait=0, warmup=1, active=1, repeat=1)
    # acc_events: without it some releases warn that they clear events, of which there are none.
    profiling = profile(activities=activities, schedule=once, acc_events=True)
    with marked_phases(live.step), profiling as profiler:
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
        written = Path(aside) / path.name
        profiler.export_chrome_trace(str(written))
        found = timeline(read_events(written), on_device=device.type == "cuda")
        os.replace(written, path)
    return {"trace": path.name, **summary(found, PROFILED_ITERATIONS)}


def _flop_per_image(config: cfg.TrainConfig) -> float:
    """Of an iteration without R1, as those on the clock are."""
    return iteration_flop(replace(config, loss=replace(config.loss, r1_interval=0)))


def _seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of a call, until the device has done all that it asked for."""
    _synchronise(device)
    start = time.perf_counter()
    call()
    _synchronise(device)
    return time.perf_counter() - start


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _provenance(config: cfg.TrainConfig, request: Request, device: torch.device) -> dict[str, Any]:
    measured = header()
    return {
        "datetime": measured["datetime"],
        "software": measured["software"],
        "command": " ".join(sys.argv),
        "experiment": request.experiment,
        "engine": config.engine.value,
        "precision": config.precision.value,
        "kernels": os.environ.get("FASTGAN_KERNELS") or config.kernels.value,
        "batch": config.batch,
        "batch_gpu": config.batch_gpu or config.batch,
        "tiny": request.tiny,
        "device": device.type,
        "device_name": _device_name(device),
        "note": CPU_NOTE if device.type == "cpu" else None,
        "warmup_iterations": request.warmup,
    }


def _device(config: cfg.TrainConfig) -> torch.device:
    name = config.device.value
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device=cuda, but no GPU is there, device=cpu would be a dry run")
    return torch.device(name)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot be made ({error.strerror}), {path}, --out FOLDER would name another"
        ) from error
