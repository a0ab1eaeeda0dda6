"""The compiled step on this project's kernels, replayed as CUDA graphs.

Frozen blocks are operations that keep no convolution input for backward; frozen backbones have
their BatchNorm folded into the convolutions; an iteration, with or without R1, is one graph.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgan.common.distributed import World
from fastgan.common.errors import UserError, origins, out_of_memory
from fastgan.discriminator.base import Discriminator
from fastgan.models import Precond
from fastgan.training.compiled import CompiledStep
from fastgan.training.gan import StepSettings
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


class FastStep(CompiledStep):
    """A CompiledStep whose iterations are recorded and replayed where there is a GPU.

    `graphs`: whether they are. `fold`: whether the backbones' BatchNorm is folded.
    """

    settling = WARMUP + 1

    def __init__(
        self,
        generator: Precond,
        average: Precond,
        discriminator: Discriminator,
        settings: StepSettings,
        world: World,
        *,
        mode: str = "default",
        graphs: bool = True,
        fold: bool = True,
    ) -> None:
        super().__init__(generator, average, discriminator, settings, world, mode=mode)
        if fold:
            discriminator.fold()
        self._pool = torch.cuda.graph_pool_handle() if world.device.type == "cuda" else None
        self._graphs = graphs and self._can_record()
        self._forget()

    def run(self, reals: Tensor, labels: Tensor | None, iteration: int) -> StepResult:
        if not self._graphs:
            return super().run(reals, labels, iteration)
        if not self._prepared:
            self._prepare(reals, labels)
        self._set(iteration)
        return self._replayed[self._has_r1(iteration)](reals, labels)

    def load_state(self, state: dict[str, Tensor]) -> None:
        super().load_state(state)
        # The optimisers' tensors are others now.
        self._forget()

    def _forget(self) -> None:
        self._replayed = {
            r1: Replayed(partial(self._iterate, r1=r1), self._make_graph) for r1 in (False, True)
        }

    def _can_record(self) -> bool:
        return self._pool is not None

    def _make_graph(self) -> Graph:
        assert self._pool is not None
        return CudaGraph(list(self._streams.values()), self._pool)
