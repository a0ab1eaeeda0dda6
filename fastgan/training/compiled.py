"""The plain step as a good engineer would speed it up in an afternoon: the honest opponent.

G and each branch of D (backbone, mixing, heads) go through torch.compile, frozen weights are kept
in the dtype that they compute in. Losses, R1 and the order of things are the plain step's.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import record_function

from fastgan.common.distributed import World, main_first
from fastgan.discriminator.base import Discriminator
from fastgan.models import Precond
from fastgan.models.layers import cast_frozen
from fastgan.models.sampling import few_step
from fastgan.training.gan import StepSettings
from fastgan.training.state import StepResult
from fastgan.training.step import PlainStep
from fastgan.training.updater import averaged_copy

# A branch's in a run: fakes in G's phase and in D's, and reals, which may be laid out otherwise; as
# many to spare.
_VARIANTS = 6


class CompiledStep(PlainStep):
    """A PlainStep whose networks are compiled by the first iterations.

    `mode`: torch.compile's. With several processes the first one compiles before the others do, so
    that they find its graphs, and the choices in them, in the compile cache. R1, one step in
    seventeen, stays eager.
    """

    def __init__(
        self,
        generator: Precond,
        average: Precond,
        discriminator: Discriminator,
        settings: StepSettings,
        world: World,
        *,
        mode: str = "default",
    ) -> None:
        super().__init__(generator, average, discriminator, settings, world)
        self.mode, self._prepared = mode, False

        def generate(z: Tensor, labels: Tensor | None) -> Tensor:
            return few_step(
                generator, z, labels, steps=settings.steps, mid_sigma=settings.mid_sigma
            )

        branches = range(discriminator.branches)
        self._generate_compiled = self._compile(generate)
        # Dynamo counts the graphs of all steps that run the same code together, and fails beyond.
        torch._dynamo.config.recompile_limit += _VARIANTS * discriminator.branches
        self._encoders = [self._compile(partial(discriminator.features, i)) for i in branches]
        self._judges = [self._compile(partial(discriminator.judge, i)) for i in branches]

    def run(self, reals: Tensor, labels: Tensor | None, iteration: int) -> StepResult:
        if not self._prepared:
            self._prepare(reals, labels)
        return super().run(reals, labels, iteration)

    def _prepare(self, reals: Tensor, labels: Tensor | None) -> None:
        """What needs the final weights, before anything is compiled."""
        if self.generator.compute_dtype is not None:
            cast_frozen(self.generator, self.generator.compute_dtype)
        self.discriminator.store_frozen()
        if reals.is_cuda:
            self.discriminator.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._prepared = True
        if self.world.size > 1:
            with main_first():
                if self.world.rank == 0:
                    self._rehearse(reals, labels)

    def _rehearse(self, reals: Tensor, labels: Tensor | None) -> None:
        """An iteration of this process alone on copies, which leaves its graphs in the cache."""
        generator = copy.deepcopy(self.generator)
        alone = World(rank=0, local_rank=self.world.local_rank, size=1, device=reals.device)
        settings = replace(self.settings, batch=len(reals))
        discriminator = copy.deepcopy(self.discriminator)
        networks = (generator, averaged_copy(generator), discriminator)
        CompiledStep(*networks, settings, alone, mode=self.mode).run(reals, labels, 0)

    def _compile(self, function: Callable[..., Any]) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False, mode=self.mode)

    @record_function("step/generate")
    def _generate(self, z: Tensor, labels: Tensor | None) -> Tensor:
        return self._generate_compiled(z, labels)

    def _features(self, index: int, view: Tensor, labels: Tensor | None) -> list[Tensor]:
        return self._encoders[index](view, labels)

    def _logits(self, index: int, features: list[Tensor], labels: Tensor | None) -> Tensor:
        return self._judges[index](features, labels)
