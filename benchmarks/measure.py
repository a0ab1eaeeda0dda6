"""Seconds per call on this machine, the rates of its chip that bound them, and what a file of
results says about both.

A GPU runs calls from a CUDA graph (the way the fast engine runs them; Python's share of a call is
not measured), one after the other on inputs that together overflow its L2 cache, and every call has
its own output. All work is on one stream, because backward runs where forward ran.
"""

import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from math import ceil
from statistics import median
from typing import Any

import torch

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
            "triton": package_version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if ON_GPU else None,
        },
    }


def package_version(name: str) -> str | None:
    """Of an installed distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


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


@contextmanager
def one_stream() -> Iterator[None]:
    """Inside, all work of a GPU is on the stream that graphs are captured on."""
    if not ON_GPU:
        yield
        return
    _stream().wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(_stream()):
        yield


class Rotation:
    """Calls each of `calls` in turn; on a GPU as one graph, whose replay is a call of each."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self.calls, self.turn = calls, 0
        # Outputs stay: with memory of their own they are written to the device, not to the cache.
        # Libraries choose their algorithms here, which they may not while a graph is captured.
        self.outputs = [call() for call in calls]
        self.graph: Any = None
        if ON_GPU:
            torch.cuda.synchronize()
            self.graph, self.outputs = torch.cuda.CUDAGraph(), []
            with torch.cuda.graph(self.graph, stream=_stream()):
                self.outputs = [call() for call in calls]

    def __call__(self) -> None:
        if self.graph is None:
            self.outputs[self.turn] = self.calls[self.turn]()
        elif self.turn == 0:
            self.graph.replay()
        self.turn = (self.turn + 1) % len(self.calls)

    def run(self, count: int) -> float:
        """Seconds of so many calls."""
        start = seconds()
        for _ in range(count):
            self()
        return seconds() - start

    def iterations(self) -> int:
        """Calls, in whole turns, that last at least ROUND_SECONDS."""
        n = len(self.calls)
        taken = min(self.run(n) for _ in range(4)) if ON_GPU else ROUND_SECONDS
        return n * max(1, ceil(ROUND_SECONDS / taken))


def per_call(calls: Sequence[Call]) -> list[float]:
    """Seconds per call in ROUNDS rounds, each of at least ROUND_SECONDS, after warm-up."""
    with one_stream():
        rotation = Rotation(calls)
        count = rotation.iterations()
        return [rotation.run(count) / count for _ in range(ROUNDS)]


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
    marks: list[Any] = []
    for call in (None, *calls):
        if call is not None:
            call()
        marks.append(torch.cuda.Event(enable_timing=True) if ON_GPU else time.perf_counter())
        if ON_GPU:
            marks[-1].record()
    if not ON_GPU:
        return [end - start for start, end in pairwise(marks)]
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(marks)]


def kept_bytes(forward: Callable[[], torch.Tensor], besides: int = 0) -> int | None:
    """Allocated by a forward pass and still there for backward, its result not counted, `besides`
    what was there before; None on a CPU, whose allocations PyTorch does not count."""
    before = torch.cuda.memory_allocated() if ON_GPU else 0
    y = forward()
    return torch.cuda.memory_allocated() - before - y.nbytes + besides if ON_GPU else None


@dataclass(frozen=True)
class Chip:
    """What floors are computed from: bytes read and written, and multiplications and additions of
    a bfloat16 matrix product, both per second, measured in this process."""

    copy_bandwidth: float
    matmul_rate: float

    def floor(self, parts: Sequence[tuple[float, float]]) -> float:
        """Seconds that (bytes, FLOP) of kernels which run one after the other take at least."""
        return sum(max(b / self.copy_bandwidth, f / self.matmul_rate) for b, f in parts)


def measure_chip() -> Chip:
    """Medians, of copies of 1 GiB and products of 8192 x 8192 matrices (on a CPU much less)."""
    return Chip(copy_bandwidth()["median"], product_rate()["median"])


def copy_bandwidth() -> Content:
    """Samples: bytes read plus bytes written per second."""
    source = torch.randn(2**29 if ON_GPU else 2**16, device=DEVICE).to(DTYPE)
    target = torch.empty_like(source)
    return samples([2 * source.nbytes / t for t in per_call([lambda: target.copy_(source)])])


def product_rate(dtype: torch.dtype = DTYPE) -> Content:
    """Samples: FLOP per second of a square matrix product of random numbers."""
    n = 8192 if ON_GPU else 64
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return samples([2 * n**3 / t for t in per_call([lambda: torch.mm(a, b, out=product)])])
