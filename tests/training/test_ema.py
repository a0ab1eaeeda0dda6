"""The average: its decay, what it copies and what it shares."""

import pytest
import torch

from fastgan.models import Precond
from fastgan.models.freeze import freeze
from fastgan.training.state import trainable
from fastgan.training.updater import averaged_copy, ema_beta, update_ema


@pytest.mark.parametrize(
    ("batch", "nimg", "half_life", "ramp", "beta"),
    [
        (256, 0, 500_000, 0.05, 0.0),  # the first update copies
        (50, 1_000, 500_000, 0.05, 0.5),  # 5% of 1000 images
        (50, 2_000, 500_000, 0.05, 0.5**0.5),
        (500, 9_000_000, 500_000, 0.05, 0.5 ** (500 / 450_000)),
        (500, 10_000_000, 500_000, 0.05, 0.5 ** (500 / 500_000)),
        (500, 90_000_000, 500_000, 0.05, 0.5 ** (500 / 500_000)),
        (500, 0, 1_000, None, 0.5**0.5),
        (500, 1_000, 0, None, 0.0),
    ],
)
def test_beta(batch: int, nimg: int, half_life: float, ramp: float | None, beta: float) -> None:
    assert ema_beta(batch, nimg, half_life=half_life, ramp=ramp) == pytest.approx(beta, rel=1e-12)


def test_after_one_half_life_half_of_the_old_is_left(tiny_network: Precond) -> None:
    average = averaged_copy(tiny_network)
    for parameter in average.parameters():
        parameter.fill_(1.0)
    with torch.no_grad():
        for parameter in tiny_network.parameters():
            parameter.fill_(5.0)
    for _ in range(4):
        update_ema(average, tiny_network, torch.tensor(ema_beta(25, 0, half_life=100, ramp=None)))
    for parameter in average.parameters():
        torch.testing.assert_close(parameter, torch.full_like(parameter, 3.0))


def test_the_first_update_copies_bitwise(tiny_network: Precond) -> None:
    average = averaged_copy(tiny_network)
    with torch.no_grad():
        for parameter in tiny_network.parameters():
            parameter.normal_()
    update_ema(average, tiny_network, torch.tensor(0.0))
    for a, p in zip(average.parameters(), tiny_network.parameters(), strict=True):
        assert torch.equal(a, p)


def test_only_what_trains_is_copied(tiny_network: Precond) -> None:
    names = set(freeze(tiny_network, 1))
    average = averaged_copy(tiny_network)
    assert 0 < len(names) < len(list(tiny_network.parameters()))
    assert names == set(trainable(tiny_network))
    others = dict(average.named_parameters())
    for name, parameter in tiny_network.named_parameters():
        assert (others[name].data_ptr() == parameter.data_ptr()) == (name not in names), name
        assert torch.equal(others[name], parameter)
    for (name, own), (_, shared) in zip(
        tiny_network.named_buffers(), average.named_buffers(), strict=True
    ):
        assert own.data_ptr() == shared.data_ptr(), name


def test_the_average_is_for_inference(tiny_network: Precond) -> None:
    average = averaged_copy(tiny_network.train())
    assert not average.training and tiny_network.training
    assert not any(p.requires_grad for p in average.parameters())
    assert all(p.requires_grad for p in tiny_network.parameters())


def test_frozen_parameters_are_left_alone(tiny_network: Precond) -> None:
    freeze(tiny_network, 1)
    average = averaged_copy(tiny_network)
    before = {n: p.clone() for n, p in average.named_parameters()}
    with torch.no_grad():
        for parameter in trainable(tiny_network).values():
            parameter.add_(1.0)
    update_ema(average, tiny_network, torch.tensor(0.75))
    for name, parameter in average.named_parameters():
        moved = 0.25 if name in trainable(tiny_network) else 0.0
        torch.testing.assert_close(parameter, before[name] + moved)
