"""Samplers against solutions known in closed form."""

from math import sqrt

import pytest
import torch
from torch import nn

from fastgan.models import Precond
from fastgan.models.sampling import few_step, heun, rho_grid, to_uint8

ONE = torch.ones(1, 1, 1, 1, dtype=torch.float64)


class GaussianDenoiser(nn.Module):
    """The exact denoiser of data N(0, s^2): D(x; sigma) = s^2 / (s^2 + sigma^2) x."""

    def __init__(self, s: float, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.s = nn.Parameter(torch.tensor(s, dtype=dtype))
        self.asked: list[tuple[torch.dtype, float]] = []

    def forward(self, x, sigma, class_labels=None):
        self.asked.append((x.dtype, sigma.item()))
        return x * self.s**2 / (self.s**2 + sigma**2)


def test_grid() -> None:
    ends = 80 ** (1 / 7), 0.002 ** (1 / 7)
    middle = ((ends[0] + ends[1]) / 2) ** 7
    assert rho_grid(3) == pytest.approx([80, middle, 0.002], rel=1e-12)
    assert rho_grid(1) == pytest.approx([80])
    # EDM's 18 levels for CIFAR-10 begin like this.
    assert rho_grid(18)[:3] == pytest.approx([80.0, 57.586, 40.786], abs=1e-3)
    assert rho_grid(2, sigma_min=1, sigma_max=2, rho=1) == pytest.approx([2, 1])


def test_heun_converges_to_the_solution_in_second_order() -> None:
    # The probability flow scales x by the standard deviation of the noisy data.
    exact = 80 * 0.5 / sqrt(0.5**2 + 80**2)
    ends = [heun(GaussianDenoiser(0.5), ONE, steps=steps).item() for steps in (32, 64, 128)]
    errors = [abs(end - exact) for end in ends]
    assert errors[2] < 1e-3
    assert [errors[i] / errors[i + 1] for i in (0, 1)] == pytest.approx([4, 4], rel=0.25)


def test_heun_asks_twice_per_step_but_once_at_the_end() -> None:
    network = GaussianDenoiser(0.5, torch.float32)
    images = heun(network, torch.ones(2, 1, 1, 1), steps=4)
    grid = [80.0, *(x for level in rho_grid(4)[1:] for x in (level, level))]
    assert [level for _, level in network.asked] == pytest.approx(grid)
    assert images.dtype == torch.float64
    assert {dtype for dtype, _ in network.asked} == {torch.float32}


def test_one_step_is_the_denoiser_at_80(tiny_network: Precond) -> None:
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = tiny_network(80 * z, torch.full((3,), 80.0))
    torch.testing.assert_close(few_step(tiny_network, z), expected)


@pytest.mark.parametrize("middle", [0.8, None])
def test_two_steps(middle: float | None) -> None:
    network, z = GaussianDenoiser(0.5), ONE
    level = middle or ((80 ** (1 / 7) + 0.002 ** (1 / 7)) / 2) ** 7
    denoised = 80 * 0.25 / (0.25 + 80**2)
    x = denoised + level / 80 * (80 - denoised)
    expected = x * 0.25 / (0.25 + level**2)
    found = few_step(network, z, steps=2, mid_sigma=middle)
    assert found.item() == pytest.approx(expected, rel=1e-9)


def test_gradients_flow_through_every_call() -> None:
    network, z = GaussianDenoiser(0.5), ONE
    few_step(network, z, steps=3).sum().backward()
    step, s = 1e-6, network.s.detach().clone()
    ends = [few_step(GaussianDenoiser(s.item() + d), z, steps=3).item() for d in (step, -step)]
    assert network.s.grad.item() == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-6)


def test_quantisation_truncates_as_published() -> None:
    x = torch.tensor([-2.0, -1.0, -0.0040, 0.0, 0.99, 0.9999, 1.0, 3.0])
    assert to_uint8(x).tolist() == [0, 0, 127, 128, 254, 255, 255, 255]
    assert to_uint8(x).dtype == torch.uint8
