"""One iteration of EDM pre-training (Karras et al. 2022): denoise images at random noise levels."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fastgan.common.distributed import World
from fastgan.common.noise import global_stream, normal, stream
from fastgan.models import Precond
from fastgan.training import losses
from fastgan.training.state import StepResult, TrainingStep, rounds, trainable
from fastgan.training.updater import Updater, ema_beta, update_ema


@dataclass(frozen=True)
class EdmSettings:
    """The choices of EDM pre-training; ln sigma ~ N(noise_mean, noise_std^2)."""

    seed: int
    batch: int
    batch_gpu: int
    lr: float
    beta2: float
    lr_factor: Callable[[int], float]
    noise_mean: float = -1.2
    noise_std: float = 1.2
    ema_half_life: float = 500_000
    ema_ramp: float | None = 0.05


class EdmStep(TrainingStep):
    """Holds the network and the optimiser that one iteration updates, and runs it."""

    def __init__(
        self, network: Precond, average: Precond, settings: EdmSettings, world: World
    ) -> None:
        self.generator, self.average = network.train(), average
        self.settings, self.world = settings, world
        self.update_g = Updater(
            trainable(network),
            world,
            lr=settings.lr,
            betas=(0.9, settings.beta2),
            lr_factor=settings.lr_factor,
        )

    def run(self, reals: Tensor, labels: Tensor | None, iteration: int) -> StepResult:
        s = self.settings
        nimg = iteration * s.batch
        all_sigma, all_noise = self._draw(reals, iteration)
        total = reals.new_zeros(())
        # Dropout draws from the global generator, which knows nothing of iterations.
        with global_stream(s.seed, "dropout", iteration, self.world.rank, device=reals.device):
            for x, y, sigma, noise in rounds(s.batch_gpu, reals, labels, all_sigma, all_noise):
                denoised = self.generator(x + sigma[:, None, None, None] * noise, sigma, y)
                loss = losses.edm_loss(denoised, x, sigma).sum() / len(reals)
                self.update_g.backward(loss)
                total += loss.detach()
        self.update_g.follow(nimg)
        skipped = {"G": self.update_g(total)}
        beta = ema_beta(s.batch, nimg, half_life=s.ema_half_life, ramp=s.ema_ramp)
        update_ema(self.average, self.generator, total.new_full((), beta))
        return StepResult({"Loss/denoising": total}, skipped)

    def _draw(self, reals: Tensor, iteration: int) -> tuple[Tensor, Tensor]:
        """This process's slice of the whole batch's noise levels [local] and noise."""
        s = self.settings
        generator = stream(s.seed, "edm", iteration, device=reals.device)
        levels = normal(generator, s.batch, dtype=reals.dtype)
        ln_sigma = s.noise_mean + s.noise_std * levels
        noise = normal(generator, s.batch, *reals.shape[1:], dtype=reals.dtype)
        rank, size = self.world.rank, self.world.size
        return ln_sigma.exp().chunk(size)[rank], noise.chunk(size)[rank]


def warmup_then_cosine(warmup: int, total: int, *, cosine: bool) -> Callable[[int], float]:
    """Images seen -> factor: linear from 0 over `warmup` images, then 1 or a cosine down to 0."""

    def factor(nimg: int) -> float:
        rise = min(1.0, nimg / warmup) if warmup else 1.0
        fall = (1 + math.cos(math.pi * min(1.0, nimg / total))) / 2 if cosine else 1.0
        return rise * fall

    return factor
