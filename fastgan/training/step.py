"""One iteration of the GAN fine-tune in plain PyTorch: G step, D step, and every 16th time R1.

With shared fakes D's step comes first, so that G is judged by the updated D either way.

This is the specification of the method: every faster engine is compared with it. All randomness
comes from (seed, purpose, iteration), so that an iteration is a function of the states before it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from fastgan_kernels.dispatch import twice_differentiable
from fastgan_kernels.frozen_conv import FrozenConvolutions
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastgan.common.distributed import World
from fastgan.common.noise import normal, reseed
from fastgan.discriminator.base import Discriminator
from fastgan.models import Precond
from fastgan.models.sampling import few_step
from fastgan.training import losses
from fastgan.training.state import (
    StepResult,
    checksum,
    load_trainable,
    part_of,
    prefixed,
    rounds,
    take,
    trainable,
)
from fastgan.training.updater import Adam, NonFinite, Updater, ema_beta, linear_decay, update_ema

# What each feature network of D shows its heads of some images.
Features = list[list[Tensor]]
# Fakes and their features with the graph that leads down to G.
Graphed = tuple[Tensor, Features]


@dataclass(frozen=True)
class Shown:
    """The images, reals or fakes, of an accumulation round; D's features where they are known."""

    images: Tensor
    features: Features | None = None


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


