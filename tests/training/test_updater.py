"""What surrounds Adam's step, and the average: its decay, what it copies and what it shares."""

import math

import pytest
import torch
from torch import nn

from fastgan.common.errors import UserError
from fastgan.models import Precond
from fastgan.models.freeze import freeze
from fastgan.training.state import trainable
from fastgan.training.updater import Updater, averaged_copy, ema_beta, linear_decay, update_ema
from tests.training.toys import ALONE


def updater(lr: float = 0.1, **options: object) -> Updater:
    parameters = {name: nn.Parameter(torch.ones(2)) for name in ("a", "b")}
    return Updater(parameters, ALONE, lr=lr, betas=(0.0, 0.99), **options)  # type: ignore[arg-type]


LOSS = torch.tensor(1.0)


def give_gradients(update: Updater, value: float) -> None:
    for parameter in update.parameters:
        parameter.grad = torch.full_like(parameter, value)


def test_one_step_of_adam_moves_by_the_learning_rate_and_clears() -> None:
    update = updater()
    give_gradients(update, 3.0)
    assert update(LOSS) == 0
    for parameter in update.parameters:
        torch.testing.assert_close(parameter.data, torch.full((2,), 0.9))
        assert parameter.grad is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_skip_touches_neither_parameters_nor_moments(bad: float) -> None:
    update = updater()
    give_gradients(update, 1.0)
    update(LOSS)
    before = [p.detach().clone() for p in update.parameters]
    state = {n: t.clone() for n, t in update.state().items()}
    give_gradients(update, 1.0)
    update.parameters[1].grad[0] = bad
    assert update(LOSS) == 1 and update.blamed() == ["b"]
    for old, parameter in zip(before, update.parameters, strict=True):
        assert torch.equal(old, parameter) and parameter.grad is None
    assert all(torch.equal(state[n], t) for n, t in update.state().items())


def test_a_loss_that_is_not_finite_stops_the_update() -> None:
    """An infinite loss can have finite gradients: softplus saturates."""
    update = updater()
    give_gradients(update, 1.0)
    assert update(torch.tensor(math.inf)) == 1 and update.blamed() == []
    assert torch.equal(update.parameters[0], torch.ones(2))


def test_who_is_blamed_is_remembered() -> None:
    update = updater()
    for bad in (math.nan, 1.0):
        give_gradients(update, 1.0)
        update.parameters[0].grad[1] = bad
        update(LOSS)
    assert update.blamed() == ["a"]


def test_published_repairs_and_goes_on() -> None:
    """Adam's first step moves every parameter by the learning rate against its gradient's sign."""
    parameter = nn.Parameter(torch.zeros(4))
    update = Updater({"p": parameter}, ALONE, lr=0.5, betas=(0.0, 0.99), nonfinite="published")
    parameter.grad = torch.tensor([math.nan, math.inf, -math.inf, 2.0])
    assert update(torch.tensor(math.nan)) == 0
    torch.testing.assert_close(parameter.data, torch.tensor([0.0, -0.5, 0.5, -0.5]))
    squares = update.state()["p/exp_avg_sq"]
    torch.testing.assert_close(squares, 0.01 * torch.tensor([0.0, 1e10, 1e10, 4.0]))


def test_learning_rate_follows_the_images() -> None:
    update = updater(lr_factor=lambda nimg: 0.5 if nimg >= 100 else 1.0)
    give_gradients(update, 1.0)
    update.follow(100)
    update(LOSS)
    torch.testing.assert_close(update.parameters[0].data, torch.full((2,), 0.95))


def test_linear_decay() -> None:
    factor = linear_decay(1000, 0.5)
    assert [factor(n) for n in (0, 499, 500, 750, 1000, 1100)] == [1, 1, 1, 0.5, 0, 0]
    assert linear_decay(1000, None)(999) == 1


def test_state_makes_a_second_updater_continue_bitwise() -> None:
    first, second = updater(), updater()
    for value in (1.0, -2.0):
        give_gradients(first, value)
        first(LOSS)
    second.load_state({n: t.clone() for n, t in first.state().items()})
    for mine, theirs in zip(second.parameters, first.parameters, strict=True):
        mine.data.copy_(theirs.data)
    for update in (first, second):
        give_gradients(update, 0.5)
        update(LOSS)
    assert torch.equal(first.parameters[0], second.parameters[0])
    assert all(torch.equal(t, second.state()[n]) for n, t in first.state().items())


