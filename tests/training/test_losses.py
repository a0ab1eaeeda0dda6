"""The losses against numbers worked out by hand."""

from math import log

import pytest
import torch

from fastgan.training.losses import (
    edm_loss,
    fake_loss,
    generator_loss,
    mean_sign,
    r1_penalty,
    real_loss,
)

LN3 = log(3)
# softplus(0) = ln 2, softplus(ln 3) = ln 4, softplus(-ln 3) = ln 4/3.
TWO_NETWORKS = [torch.tensor([[0.0, LN3]]), torch.tensor([[-LN3]])]


@pytest.mark.parametrize("loss", [generator_loss, real_loss])
def test_softplus_of_minus_d_averages_patches_and_sums_networks(loss) -> None:
    expected = (log(2) + log(4 / 3)) / 2 + log(4)
    torch.testing.assert_close(loss(TWO_NETWORKS), torch.tensor([expected]))


def test_softplus_of_d() -> None:
    expected = (log(2) + log(4)) / 2 + log(4 / 3)
    torch.testing.assert_close(fake_loss(TWO_NETWORKS), torch.tensor([expected]))


def test_hinge() -> None:
    logits = [torch.tensor([[0.5, 2.0]]), torch.tensor([[-3.0]])]
    assert real_loss(logits, "hinge").tolist() == [0.25 + 4]
    assert fake_loss(logits, "hinge").tolist() == [2.25 + 0]
    assert generator_loss(logits, "hinge").tolist() == [-1.25 + 3]


def test_one_value_per_image() -> None:
    logits = [torch.tensor([[0.0, 0.0], [LN3, LN3]])]
    torch.testing.assert_close(fake_loss(logits), torch.tensor([log(2), log(4)]))


def test_r1_of_a_linear_discriminator_is_the_squared_norm_of_its_summed_rows() -> None:
    first = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    second = torch.tensor([[-1.0, 1.0]])
    images = torch.randn(3, 1, 1, 2, requires_grad=True)
    pixels = images.flatten(1)
    penalty = r1_penalty([pixels @ first.T, pixels @ second.T], images)
    # The rows sum to (3, 7).
    torch.testing.assert_close(penalty, torch.full((3,), 58.0))
    (gradient,) = torch.autograd.grad(penalty[0], first)
    torch.testing.assert_close(gradient, torch.tensor([[6.0, 14.0], [6.0, 14.0]]))


def test_r1_is_per_image() -> None:
    images = torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1).requires_grad_()
    # D(x) = x^2, whose gradient is 2 x.
    assert r1_penalty([images.square().flatten(1)], images).tolist() == [4.0, 16.0]


def test_edm_weight() -> None:
    clean = torch.zeros(2, 1, 2, 2)
    denoised = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
    # (1 + 1/4) / (1/4) = 5 and (4 + 1/4) / 1 = 4.25, times 4 pixels of 1 and of 9.
    expected = torch.tensor([5 * 4 * 1, 4.25 * 4 * 9])
    torch.testing.assert_close(edm_loss(denoised, clean, torch.tensor([1.0, 2.0])), expected)


def test_mean_sign() -> None:
    logits = [torch.tensor([[-2.0, 0.5, 3.0, 9.0]]), torch.tensor([[-1.0]])]
    assert mean_sign(logits).item() == (0.5 - 1) / 2
