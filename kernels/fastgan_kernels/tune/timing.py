"""Microseconds a call, for `python -m fastgan_kernels.tune`.

A GPU's calls run from a CUDA graph, as the fast engine runs them (Python's share of a call is not
measured), on inputs that together overflow the second-level cache, each with an output of its own.
What is compared takes turns, so that a clock that drifts slows all of it down.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from math import ceil
from statistics import median
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS = 20 if DEVICE == "cuda" else 1
UNCOUNTED_ROUNDS = 5 if DEVICE == "cuda" else 0
ROUND_SECONDS = 2e-3


class Rotation:
    """Calls, one after the other; a GPU's as one graph."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls = calls
        # Compiles, and lets cuDNN choose. Outputs stay, so that each has memory of its own.
        self.outputs = [call() for call in calls]
        self.graph: Any = None
        if DEVICE == "cuda":
            self.outputs = []
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=_stream()):
                self.outputs = [call() for call in calls]

    def seconds(self, turns: int) -> float:
        """What `turns` times all calls take."""
        if self.graph is None:
            start = time.perf_counter()
            for _ in range(turns):
                self.outputs = [call() for call in self.calls]
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(turns):
            self.graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def medians(rotations: Sequence[Rotation]) -> list[float]:
    """Microseconds a call of each, which take turns of ROUND_SECONDS or more."""
    for each in rotations:
        each.seconds(1)  # a graph's first replay brings it to the GPU
    turns = [max(1, ceil(ROUND_SECONDS / each.seconds(1))) for each in rotations]
    rounds = [
        [each.seconds(count) / count for each, count in zip(rotations, turns, strict=True)]
        for _ in range(UNCOUNTED_ROUNDS + ROUNDS)
    ]
    columns = zip(*rounds[UNCOUNTED_ROUNDS:], strict=True)
    return [
        1e6 * median(taken) / len(each.calls)
        for taken, each in zip(columns, rotations, strict=True)
    ]


def copies(bytes_per_call: int) -> int:
    """Calls of a rotation: a call finds nothing of its previous turn in the cache."""
    if DEVICE == "cpu":
        return 1
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(2, ceil(4 * l2_bytes / bytes_per_call)))


@cache
def _stream() -> Any:
    return torch.cuda.Stream()


@contextmanager
def one_stream() -> Iterator[None]:
    """Inside, all work of a GPU is on the stream of the graphs: backward runs where forward did."""
    if DEVICE == "cpu":
        yield
        return
    with torch.cuda.stream(_stream()):
        yield
