"""Seconds per call on this machine, the rates of its chip that bound them, and what a file of
results says about both.

A GPU runs calls from a CUDA graph (the way the fast engine runs them; Python's share of a call is
not measured), one after the other on inputs that together overflow its L2 cache, and every call has
its own output. All work is on one stream, because backward runs where forward ran.
"""

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from math import ceil
from statistics import median
from typing import Any

import torch
import triton

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter gets bfloat16 wrong.
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ROUNDS = 20 if ON_GPU else 1
ROUND_SECONDS = 2e-3
Call = Callable[[], object]
Content = dict[str, Any]


def header() -> Content:
    """Where and with what the numbers beside it were measured; on a CPU they are no speeds."""
    return {
        "chip": torch.cuda.get_device_name(0) if ON_GPU else "CPU",
        "dry_run": not ON_GPU,
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if ON_GPU else None,
        },
    }


def samples(values: Sequence[float]) -> Content:
    """A measurement: its median, how many samples it is of, and these (all in one unit)."""
    return {"median": median(values), "n": len(values), "samples": list(values)}


def seconds() -> float:
    """The time at which all work given to the device so far is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


@cache
def _stream() -> Any:
    return torch.cuda.Stream()


def one_stream() -> AbstractContextManager[Any]:
    """Inside, all work of a GPU is on the stream that graphs are captured on."""
    if ON_GPU:
        _stream().wait_stream(torch.cuda.current_stream())
    return torch.cuda.stream(_stream() if ON_GPU else None)


def _replay(calls: Sequence[Call]) -> Call:
    """Runs each of `calls` once; on a GPU as one graph."""
    # Libraries choose their algorithms here, which they may not while a graph is captured.
    for call in calls:
        call()
    if not ON_GPU:
        return lambda: [call() for call in calls]
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=_stream()):
        # All outputs stay until the last: with memory of their own they are written to the device.
        outputs = [call() for call in calls]
    del outputs
    return graph.replay


def per_call(calls: Sequence[Call]) -> list[float]:
    """Seconds per call in ROUNDS rounds, each of at least ROUND_SECONDS, after warm-up."""
    with one_stream():
        replay, turns = warmed_up(calls)
        return [_clocked(replay, turns) / (turns * len(calls)) for _ in range(ROUNDS)]


def warmed_up(calls: Sequence[Call]) -> tuple[Call, int]:
    """What runs each of `calls` once, on a GPU as one graph; how often in ROUND_SECONDS."""
    replay = _replay(calls)
    once = min(_clocked(replay, 1) for _ in range(4)) if ON_GPU else ROUND_SECONDS
    return replay, max(1, ceil(ROUND_SECONDS / once))


def _clocked(run: Call, turns: int) -> float:
    start = seconds()
    for _ in range(turns):
        run()
    return seconds() - start


def copies(bytes_per_call: int) -> int:
    """How many inputs to rotate, so that a call finds nothing of its previous turn in the cache:
    together they are four times the L2."""
    if not ON_GPU:
        return 1
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(2, ceil(4 * l2_bytes / bytes_per_call)))


def timed(calls: Sequence[Call]) -> list[float]:
    """Seconds of each call while they follow each other as in training, unsynchronised: on a GPU
    by its own clock, from the end of one call's work to the end of the next one's."""
    marks = [_mark()]
    for call in calls:
        call()
        marks.append(_mark())
    seconds()
    return [a.elapsed_time(b) / 1e3 if ON_GPU else b - a for a, b in pairwise(marks)]


def _mark() -> Any:
    if not ON_GPU:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def kept_bytes(forward: Callable[[], torch.Tensor], besides: int = 0) -> int | None:
    """Allocated by a forward pass and still there for backward, its result not counted, `besides`
    what was there before; None on a CPU, whose allocations PyTorch does not count."""
    before = torch.cuda.memory_allocated() if ON_GPU else 0
    y = forward()
    return torch.cuda.memory_allocated() - before - y.nbytes + besides if ON_GPU else None


def copy_bandwidth() -> Content:
    """Samples: bytes read plus bytes written per second, copying 1 GiB (a CPU: much less)."""
    source = torch.randn(2**29 if ON_GPU else 2**16, device=DEVICE).to(DTYPE)
    target = torch.empty_like(source)
    return samples([2 * source.nbytes / t for t in per_call([lambda: target.copy_(source)])])


def product_rate(dtype: torch.dtype = DTYPE) -> Content:
    """Samples: FLOP per second of a product of 8192 x 8192 matrices (a CPU: much smaller ones)."""
    side = 8192 if ON_GPU else 64
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    times = per_call([lambda: torch.mm(a, b, out=product)])
    return samples([2 * side**3 / t for t in times])
