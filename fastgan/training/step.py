"""One iteration of the GAN fine-tune (D2O; Zheng & Yang 2025), from top to bottom.

    G     softplus(-D(G(z)))                      G(z) = one evaluation of the UNet at sigma 80
    D     softplus(D(G(z))) + softplus(-D(x))     on fresh fakes of the G just updated
    R1    gamma/2 |d D(x) / dx|^2                 every 16th iteration, a step of D's own
    EMA   of what trains in G

D is `_judge`, the trained heads, on `_encode`, its frozen features of the images. A batch goes in
rounds of `batch_gpu` images whose gradients add up; `update_g` and `update_d` average them over the
processes and make one step of Adam. Plain PyTorch: every faster engine is compared with this one.
The compiled step replaces `_generate`, `_features` and `_logits`; the fast one records `_iterate`.
"""

import torch
from fastgan_kernels.dispatch import twice_differentiable
from fastgan_kernels.frozen_conv import FrozenConvolutions
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import record_function

from fastgan.models.sampling import few_step
from fastgan.training import losses
from fastgan.training.gan import GanTraining, StepSettings
from fastgan.training.state import StepResult, rounds, standing_still
from fastgan.training.updater import update_ema

__all__ = ["PlainStep", "StepSettings"]

Labels = Tensor | None
# What each feature network shows its heads of some images.
Features = list[list[Tensor]]


class PlainStep(GanTraining):
    """G's step, D's, R1's and the average; fakes get the labels of the reals beside them."""

    def _iterate(self, reals: Tensor, labels: Labels, *, r1: bool) -> StepResult:
        z = self._latents(reals, "G")
        if not self.settings.share_fakes:  # as published
            result = self._train_generator(z, labels)
            result |= self._train_discriminator(reals, self._latents(reals, "D"), labels)
        elif len(z) > self.settings.batch_gpu:  # rounds are there to hold one graph at a time
            result = self._train_discriminator(reals, z, labels)
            result |= self._train_generator(z, labels)
        else:  # D first, on the fakes by which it then judges G
            fakes = self._generate(z, labels)
            features = self._encode(fakes, labels, "G")
            result = self._train_discriminator(reals, z, labels, (fakes, features))
            result |= self._train_generator(z, labels, features)
        if r1:
            result |= self._penalise_gradient(reals, labels)
        update_ema(self.average, self.generator, self._ema_beta)
        return result

    @record_function("step/G")
    def _train_generator(
        self, z: Tensor, labels: Labels, known: Features | None = None
    ) -> StepResult:
        """`known`: D's features of G(z), with the graph down to G."""
        total = z.new_zeros(())
        with standing_still(self.discriminator):
            for latents, y in rounds(self.settings.batch_gpu, z, labels):
                features = known or self._encode(self._generate(latents, y), y, "G")
                loss = losses.generator_loss(self._judge(features, y), self.settings.loss)
                self.update_g.backward(self._reduce(loss))
                total += loss.detach().sum()
        mean = total / len(z)
        return StepResult({"Loss/G": mean}, {"G": self.update_g(mean)})

    @record_function("step/D")
    def _train_discriminator(
        self, reals: Tensor, z: Tensor, labels: Labels, known: tuple[Tensor, Features] | None = None
    ) -> StepResult:
        """`known`: the fakes G(z) and D's features of them."""
        totals, all_fakes = reals.new_zeros(3), []
        for x, latents, y in rounds(self.settings.batch_gpu, reals, z, labels):
            with torch.no_grad():
                fakes, features = known or (self._generate(latents, y), None)
            # Two passes: the heads' BatchNorm must not mix the statistics of fakes and reals.
            loss_fake, sign_fake = self._learn(losses.fake_loss, fakes.detach(), y, features)
            loss_real, sign_real = self._learn(losses.real_loss, x, y)
            totals += torch.stack([loss_fake + loss_real, sign_real, sign_fake]) * len(x)
            all_fakes.append(fakes.detach())
        loss, sign_real, sign_fake = (totals / len(reals)).unbind()
        scalars = {"Loss/D": loss, "Loss/sign_real": sign_real, "Loss/sign_fake": sign_fake}
        if len(reals) > 1:
            scalars["Loss/diversity"] = losses.diversity(torch.cat(all_fakes), reals)
        return StepResult(scalars, {"D": self.update_d(loss)})

    def _learn(
        self, loss_of: losses.LossOf, images: Tensor, y: Labels, known: Features | None = None
    ) -> tuple[Tensor, Tensor]:
        """Adds D's gradients from images of one kind; their mean loss and mean sign of logits."""
        if known is None or self.discriminator.augment:  # D's step augments anew
            with torch.no_grad():  # nothing in front of the heads trains
                known = self._encode(images, y, "D")
        logits = self._judge([[x.detach() for x in maps] for maps in known], y)
        loss = loss_of(logits, self.settings.loss)
        self.update_d.backward(self._reduce(loss))
        return loss.detach().mean(), losses.mean_sign(logits)

    @record_function("step/R1")
    def _penalise_gradient(self, reals: Tensor, labels: Labels) -> StepResult:
        """Lazy R1 (Mescheder et al. 2018, Karras et al. 2020) on the same reals, not augmented."""
        total = reals.new_zeros(())
        for x, y in rounds(self.settings.batch_gpu, reals, labels):
            images = x.detach().requires_grad_()
            with twice_differentiable(), FrozenConvolutions(), sdpa_kernel(SDPBackend.MATH):
                penalty = losses.r1_penalty(self.discriminator(images, y), images)
            weighted = self.settings.r1_weight * penalty
            self.update_d.backward(weighted.sum() / len(reals))  # a mean in both reductions
            total += weighted.detach().sum()
        mean = total / len(reals)
        return StepResult({"Loss/R1": mean}, {"R1": self.update_d(mean)})

    @record_function("step/generate")
    def _generate(self, z: Tensor, labels: Labels) -> Tensor:
        s = self.settings
        return few_step(self.generator, z, labels, steps=s.steps, mid_sigma=s.mid_sigma)

    @record_function("step/encode")
    def _encode(self, images: Tensor, labels: Labels, of: str) -> Features:
        """D's frozen features of the images, augmented for the step of G or D."""
        views = self.discriminator.views(images, self._streams["augment", of])
        return [self._features(i, view, labels) for i, view in enumerate(views)]

    @record_function("step/judge")
    def _judge(self, features: Features, labels: Labels) -> list[Tensor]:
        """D's logits [N, patches], one entry a feature network."""
        return [self._logits(i, maps, labels) for i, maps in enumerate(features)]

    def _features(self, index: int, view: Tensor, labels: Labels) -> list[Tensor]:
        return self.discriminator.features(index, view, labels)

    def _logits(self, index: int, features: list[Tensor], labels: Labels) -> Tensor:
        return self.discriminator.judge(index, features, labels)