def test_state_of_other_parameters_is_refused() -> None:
    with pytest.raises(UserError, match="names c, which does not train here"):
        updater().load_state({"c/step": torch.zeros(())})


class ApexLike(torch.optim.Adam):
    """Counts steps as apex's FusedAdam does: once for all parameters, in the group."""

    @torch.no_grad()
    def step(self, closure: object = None) -> None:  # type: ignore[override]
        group = self.param_groups[0]
        group["step"] = group.get("step", 0) + 1
        for p in group["params"]:
            state = self.state[p]
            for entry in ("exp_avg", "exp_avg_sq"):
                state.setdefault(entry, torch.zeros_like(p))
            state["exp_avg_sq"].mul_(group["betas"][1]).addcmul_(p.grad, p.grad, value=0.01)
            second = state["exp_avg_sq"] / (1 - group["betas"][1] ** group["step"])
            p.sub_(group["lr"] * p.grad / (second.sqrt() + group["eps"]))


def test_apex_is_taken_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps like PyTorch's Adam, and continues from what it saved."""
    monkeypatch.setattr("fastgan.training.updater.fused_adam", lambda: ApexLike)
    ours, theirs, resumed = updater(adam="apex"), updater(), updater(adam="apex")
    assert isinstance(ours.optimizer, ApexLike)
    for k in range(4):
        for update in (ours, theirs):
            give_gradients(update, 1.0 + k)
            update(LOSS)
        if k == 1:
            state = {name: value.clone() for name, value in ours.state().items()}
            resumed.load_state(state)
            for mine, yours in zip(resumed.parameters, ours.parameters, strict=True):
                mine.data.copy_(yours.data)
        if k > 1:
            give_gradients(resumed, 1.0 + k)
            resumed(LOSS)
    for a, b, c in zip(ours.parameters, theirs.parameters, resumed.parameters, strict=True):
        torch.testing.assert_close(a, b)
        assert torch.equal(a, c)


def test_apex_is_refused_where_it_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgan.training.updater.fused_adam", lambda: None)
    with pytest.raises(UserError, match="apex is not installed"):
        updater(adam="apex")


def scale_of(update: Updater) -> float:
    """What losses are multiplied by."""
    return float(update.state().get("loss_scale/value", 1.0))


def test_scaled_losses_change_no_update() -> None:
    """Powers of two are exact: the same bits."""
    plain, scaled = updater(), updater(scale_losses=True)
    for _ in range(3):
        for update in (plain, scaled):
            loss = sum((p * p * torch.tensor([0.3, -1.7])).sum() for p in update.parameters)
            update.backward(loss)
            assert scale_of(update) == (1 if update is plain else 2**16)
            assert update(loss) == 0
    for ours, reference in zip(scaled.parameters, plain.parameters, strict=True):
        assert torch.equal(ours, reference)


def test_an_overflow_is_left_out_and_halves_the_scale() -> None:
    update = updater(scale_losses=True)
    give_gradients(update, math.inf)
    assert update(LOSS) == 1 and scale_of(update) == 2**15
    give_gradients(update, 1.0)
    assert update(LOSS) == 0 and scale_of(update) == 2**15


def test_two_thousand_updates_in_a_row_double_the_scale() -> None:
    update = updater(scale_losses=True)
    for number in range(2001):
        assert scale_of(update) == (2**16 if number < 2000 else 2**17)
        give_gradients(update, 1.0)
        update(LOSS)


def test_the_scale_is_part_of_the_state() -> None:
    update, other, unscaled = updater(scale_losses=True), updater(scale_losses=True), updater()
    give_gradients(update, 1.0)
    update(LOSS)
    give_gradients(update, math.nan)
    update(LOSS)
    give_gradients(update, 1.0)
    update(LOSS)
    state = {name: value.clone() for name, value in update.state().items()}
    other.load_state(state)
    assert scale_of(other) == 2**15
    assert {k: float(v) for k, v in other.state().items() if k.startswith("loss_scale")} == {
        "loss_scale/value": 2.0**15,
        "loss_scale/made": 1.0,
    }
    # A run that goes on in another arithmetic starts without, or with a scale of its own.
    unscaled.load_state(state)
    assert scale_of(unscaled) == 1
    fresh = updater(scale_losses=True)
    fresh.load_state({k: v for k, v in state.items() if not k.startswith("loss_scale")})
    assert scale_of(fresh) == 2**16


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
