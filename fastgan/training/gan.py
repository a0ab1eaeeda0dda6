"""What surrounds an iteration of the GAN fine-tune: its settings, networks, optimisers, noise."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from fastgan.common.distributed import World
from fastgan.common.noise import normal, reseed
from fastgan.discriminator.base import Discriminator
from fastgan.models import Precond
from fastgan.training import losses
from fastgan.training.state import StepResult, TrainingStep, trainable
from fastgan.training.updater import Adam, NonFinite, Updater, ema_beta, linear_decay


@dataclass(frozen=True)
class StepSettings:
    """What the method leaves to choose; the names are the configuration's."""

    seed: int
    batch: int
    """Images per iteration over all processes and accumulation rounds."""
    batch_gpu: int
    """Images per forward pass: the batch over which the heads' BatchNorm computes statistics."""
    total_images: int
    lr_g: float
    lr_d: float
    decay_from: float | None = None
    loss: losses.Kind = "nonsaturating"
    reduction: Literal["mean", "published"] = "mean"
    r1_gamma: float = 1e-4
    r1_interval: int = 16
    published_batch_gpu: int = 64
    """The local batch at which `r1_gamma` was published, the divisor of the mean reduction."""
    ema_half_life: float = 500_000
    ema_ramp: float | None = 0.05
    share_fakes: bool = False
    nonfinite: NonFinite = "skip"
    steps: int = 1
    mid_sigma: float | None = None
    adam: Adam = "torch"
    scale_losses: bool = False
    """Whether a part computes in float16, in which small gradients vanish."""

    @property
    def r1_weight(self) -> float:
        """gamma / 2 of the equivalent objective, times the interval that lazy R1 makes up for."""
        gamma = self.r1_gamma
        if self.reduction == "mean":
            # The published loss sums over the local batch while R1 is a mean over it: dividing
            # both by that batch leaves the same objective, whatever the batch is here.
            gamma /= self.published_batch_gpu
        return gamma / 2 * self.r1_interval


class GanTraining(TrainingStep):
    """Holds what the iterations update, and what depends on an iteration's number alone."""

    discriminator: Discriminator
    update_d: Updater

    def __init__(
        self,
        generator: Precond,
        average: Precond,
        discriminator: Discriminator,
        settings: StepSettings,
        world: World,
    ) -> None:
        s = settings
        assert s.batch % world.size == 0 and s.batch // world.size % s.batch_gpu == 0
        self.generator, self.average, self.discriminator = generator, average, discriminator
        self.settings, self.world = settings, world
        adam = partial(
            Updater,
            world=world,
            nonfinite=s.nonfinite,
            adam=s.adam,
            scale_losses=s.scale_losses,
            lr_factor=linear_decay(s.total_images, s.decay_from),
        )
        # Lazy R1 takes one D step in interval + 1 more: Adam is slowed down to match (StyleGAN2).
        lazy = s.r1_interval / (s.r1_interval + 1) if s.r1_interval else 1.0
        self.update_g = adam(trainable(generator), lr=s.lr_g, betas=(0.0, 0.99))
        self.update_d = adam(
            trainable(discriminator.heads), lr=s.lr_d * lazy, betas=(0.0, 0.99**lazy)
        )
        parameter = self.update_g.parameters[0]
        self._ema_beta = parameter.new_zeros(())
        keys = [(kind, of) for kind in ("z", "augment") for of in ("G", "D")]
        self._streams = {key: torch.Generator(parameter.device) for key in keys}

    def run(self, reals: Tensor, labels: Tensor | None, iteration: int) -> StepResult:
        self._set(iteration)
        return self._iterate(reals, labels, r1=self._has_r1(iteration))

    def _iterate(self, reals: Tensor, labels: Tensor | None, *, r1: bool) -> StepResult:
        """The iteration that was `_set`: the same operations every time, with or without R1."""
        raise NotImplementedError

    def _set(self, iteration: int) -> None:
        """Puts all that depends on the iteration's number where `_iterate` reads it."""
        s, nimg = self.settings, iteration * self.settings.batch
        for (kind, of), stream in self._streams.items():
            own = (self.world.rank,) if kind == "augment" else ()
            reseed(stream, s.seed, kind, of, iteration, *own)
        self.update_g.follow(nimg)
        self.update_d.follow(nimg)
        self._ema_beta.fill_(ema_beta(s.batch, nimg, half_life=s.ema_half_life, ramp=s.ema_ramp))

    def _has_r1(self, iteration: int) -> bool:
        interval = self.settings.r1_interval
        return bool(interval) and iteration % interval == 0 and iteration > 0

    def _latents(self, like: Tensor, of: str) -> Tensor:
        """z of one step, G's or D's: this process's slice of what all of them draw alike."""
        shape = (self.settings.batch, *like.shape[1:])
        z = normal(self._streams["z", of], *shape, dtype=like.dtype)
        return z.chunk(self.world.size)[self.world.rank]

    def _reduce(self, loss: Tensor) -> Tensor:
        """Losses [n] of one accumulation round as a share of the objective of this process."""
        if self.settings.reduction == "published":
            return loss.sum()
        return loss.sum() / (self.settings.batch // self.world.size)
