"""Seconds per call, seconds per iteration and kernel launches of what runs on this device."""

import time
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from math import ceil
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
ROUNDS = 20 if ON_GPU else 2
ROUND_SECONDS = 2e-3
Call = Callable[[], object]


def seconds() -> float:
    """The time at which all work given to the device so far is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


def copies(bytes_per_call: int) -> int:
    """How many inputs to rotate so that a call finds nothing of its previous turn in the cache:
    together they are four times the L2."""
    if not ON_GPU:
        return 1
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(2, ceil(4 * l2_bytes / bytes_per_call)))


def per_call(calls: Sequence[Call]) -> list[float]:
    """Seconds per call in ROUNDS rounds, each of at least ROUND_SECONDS, after warm-up.

    A GPU replays all calls, one after the other, as one CUDA graph: Python's share is not in it.
    """
    if not ON_GPU:
        return [_elapsed(calls[i % len(calls)]) for i in range(ROUNDS)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Libraries choose their algorithms here, which they may not while a graph is captured.
        for _ in range(2):
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            # Outputs that live side by side are written to memory, not to the cache.
            outputs = [call() for call in calls]
        taken = min(_elapsed(graph.replay) for _ in range(4))
        replays = max(1, ceil(ROUND_SECONDS / taken))
        rounds = [timed([graph.replay] * replays) for _ in range(ROUNDS)]
    del outputs
    return [sum(round_) / replays / len(calls) for round_ in rounds]


def timed(calls: Iterable[Call]) -> list[float]:
    """Seconds of each call while they follow each other as in training, unsynchronised.

    On a GPU by its own clock from the end of one call's work to the end of the next one's.
    """
    if not ON_GPU:
        return [_elapsed(call) for call in calls]
    events = [_event()]
    torch.cuda.synchronize()
    events[0].record()
    for call in calls:
        call()
        events.append(_event())
        events[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def launches(call: Call) -> dict[str, int] | None:
    """What one call starts: `launches` from the CPU (a graph counts once) and `kernels` that ran
    on the GPU; None without one."""
    if not ON_GPU:
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        call()
        torch.cuda.synchronize()
    counts = {"launches": 0, "kernels": 0}
    for event in found.key_averages():
        if event.device_type == DeviceType.CUDA:
            copy = event.key.startswith(("Memcpy", "Memset"))
            annotation = getattr(event, "is_user_annotation", False)
            counts["kernels"] += 0 if copy or annotation else event.count
        elif event.key.startswith(("cudaLaunch", "cuLaunch", "cudaGraphLaunch")):
            counts["launches"] += event.count
    return counts


def _elapsed(call: Call) -> float:
    start = seconds()
    call()
    return seconds() - start


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)
