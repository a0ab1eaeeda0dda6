"""An iteration recorded once as a CUDA graph and replayed: Python and launches drop out of a step.

What a recording freezes are the addresses of tensors and every Python number. The function must
therefore read what changes (images, learning rates, EMA's weight) from tensors that stay where they
are, draw from registered generators, and update its state in place.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgan.errors import UserError, origins, out_of_memory
from fastgan.training.state import StepResult

Inputs = tuple[Tensor | None, ...]
Iteration = Callable[..., StepResult]
# Iterations that run as they are before one is recorded: kernels are compiled, algorithms chosen,
# the optimisers' states made.
WARMUP = 3


class Graph(Protocol):
    """Something that records what a function does and can do it again."""

    def record(self, function: Callable[[], StepResult]) -> StepResult:
        """The function's results, whose tensors `replay` fills; nothing is computed yet."""
        ...

    def replay(self) -> None: ...


class CudaGraph:
    """A CUDA graph; graphs that share `pool` must not need each other's results."""

    def __init__(self, generators: Sequence[torch.Generator], pool: Any) -> None:
        self._graph, self._pool = torch.cuda.CUDAGraph(), pool
        for generator in generators:
            # A replay then draws from the seed that the generator has at that time.
            self._graph.register_generator_state(generator)

    def record(self, function: Callable[[], StepResult]) -> StepResult:
        # Not what other threads do meanwhile: they decode images and write checkpoints.
        with torch.cuda.graph(
            self._graph,
            pool=self._pool,
            stream=_own_stream(),
            capture_error_mode="thread_local",
        ):
            return function()

    def replay(self) -> None:
        self._graph.replay()


class Replayed:
    """`iteration` run as it is WARMUP times, then recorded by `make_graph` and replayed.

    The results' tensors are the same ones every time: read them before the next call. UserError
    where it cannot be recorded.
    """

    def __init__(self, iteration: Iteration, make_graph: Callable[[], Graph]) -> None:
        self._iteration, self._make_graph = iteration, make_graph
        self._runs = 0
        self._graph: Graph | None = None
        self._inputs: Inputs = ()
        self._result: StepResult | None = None

    def __call__(self, *inputs: Tensor | None) -> StepResult:
        if self._runs < WARMUP:
            self._runs += 1
            return _beside(self._iteration, inputs)
        if self._graph is None:
            self._record(inputs)
        assert self._graph is not None and self._result is not None
        for static, given in zip(self._inputs, inputs, strict=True):
            if static is not None and given is not None:
                static.copy_(given)
        self._graph.replay()
        return self._result

    def _record(self, inputs: Inputs) -> None:
        graph = self._make_graph()
        self._inputs = tuple(None if x is None else x.clone() for x in inputs)
        try:
            self._result = graph.record(lambda: self._iteration(*self._inputs))
        except Exception as error:
            if out_of_memory(error):
                raise
            first = origins(error)[-1]
            reason = (str(first).splitlines() or [type(first).__name__])[0]
            raise UserError(
                f"the iteration cannot be recorded ({reason}), engine=fast, "
                "fast.graphs=false runs it without"
            ) from error
        self._graph = graph


def _beside(iteration: Iteration, inputs: Inputs) -> StepResult:
    """On a stream of its own, as recording will be: autograd remembers streams."""
    if not any(x is not None and x.is_cuda for x in inputs):
        return iteration(*inputs)
    current, own = torch.cuda.current_stream(), _own_stream()
    own.wait_stream(current)
    with torch.cuda.stream(own):
        result = iteration(*inputs)
    current.wait_stream(own)
    return result


@cache
def _own_stream() -> torch.cuda.Stream:
    """The same every time: memory freed on a stream is kept for that stream."""
    return torch.cuda.Stream()
