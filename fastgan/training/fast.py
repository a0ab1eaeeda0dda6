"""The compiled step on this project's kernels, replayed as CUDA graphs.

Frozen blocks are operations that keep no convolution input for backward; frozen backbones have
their BatchNorm folded into the convolutions; an iteration, with or without R1, is one graph.
"""

from functools import partial

import torch
from torch import Tensor

from fastgan.discriminator.base import Discriminator
from fastgan.distributed import World
from fastgan.models import Precond
from fastgan.training.compiled import CompiledStep
from fastgan.training.replay import WARMUP, CudaGraph, Graph, Replayed
from fastgan.training.state import StepResult
from fastgan.training.step import StepSettings


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