class PlainStep:
    """Holds the networks and optimisers that one iteration updates, and runs it.

    `settling`: how many iterations of a kind (with or without R1) prepare something for the next.
    """

    settling = 1

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
        self._beta = parameter.new_zeros(())
        self._streams = {
            (kind, purpose): torch.Generator(parameter.device)
            for kind in ("z", "augment")
            for purpose in ("G", "D")
        }

    def run(self, reals: Tensor, labels: Tensor | None, iteration: int) -> StepResult:
        """One iteration on this process's real images [local, C, H, W] in [-1, 1].

        `labels` are one-hot [local, label_dim] or None; fakes get the labels of the reals beside
        them. `iteration` counts from 0 and decides noise, augmentation, R1 and EMA.
        """
        self._set(iteration)
        return self._iterate(reals, labels, r1=self._has_r1(iteration))

    def _set(self, iteration: int) -> None:
        """Puts everything that depends on the iteration's number where `_iterate` reads it."""
        s = self.settings
        nimg = iteration * s.batch
        for (kind, purpose), generator in self._streams.items():
            own = (self.world.rank,) if kind == "augment" else ()
            reseed(generator, s.seed, kind, purpose, iteration, *own)
        self.update_g.follow(nimg)
        self.update_d.follow(nimg)
        self._beta.fill_(ema_beta(s.batch, nimg, half_life=s.ema_half_life, ramp=s.ema_ramp))

    def _has_r1(self, iteration: int) -> bool:
        interval = self.settings.r1_interval
        return bool(interval) and iteration % interval == 0 and iteration > 0

    def _iterate(self, reals: Tensor, labels: Tensor | None, *, r1: bool) -> StepResult:
        """The iteration that was `_set`: the same operations every time, with or without R1."""
        z = self._latents(reals, "G")
        if self.settings.share_fakes:
            # D first, on the fakes by which it then judges G.
            shared = self._shared(z, labels)
            fakes = [self._for_d(*shared)] if shared else self._generate_without_graph(z, labels)
            result = self._discriminator_step(reals, fakes, labels)
            result |= self._generator_step(z, labels, shared)
        else:
            # As published: G first, then D on fresh fakes of the generator just updated.
            result = self._generator_step(z, labels)
            fakes = self._generate_without_graph(self._latents(reals, "D"), labels)
            result |= self._discriminator_step(reals, fakes, labels)
        if r1:
            result |= self._r1_step(reals, labels)
        update_ema(self.average, self.generator, self._beta)
        return result

    def state(self) -> dict[str, Tensor]:
        """All that changes in training, except the average: for checkpoints."""
        return {
            **prefixed("generator", {n: p.detach() for n, p in trainable(self.generator).items()}),
            **prefixed("discriminator", self.discriminator.save_state()),
            **prefixed("optimizer_g", self.update_g.state()),
            **prefixed("optimizer_d", self.update_d.state()),
        }

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores `state`; UserError where it belongs to other networks."""
        load_trainable(self.generator, part_of(state, "generator"), "generator")
        self.discriminator.load_save_state(part_of(state, "discriminator"))
        self.update_g.load_state(part_of(state, "optimizer_g"))
        self.update_d.load_state(part_of(state, "optimizer_d"))

    def blamed(self) -> dict[str, list[str]]:
        """The parameters whose gradients were not finite when an update was last left out."""
        return {"generator": self.update_g.blamed(), "discriminator": self.update_d.blamed()}

    def checksum(self) -> Tensor:
        """float64, of all that trains: the same bits in all processes."""
        return checksum(trainable(self.generator), trainable(self.discriminator.heads))

    def _generator_step(
        self, z: Tensor, labels: Tensor | None, shared: Graphed | None = None
    ) -> StepResult:
        """-log D(G z) through D, whose parameters stand still."""
        loss = self._accumulate_generator(z, labels, shared)
        return StepResult({"Loss/G": loss}, {"G": self.update_g(loss)})

    def _discriminator_step(
        self, reals: Tensor, fakes: list[Shown], labels: Tensor | None
    ) -> StepResult:
        scalars = self._accumulate_discriminator(reals, fakes, labels)
        if len(reals) > 1:
            images = torch.cat([fake.images for fake in fakes])
            scalars["Loss/diversity"] = losses.diversity(images, reals)
        return StepResult(scalars, {"D": self.update_d(scalars["Loss/D"])})

    def _r1_step(self, reals: Tensor, labels: Tensor | None) -> StepResult:
        """Lazy R1: a step of its own with D's optimiser, on the same reals without augmentation."""
        penalty = self._accumulate_r1(reals, labels)
        return StepResult({"Loss/R1": penalty}, {"R1": self.update_d(penalty)})

    def _shared(self, z: Tensor, labels: Tensor | None) -> Graphed | None:
        """Fakes for both steps, computed once; None where there are several rounds.

        Accumulation is there to hold no more than one round's graph: G's step computes the same
        fakes again then.
        """
        return self._show(z, labels) if len(z) == self.settings.batch_gpu else None

    def _show(self, z: Tensor, labels: Tensor | None) -> Graphed:
        images = self._generate(z, labels)
        return images, self._encode(images, labels, "G")

    def _for_d(self, images: Tensor, features: Features) -> Shown:
        """Without the graph; and without the features where D's step augments anew."""
        if self.discriminator.augment:
            return Shown(images.detach())
        return Shown(images.detach(), [[x.detach() for x in maps] for maps in features])

    def _accumulate_generator(
        self, z: Tensor, labels: Tensor | None, shared: Graphed | None
    ) -> Tensor:
        total = z.new_zeros(())
        for part in rounds(len(z), self.settings.batch_gpu):
            of_part = take(labels, part)
            _, features = shared or self._show(z[part], of_part)
            loss = losses.generator_loss(self._judge(features, of_part), self.settings.loss)
            _backward(self._reduce(loss), self.update_g)
            total += loss.detach().sum()
        return total / len(z)

    def _accumulate_discriminator(
        self, reals: Tensor, fakes: list[Shown], labels: Tensor | None
    ) -> dict[str, Tensor]:
        """Leaves D's gradients; returns its loss and the mean signs of its logits."""
        totals = reals.new_zeros(3)
        for part, fake in zip(rounds(len(reals), self.settings.batch_gpu), fakes, strict=True):
            # Two passes: the heads' BatchNorm must not mix the statistics of fakes and reals.
            real, of_part = Shown(reals[part]), take(labels, part)
            loss_fake, sign_fake = self._pass(losses.fake_loss, fake, of_part)
            loss_real, sign_real = self._pass(losses.real_loss, real, of_part)
            totals += torch.stack([loss_fake + loss_real, sign_real, sign_fake]) * len(real.images)
        means = (totals / len(reals)).unbind()
        return dict(zip(("Loss/D", "Loss/sign_real", "Loss/sign_fake"), means, strict=True))

    def _pass(
        self,
        loss_of: Callable[..., Tensor],
        shown: Shown,
        labels: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Adds D's gradients from one kind of images; returns the mean loss and sign of logits.

        Backward follows at once: one pass at a time is held, and the next one moves the heads'
        power iterations.
        """
        features = shown.features
        if features is None:
            # Nothing in front of the heads trains here.
            with torch.no_grad():
                features = self._encode(shown.images, labels, "D")
        logits = self._judge(features, labels)
        loss = loss_of(logits, self.settings.loss)
        _backward(self._reduce(loss), self.update_d)
        return loss.detach().mean(), losses.mean_sign(logits)

    def _accumulate_r1(self, reals: Tensor, labels: Tensor | None) -> Tensor:
        total = reals.new_zeros(())
        for part in rounds(len(reals), self.settings.batch_gpu):
            images = reals[part].detach().requires_grad_()
            with twice_differentiable(), FrozenConvolutions(), sdpa_kernel(SDPBackend.MATH):
                logits = self.discriminator(images, take(labels, part), None)
                penalty = losses.r1_penalty(logits, images)
            # A mean over the batch in both reductions, as published.
            weighted = self.settings.r1_weight * penalty
            _backward(weighted.sum() / len(reals), self.update_d)
            total += weighted.detach().sum()
        return total / len(reals)

    def _generate(self, z: Tensor, labels: Tensor | None) -> Tensor:
        return few_step(
            self.generator, z, labels, steps=self.settings.steps, mid_sigma=self.settings.mid_sigma
        )

    @torch.no_grad()
    def _generate_without_graph(self, z: Tensor, labels: Tensor | None) -> list[Shown]:
        return [
            Shown(self._generate(z[part], take(labels, part)))
            for part in rounds(len(z), self.settings.batch_gpu)
        ]

    def _encode(self, images: Tensor, labels: Tensor | None, purpose: str) -> Features:
        """D's frozen features of the images, augmented for the step of `purpose`, G or D."""
        views = self.discriminator.views(images, self._streams["augment", purpose])
        return [self._features(i, view, labels) for i, view in enumerate(views)]

    def _judge(self, features: Features, labels: Tensor | None) -> list[Tensor]:
        return [self._logits(i, maps, labels) for i, maps in enumerate(features)]

    def _features(self, index: int, view: Tensor, labels: Tensor | None) -> list[Tensor]:
        return self.discriminator.features(index, view, labels)

    def _logits(self, index: int, features: list[Tensor], labels: Tensor | None) -> Tensor:
        return self.discriminator.judge(index, features, labels)

    def _reduce(self, loss: Tensor) -> Tensor:
        """One accumulation round's share of the objective of this process."""
        if self.settings.reduction == "published":
            return loss.sum()
        return loss.sum() / (self.settings.batch // self.world.size)

    def _latents(self, like: Tensor, purpose: str) -> Tensor:
        """This process's slice of the whole batch's noise."""
        shape = (self.settings.batch, *like.shape[1:])
        z = normal(self._streams["z", purpose], *shape, dtype=like.dtype)
        return z.chunk(self.world.size)[self.world.rank]


def _backward(loss: Tensor, update: Updater) -> None:
    # inputs= stops at these parameters: nothing is computed for the other network, nor, in R1,
    # down to the image.
    update.scaled(loss).backward(inputs=update.parameters)
