"""Seconds per call on this machine, and the rates of its chip that bound them.

A GPU runs calls from a CUDA graph (the way the fast engine runs them; Python's share of a call is
not measured), one after the other on inputs that together overflow its L2 cache, and every call has
its own output. All work is on one stream, because backward runs where forward ran.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import ceil
from statistics import median
from typing import Any

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Triton's interpreter gets bfloat16 wrong.
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ROUNDS = 20 if ON_GPU else 1
ROUND_SECONDS = 2e-3
LAUNCHES = ("graph", "stream")


@dataclass(frozen=True)
class Chip:
    """What the floors are computed from: bytes read and written, and multiplications and additions
    of a bfloat16 matrix product, both per second, measured in this process."""

    name: str
    copy_bandwidth: float
    matmul_rate: float
    l2_bytes: int

    def floor(self, parts: Sequence[tuple[float, float]]) -> float:
        """Seconds that (bytes, FLOP) of kernels which run one after the other take at least."""
        return sum(max(b / self.copy_bandwidth, f / self.matmul_rate) for b, f in parts)


def seconds() -> float:
    """The time at which all work given to the device so far is done."""
    if ON_GPU:
        torch.cuda.synchronize()
    return time.perf_counter()


@cache
def _stream() -> Any:
    return torch.cuda.Stream()


@contextmanager
def one_stream() -> Iterator[None]:
    """Inside, all work of a GPU is on the stream that graphs are captured on."""
    if not ON_GPU:
        yield
        return
    _stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_stream()):
        yield


def measure_chip() -> Chip:
    """Copies 1 GiB and multiplies 8192 x 8192 matrices (on a CPU much less), medians of 10."""
    count, n = (2**29, 8192) if ON_GPU else (2**16, 64)
    source = torch.randn(count, device=DEVICE).to(DTYPE)
    target = torch.empty_like(source)
    a, b = (torch.randn(n, n, device=DEVICE).to(DTYPE) for _ in range(2))
    product = torch.empty_like(a)
    copy = _median_seconds(lambda: target.copy_(source))
    matmul = _median_seconds(lambda: torch.mm(a, b, out=product))
    l2_bytes = 0
    name = "CPU"
    if ON_GPU:
        properties = torch.cuda.get_device_properties(0)
        l2_bytes, name = properties.L2_cache_size, properties.name
    return Chip(name, 2 * source.nbytes / copy, 2 * n**3 / matmul, l2_bytes)


def _median_seconds(call: Callable[[], object], calls: int = 10, rounds: int = 10) -> float:
    for _ in range(3):
        call()
    taken = []
    for _ in range(rounds):
        start = seconds()
        for _ in range(calls):
            call()
        taken.append((seconds() - start) / calls)
    return median(taken)


class Rotation:
    """Calls each of `calls` in turn; as one graph, whose replay stands for a call of each."""

    def __init__(self, calls: Sequence[Callable[[], object]], launch: str) -> None:
        self.calls, self.turn = calls, 0
        # Outputs stay: with memory of their own they are written to the device, not to the cache.
        self.outputs = [call() for call in calls]
        self.graph = self._captured() if ON_GPU and launch == "graph" else None

    def __call__(self) -> None:
        if self.graph is None:
            self.outputs[self.turn] = self.calls[self.turn]()
        elif self.turn == 0:
            self.graph.replay()
        self.turn = (self.turn + 1) % len(self.calls)

    def _captured(self) -> Any:
        graph = torch.cuda.CUDAGraph()
        self.outputs = []
        with torch.cuda.graph(graph, stream=_stream()):
            self.outputs = [call() for call in self.calls]
        return graph

    def iterations(self) -> int:
        """Calls, in whole turns, that last at least ROUND_SECONDS."""
        if not ON_GPU:
            return len(self.calls)
        taken = 0.0
        for _ in range(3):
            start = seconds()
            for _ in self.calls:
                self()
            taken = seconds() - start
        return len(self.calls) * max(1, ceil(ROUND_SECONDS / taken))


def copies(bytes_per_call: int, l2_bytes: int) -> int:
    """How many inputs to rotate, so that a call finds nothing of its previous turn in the cache."""
    return min(64, max(2, ceil(4 * l2_bytes / bytes_per_call))) if ON_GPU else 1


def kept_and_peak(
    function: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor], dy: Tensor
) -> tuple[int, int] | None:
    """Bytes kept for backward (x counted, y not) and the largest number allocated beyond the inputs
    during forward and backward; None on a CPU, whose allocations PyTorch does not count."""
    if not ON_GPU:
        return None
    wanted = [value for value in inputs.values() if value.requires_grad]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    y = function(inputs)
    kept = torch.cuda.memory_allocated() - before - y.nbytes + inputs["x"].nbytes
    gradients = torch.autograd.grad(y, wanted, dy)
    peak = torch.cuda.max_memory_allocated() - before
    del gradients
    return kept, peak
