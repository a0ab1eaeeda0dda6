"""Mean and covariance of features, and the Frechet distance between two Gaussians.

d^2 = |mu1 - mu2|^2 + tr S1 + tr S2 - 2 tr (S1 S2)^(1/2)      (Heusel et al. 2017, equation 6)
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgan import distributed
from fastgan.errors import UserError

# How far below zero an eigenvalue may lie, as a share of the largest: covariances computed in
# float32 reach 1e-6, and a matrix beyond this is none.
_NEGATIVE_SHARE = 1e-4
# Products of three such numbers still fit into float64.
_LARGEST = 1e100


@dataclass(frozen=True)
class Statistics:
    """A Gaussian fitted to features: float64 mean [D], covariance [D, D] (on the CPU), how many
    images it was fitted to (None: unknown) and where these came from."""

    mean: Tensor
    covariance: Tensor
    n: int | None
    source: dict[str, Any]

    @property
    def dim(self) -> int:
        return self.mean.shape[0]


class FeatureStatistics:
    """Running sum f and sum f f^T in float64; divided once, after the sum over processes.

    Float64 makes raw moments safe: with means of 1e3 and a variance of 1 the covariance keeps
    about nine digits.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self.n = 0
        self._sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self._outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)
        self._reduced = False

    def update(self, features: Tensor) -> None:
        """Adds features [N, D]. UserError: not finite."""
        assert not self._reduced, "update() after all_reduce() would count images twice"
        assert features.ndim == 2 and features.shape[1] == self.dim, tuple(features.shape)
        if not bool(features.isfinite().all()):
            raise UserError(
                "features are NaN or infinite, in the feature extractor's output, "
                "check the images and the extractor's weights"
            )
        values = features.to(self._sum)
        self.n += len(values)
        self._sum += values.sum(0)
        self._outer.addmm_(values.T, values)

    def all_reduce(self) -> None:
        """Sums over the processes; afterwards every process holds the statistics of all images."""
        assert not self._reduced, "all_reduce() twice would count images twice"
        count = torch.tensor([self.n], dtype=torch.int64, device=self._sum.device)
        self.n = int(distributed.all_reduce_sum(count).item())
        distributed.all_reduce_sum(self._sum)
        distributed.all_reduce_sum(self._outer)
        self._reduced = distributed.world_size() > 1

    @property
    def mean(self) -> Tensor:
        """Float64 [D]."""
        assert self.n > 0, "no features yet"
        return self._sum / self.n

    @property
    def covariance(self) -> Tensor:
        """Unbiased (divided by n - 1), float64 [D, D]. UserError: fewer than two images."""
        if self.n < 2:
            raise UserError(f"{self.n} images have no covariance, in the statistics, use 2 or more")
        mean = self.mean
        return (self._outer - self.n * torch.outer(mean, mean)) / (self.n - 1)

    def finish(self, source: dict[str, Any]) -> Statistics:
        """The fitted Gaussian with its source, on the CPU."""
        return Statistics(self.mean.cpu(), self.covariance.cpu(), self.n, source)


def frechet_distance(mu1: Tensor, sigma1: Tensor, mu2: Tensor, sigma2: Tensor) -> float:
    """Squared Frechet distance of N(mu1, sigma1) and N(mu2, sigma2), what "FID" reports.

    mu [D], sigma [D, D]; computed in float64 with symmetric eigenvalues alone:
    tr (S1 S2)^(1/2) = tr (r S2 r)^(1/2), r = S1^(1/2), since both products share their
    eigenvalues. This also holds for singular covariances, where a general matrix square root
    needs help. UserError: dimensions that differ, NaN, a sigma that is no covariance.
    """
    mu1, sigma1, mu2, sigma2 = (t.to(torch.float64) for t in (mu1, sigma1, mu2, sigma2))
    if mu1.shape != mu2.shape:
        raise UserError(
            f"{mu1.numel()} and {mu2.numel()} features cannot be compared, in the two statistics, "
            "take both from the same extractor"
        )
    check_gaussian(mu1, sigma1, "first statistics")
    check_gaussian(mu2, sigma2, "second statistics")
    _checked(torch.linalg.eigvalsh((sigma2 + sigma2.T) / 2), "second statistics")
    root = _symmetric_root(sigma1, "first statistics")
    product = root @ sigma2 @ root
    trace = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + sigma1.trace() + sigma2.trace() - 2 * trace
    # Equal Gaussians end a rounding error below zero.
    return max(float(distance), 0.0)


def check_gaussian(mu: Tensor, sigma: Tensor, where: str) -> None:
    """UserError unless mu is [D], sigma [D, D], both finite, and sigma symmetric."""
    if mu.ndim != 1 or tuple(sigma.shape) != (len(mu), len(mu)):
        raise UserError(
            f"mu has shape {list(mu.shape)} and sigma {list(sigma.shape)}, in the {where}, "
            "right is [D] and [D, D]"
        )
    if not (mu.abs().max() < _LARGEST and sigma.abs().max() < _LARGEST):
        raise UserError(f"mu or sigma is NaN or infinite, in the {where}, compute them again")
    if bool((sigma - sigma.T).abs().max() > _NEGATIVE_SHARE * sigma.abs().max()):
        raise UserError(f"sigma is not symmetric, in the {where}, right is a covariance matrix")


def _symmetric_root(sigma: Tensor, where: str) -> Tensor:
    """The symmetric r with r r = sigma."""
    values, vectors = torch.linalg.eigh((sigma + sigma.T) / 2)
    return (vectors * _checked(values, where).sqrt()) @ vectors.T


def _checked(eigenvalues: Tensor, where: str) -> Tensor:
    """Eigenvalues of a covariance with rounding's tiny negatives set to zero."""
    smallest = float(eigenvalues[0])
    if smallest < -_NEGATIVE_SHARE * float(eigenvalues.abs().max()):
        raise UserError(
            f"sigma has the eigenvalue {smallest:.3g}, in the {where}, "
            "right is a covariance matrix, which has none below zero"
        )
    return eigenvalues.clamp(min=0)
