"""A trial: a plan of norm_silu_conv beside the library's, compared and timed; in a process of its
own, as a kernel that was never tried can hang or die.

The op as a block calls it: its first convolution has no bias, which the second norm adds. But it
stands alone: a kernel is not given the moments that the one in front of it could have summed up,
and sums up none for the one behind. A GPU's calls run from a CUDA graph, as the fast engine runs
them, on inputs that together overflow the second-level cache, each with an output of its own.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from math import ceil
from multiprocessing import get_context
from multiprocessing.connection import Connection
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastgan_kernels.norm_silu_conv.launch import norm_silu_conv_backward, norm_silu_conv_forward
from fastgan_kernels.norm_silu_conv.plans import LIBRARY, SHORT, Direction, Key, Plan, Shape
from fastgan_kernels.norm_silu_conv.sums import Affine

DTYPES = {name: dtype for dtype, name in SHORT.items()}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROUNDS, UNCOUNTED_ROUNDS = (20, 5) if DEVICE == "cuda" else (1, 0)
ROUND_SECONDS = 2e-3
END_SECONDS = 30.0  # for a process that was killed
GAIN = 0.5**0.5  # of a residual block's sum
EPS = 1e-5
# What may lie between a result and the library's, in units of the dtype's eps of a size: up to four
# roundings of eps / 2, forward three of the library's (convolution, bias, join) and one of the
# kernel's, backward two of each (ds or dz, and dx). Roundings of what is summed over 9 C products
# or over pixels, and tanh.approx's 2^-11, average out to less than one more. That is 2.5 at most.
# As root mean squares a rounding is 0.29 and four are 0.6; up to twice that where dx is a small
# difference.
TOLERANCES: tuple[tuple[str, Callable[[Tensor], Tensor], float], ...] = (
    ("largest value", lambda v: v.abs().max(), 3.0),
    ("root mean square", lambda v: v.square().mean().sqrt(), 2.0),
)


class Failed(Exception):
    """Why a call has no result, in one line."""


class Hung(Failed):
    """No result in the time allowed."""


class Child:
    """Calls `function` (top-level in its module) in a spawned process, which may hang or die.

    The process ends with the first call that fails, by whatever cause, as what a broken kernel
    leaves behind is not to be trusted; the next call starts another.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self._process: Any = None

    def __call__(self, *arguments: Any, timeout: float) -> Any:
        """function(*arguments). Failed if it raises or dies, Hung after `timeout` seconds."""
        if self._process is None:
            context = get_context("spawn")
            self._connection, theirs = context.Pipe()
            self._process = context.Process(target=_serve, args=(theirs, self.function))
            self._process.start()
            theirs.close()
        try:
            self._connection.send(arguments)
            if not self._connection.poll(timeout):
                raise Hung(f"hung: no answer in {timeout:g} s")
            value, why = self._connection.recv()
            if why:
                raise Failed(why)
        except (EOFError, OSError):
            self._process.join(END_SECONDS)
            why = f"crashed: exit status {self._process.exitcode}"
            self.close()
            raise Failed(why) from None
        except BaseException:
            self.close()
            raise
        return value

    def close(self) -> None:
        """Ends the process; one that a GPU does not let go of is left to itself."""
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join(END_SECONDS)
            self._process = None


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    """The child: answers calls until one fails."""
    why = ""
    while not why:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        value = None
        try:
            value = function(*arguments)
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            # Triton quotes the kernel in between.
            shown = f"{lines[0]} ... {lines[-1]}" if lines[0].endswith(":") else lines[0]
            why = f"{type(error).__name__}: {shown}"
        connection.send((value, why))


@dataclass(frozen=True)
class Case:
    """One direction of a block's convolution with the norm in front.

    embedding: what the norm takes of it, by name: nothing in front of a block's first convolution;
    the second one adds the residual and has the gain. dtype: bf16, fp16 or fp32.
    """

    shape: Shape
    dtype: str
    direction: Direction
    batch: int
    embedding: str

    @property
    def key(self) -> Key:
        return self.shape, self.dtype, self.direction

    def __str__(self) -> str:
        s = self.shape
        return f"{s.cin} to {s.cout} {s.height}x{s.width} {self.dtype} {self.direction}"


class Timing(NamedTuple):
    """Medians of ROUNDS rounds, in microseconds a call, and those of the library in between."""

    us: float
    library_us: float


