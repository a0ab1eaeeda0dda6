"""The Frechet distance and its float64 statistics against independent computations."""

import numpy as np
import pytest
import scipy.linalg
import torch

from fastgan.common.errors import UserError
from fastgan.evaluation.frechet import FeatureStatistics, frechet_distance


def _features(n: int, dim: int, seed: int, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mixing + mean


def _gaussian(n: int, dim: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    features = _features(n, dim, seed)
    return features.mean(0), torch.cov(features.T).view(dim, dim)


def test_diagonal_gaussians_have_a_closed_form() -> None:
    mu1, mu2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.5, 2.0, 1.0])
    std1, std2 = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 0.5, 0.0])
    expected = 0.25 + 4.0 + (1.0 + 2.25 + 9.0)
    found = frechet_distance(mu1, std1.square().diag(), mu2, std2.square().diag())
    assert found == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dim", [1, 64])
def test_equals_the_matrix_square_root(dim: int) -> None:
    (mu1, s1), (mu2, s2) = _gaussian(200, dim, 1), _gaussian(300, dim, 2)
    root = scipy.linalg.sqrtm(np.atleast_2d((s1 @ s2).numpy()))
    expected = float((mu1 - mu2).square().sum() + (s1 + s2).trace()) - 2 * np.trace(root).real
    assert frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-8)


def test_singular_covariances_and_identity() -> None:
    mu, sigma = _gaussian(10, 32, 5)
    assert frechet_distance(mu, sigma, mu, sigma) == pytest.approx(0, abs=1e-5)
    shifted = frechet_distance(mu, sigma, mu + 2, sigma)
    assert shifted == pytest.approx(4 * 32, rel=1e-6)


def test_accumulation_in_chunks_equals_numpy_at_once() -> None:
    features = _features(257, 12, 6).float()
    statistics = FeatureStatistics(12)
    for chunk in features.split(50):
        statistics.update(chunk)
    assert statistics.n == 257
    exact = features.double().numpy()
    np.testing.assert_allclose(statistics.mean.numpy(), exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(
        statistics.covariance.numpy(), np.cov(exact, rowvar=False), rtol=1e-11, atol=1e-11
    )


def test_large_mean_keeps_the_covariance() -> None:
    """Float32 sums would lose it: 1e6 + 1e-2 is 1e6 there."""
    generator = torch.Generator().manual_seed(7)
    features = 1e3 + 0.1 * torch.randn(2000, 4, generator=generator)
    statistics = FeatureStatistics(4)
    for chunk in features.split(100):
        statistics.update(chunk)
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.covariance.numpy(), expected, rtol=1e-6, atol=1e-8)


def test_images_that_give_no_covariance() -> None:
    statistics = FeatureStatistics(3)
    statistics.update(torch.ones(1, 3))
    with pytest.raises(UserError, match="1 images have no covariance"):
        _ = statistics.covariance
    with pytest.raises(UserError, match="NaN or infinite"):
        statistics.update(torch.tensor([[1.0, 0.0, float("nan")]]))


def test_statistics_that_are_no_gaussian() -> None:
    mu, sigma = torch.zeros(2), torch.eye(2)
    cases = [
        ((torch.zeros(3), torch.eye(3)), "2 and 3 features"),
        ((mu, torch.eye(3)), r"mu has shape \[2\] and sigma \[3, 3\], in the second"),
        ((mu, sigma * float("nan")), "NaN or infinite, in the second"),
        ((mu, torch.tensor([[1.0, 0.5], [0.0, 1.0]])), "not symmetric"),
        ((mu, torch.tensor([[1.0, 0.0], [0.0, -0.5]])), "eigenvalue -0.5"),
    ]
    for (other_mu, other_sigma), message in cases:
        with pytest.raises(UserError, match=message):
            frechet_distance(mu, sigma, other_mu, other_sigma)
    with pytest.raises(UserError, match="eigenvalue -1"):
        frechet_distance(mu, -sigma, mu, sigma)


def test_rounding_below_zero_is_clamped() -> None:
    mu = torch.zeros(2, dtype=torch.float64)
    almost = torch.tensor([[1.0, 0.0], [0.0, -1e-9]], dtype=torch.float64)
    assert frechet_distance(mu, almost, mu, torch.zeros(2, 2)) == pytest.approx(1.0, abs=1e-8)