def trial(case: Case, plan: Plan) -> Timing:
    """ValueError where the plan's results are not the library's; whatever its kernel raises.

    Results are compared before the timing, with memory that no kernel wrote read as NaN, and again
    after it, so that a race has had its chance.
    """
    torch.backends.cudnn.benchmark = True
    with torch.cuda.stream(_stream()) if DEVICE == "cuda" else nullcontext():
        calls, library, expected = _library(case)
        with _poisoned():
            compare(calls[0](plan), expected, case.dtype)
        rotation = Rotation([partial(call, plan) for call in calls])
        timing = Timing(*medians([rotation, library]))
        compare(rotation.outputs[-1], expected, case.dtype)
    return timing


@lru_cache(maxsize=1)
def _library(case: Case) -> tuple[list[Callable], "Rotation", dict[str, Tensor]]:
    """A case's calls, on copies of its images; what the library takes for them, and gives."""
    s, n, dtype = case.shape, case.batch, DTYPES[case.dtype]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        value = (torch.randn(size, generator=generator, device=DEVICE) * std).to(dtype)
        return value.to(memory_format=torch.channels_last) if len(size) == 4 else value

    x = normal(n, s.cin, s.height, s.width, std=2) + 0.5
    weight = normal(s.cout, s.cin, s.kernel, s.kernel, std=(s.kernel**2 * s.cin) ** -0.5)
    dy, bias, residual, gain = normal(n, s.cout, s.height, s.width), None, None, 1.0
    if case.embedding:
        bias, residual, gain = normal(s.cout), torch.randn_like(dy), GAIN
    affine = (normal(s.cin, std=0.3, dtype=torch.float32) + centre for centre in (1, 0))
    rows = {name: normal(n, s.cin, std=0.5) for name in case.embedding.split()}
    after, groups = Affine(*affine, **rows), min(32, s.cin // 4)
    given = (groups, weight, bias, EPS, after)
    _, statistics, _ = norm_silu_conv_forward(x, *given, residual, gain)
    wanted = frozenset({"x", "affine", *rows})

    def call(x: Tensor, dy: Tensor, residual: Tensor | None, plan: Plan) -> dict[str, Tensor]:
        if case.direction == "forward":
            return {"y": norm_silu_conv_forward(x, *given, residual, gain, plan)[0]}
        saved = (x, statistics, groups, weight, after, gain, wanted, plan)
        found = norm_silu_conv_backward(dy, *saved)
        return {name: getattr(found, name) for name in sorted(wanted)}

    calls: list[Callable] = []
    for _ in range(_copies(x.nbytes + dy.nbytes * (1 if residual is None else 2))):
        images = (x.clone(), dy.clone(), None if residual is None else residual.clone())
        calls.append(partial(call, *images))
    rotation = Rotation([partial(each, LIBRARY) for each in calls])
    return calls, rotation, calls[0](LIBRARY)


def _copies(bytes_per_call: int) -> int:
    """Calls of a rotation: a call finds nothing of its previous turn in the cache."""
    if DEVICE == "cpu":
        return 1
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    return min(64, max(2, ceil(4 * l2_bytes / bytes_per_call)))


def compare(found: dict[str, Tensor], expected: dict[str, Tensor], dtype: str) -> None:
    """ValueError for the first result that is not what is expected by one of TOLERANCES."""
    eps = torch.finfo(DTYPES[dtype]).eps
    for name, right in expected.items():
        error = found[name].float() - right.float()
        for size, of, allowed in TOLERANCES:
            off = float(of(error) / of(right.float()))
            if not off <= allowed * eps:  # as NaN is not
                raise ValueError(
                    f"{name} is off by {off:.2g} of its {size}, more than {allowed * eps:.2g}"
                )


@contextmanager
def _poisoned() -> Iterator[None]:
    """Inside, new memory reads as NaN, and not as the library's results that lay there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@lru_cache
def _stream() -> Any:
    """Of the graphs; backward runs where forward did."""
    return torch.cuda.Stream()


class Rotation:
    """Calls, one after the other; a GPU's as one graph."""

    def __init__(self, calls: Sequence[Callable[[], Any]]) -> None:
        self.calls = calls
        # Compiles, and lets cuDNN choose. Outputs stay, so that each has memory of its own.
        self.outputs = [call() for call in calls]
        self.graph: Any = None
        if DEVICE == "cuda":
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
    """Microseconds a call of each; they take turns of ROUND_SECONDS, so that a clock that drifts
    slows all of them down."""
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
