"""One iteration against a second way of writing it down, and what it promises about its parts."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastgan.common.noise import normal, stream
from fastgan.training.state import trainable
from fastgan.training.step import PlainStep
from fastgan.training.updater import Updater, averaged_copy
from tests.training.toys import (
    ALONE,
    SHAPE,
    Watched,
    assert_same,
    diffusion_heads,
    everything,
    gan_step,
    generator,
    one_hot,
    reals,
    run,
    settings,
    watched,
)


def noise(purpose: str, iteration: int, n: int = 4) -> torch.Tensor:
    return normal(stream(3, "z", purpose, iteration), n, *SHAPE, dtype=torch.float64)


def one_step(network: torch.nn.Module, z: torch.Tensor, labels=None) -> torch.Tensor:
    return network(80 * z, z.new_full((1,), 80.0), labels)


def softplus_sum(logits: list[torch.Tensor], sign: float) -> torch.Tensor:
    return sum(F.softplus(sign * x).mean() for x in logits)  # type: ignore[return-value]


def written_out(iterations: int, share_fakes: bool) -> dict[str, torch.Tensor]:
    """The iteration as in the paper's recipe: no accumulation, no processes, no settings."""
    g, d = generator(), watched()
    heads = list(d.heads.parameters())
    weights = [p for p in g.parameters() if p.requires_grad]
    lazy = 16 / 17
    adam_g = torch.optim.Adam(weights, lr=1e-3, betas=(0.0, 0.99), eps=1e-8)
    adam_d = torch.optim.Adam(heads, lr=2e-3 * lazy, betas=(0.0, 0.99**lazy), eps=1e-8)
    average = [p.detach().clone() for p in weights]

    def update(adam: torch.optim.Adam, parameters: list, loss: torch.Tensor) -> None:
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        adam.step()

    for k in range(iterations):
        x = reals(k)
        fake = one_step(g, noise("G", k))
        if not share_fakes:
            update(adam_g, weights, softplus_sum(d(fake), -1))
            fake = one_step(g, noise("D", k))
        update(adam_d, heads, softplus_sum(d(fake.detach()), +1) + softplus_sum(d(x), -1))
        if share_fakes:
            update(adam_g, weights, softplus_sum(d(fake), -1))
        if k in (16, 32):
            leaf = x.clone().requires_grad_()
            logits = sum(y.sum() for y in d(leaf))
            (slope,) = torch.autograd.grad(logits, leaf, create_graph=True)
            penalty = slope.square().sum((1, 2, 3)).mean()
            update(adam_d, heads, 16 * (10.0 / 64) / 2 * penalty)
        half_life = min(500_000, 0.05 * 4 * k)
        beta = 0.5 ** (4 / half_life) if half_life else 0.0
        average = [
            beta * a + (1 - beta) * p.detach() for a, p in zip(average, weights, strict=True)
        ]
    names = list(trainable(g))
    return {
        **{f"generator/{n}": p.detach() for n, p in zip(names, weights, strict=True)},
        **{f"average/{n}": a for n, a in zip(names, average, strict=True)},
        **{f"discriminator/{n}": p.detach() for n, p in d.state_dict().items()},
    }


@pytest.mark.parametrize("share_fakes", [False, True])
def test_eighteen_iterations_equal_the_recipe_written_out(share_fakes: bool) -> None:
    step = gan_step(watched(), share_fakes=share_fakes)
    run(step, 18)
    found, expected = everything(step), written_out(18, share_fakes)
    assert_same({n: found[n] for n in expected}, expected, atol=1e-10)


def test_fakes_and_reals_pass_apart() -> None:
    d = watched(batch_norm=True)
    step = gan_step(d)
    run(step, 1)
    assert [len(call.images) for call in d.calls] == [4, 4, 4]
    assert torch.equal(d.calls[2].images, reals(0))
    for call in d.calls[:2]:
        assert not any(torch.equal(fake, real) for fake in call.images for real in reals(0))
    # G's pass, D's fakes and D's reals: three batches went through the running statistics.
    assert d.heads[1][1].num_batches_tracked == 3


def test_fakes_of_d_are_fresh_and_of_the_updated_generator() -> None:
    step = gan_step(d := watched())
    before = {n: p.clone() for n, p in trainable(step.generator).items()}
    first = one_step(step.generator, noise("G", 0)).detach()
    run(step, 1)
    assert all(not torch.equal(p, before[n]) for n, p in trainable(step.generator).items())
    torch.testing.assert_close(d.calls[0].images, first, rtol=0, atol=1e-12)
    updated = one_step(step.generator, noise("D", 0)).detach()
    torch.testing.assert_close(d.calls[1].images, updated, rtol=0, atol=1e-12)


def test_shared_fakes_are_what_d_learns_from_before_it_judges_them() -> None:
    step = gan_step(d := watched(), share_fakes=True)
    made = []
    step.generator.register_forward_hook(lambda *_: made.append(len(d.judged)))
    run(step, 1)
    # Two feature networks: fakes and reals in D's step, then the same fakes in G's.
    fakes, real, again = d.judged[::2]
    assert torch.equal(fakes, again) and torch.equal(real, reals(0))
    assert [call.images.equal(shown) for call, shown in zip(d.calls, (fakes, real), strict=True)]
    assert made == [0]


def test_shared_fakes_of_several_rounds_are_computed_again() -> None:
    step = gan_step(d := watched(), share_fakes=True, batch_gpu=2)
    made = []
    step.generator.register_forward_hook(lambda *_: made.append(len(d.judged)))
    run(step, 1)
    # In D's step and behind it: its four passes judge twice each.
    assert made == [0, 4, 8, 10]
    fakes, again = d.judged[0:8:4], d.judged[8::2]
    for first, second in zip(fakes, again, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=1e-12)


def test_shared_fakes_are_encoded_again_where_d_augments() -> None:
    for augment, encoded in (((), 2), (("translation",), 3)):
        d = watched()
        d.augment = augment
        run(gan_step(d, share_fakes=True), 1)
        assert len(d.calls) == encoded and len(d.judged) == 6


def test_features_kept_for_d_change_nothing() -> None:
    """Against a discriminator that says that it augments, and does not: encoded twice."""
    kept, encoded = (gan_step(share_fakes=True) for _ in range(2))
    kept.discriminator.augment = ()
    encoded.discriminator.augment = ("none",)
    encoded.discriminator.views = lambda images, generator: [images]
    for k in range(18):
        told = [step.run(reals(k), None, k).scalars for step in (kept, encoded)]
        assert_same(*told)
    assert_same(everything(kept), everything(encoded))


def test_r1_comes_every_16th_time_on_bare_reals_with_their_labels() -> None:
    d = watched()
    step = gan_step(d, label_dim=3)
    for k in range(34):
        before = len(d.calls)
        result = step.run(reals(k), one_hot(k, 3), k)
        *passes, last = d.calls[before:]
        assert last.for_r1 == (k in (16, 32)) == ("Loss/R1" in result.scalars)
        assert len(passes) == 2 + last.for_r1
        if last.for_r1:
            assert not last.augmented and torch.equal(last.images, reals(k))
        assert all(call.augmented for call in d.calls[before : before + 3])
        assert all(torch.equal(call.labels, one_hot(k, 3)) for call in d.calls[before:])
    # R1's updates are steps of D's own optimiser.
    steps = {name.rsplit("/", 1)[0]: t.item() for name, t in step.state().items() if "step" in name}
    assert {v for n, v in steps.items() if n.startswith("optimizer_g")} == {34}
    assert {v for n, v in steps.items() if "0.0.weight" in n} == {36}


def test_r1_can_be_switched_off() -> None:
    run(gan_step(d := watched(), r1_interval=0), 17)
    assert not any(call.for_r1 for call in d.calls)


def test_fakes_get_the_labels_of_the_reals() -> None:
    d = watched()
    step = gan_step(d, label_dim=3)
    step.run(reals(0), one_hot(0, 3), 0)
    expected = one_step(step.generator, noise("D", 0), one_hot(0, 3)).detach()
    torch.testing.assert_close(d.calls[1].images, expected, rtol=0, atol=1e-12)
    other = one_step(step.generator, noise("D", 0), one_hot(0, 3).roll(1, 1)).detach()
    assert (other - expected).abs().max() > 1e-6


def test_optimisers() -> None:
    step = gan_step(watched())
    (g,), (d,) = step.update_g.optimizer.param_groups, step.update_d.optimizer.param_groups
    assert (g["lr"], g["betas"], g["eps"]) == (1e-3, (0.0, 0.99), 1e-8)
    assert d["lr"] == pytest.approx(2e-3 * 16 / 17, rel=1e-12) and d["eps"] == 1e-8
    assert d["betas"] == (0.0, pytest.approx(0.99 ** (16 / 17), rel=1e-12))
    (d,) = gan_step(watched(), r1_interval=0).update_d.optimizer.param_groups
    assert (d["lr"], d["betas"]) == (2e-3, (0.0, 0.99))


def test_r1_weights() -> None:
    assert settings(r1_gamma=1e-4).r1_weight == pytest.approx(1e-4 / 64 / 2 * 16, rel=1e-12)
    published = settings(r1_gamma=1e-4, reduction="published")
    assert published.r1_weight == pytest.approx(1e-4 / 2 * 16, rel=1e-12)


def test_both_reductions_are_one_objective_at_the_published_batch() -> None:
    steps = [
        gan_step(reduction=r, published_batch_gpu=4, r1_gamma=1.0) for r in ("mean", "published")
    ]
    for update in (u for step in steps for u in (step.update_g, step.update_d)):
        # Without it Adam does not see that one gradient is four times the other.
        update.optimizer.param_groups[0]["eps"] = 1e-30
    reported = [run(step, 18) for step in steps]
    mean, published = ({**trainable(s.generator), **trainable(s.discriminator)} for s in steps)
    assert_same(mean, published, atol=1e-10)
    for name in reported[0]:
        scale = 4 if name == "Loss/R1" else 1
        torch.testing.assert_close(scale * reported[0][name], reported[1][name])


@pytest.mark.parametrize(
    "changes", [{}, {"reduction": "published"}, {"share_fakes": True}], ids=lambda c: "".join(c)
)
def test_two_rounds_equal_one(changes: dict) -> None:
    steps = [gan_step(batch_gpu=size, r1_interval=2, **changes) for size in (4, 2, 1)]
    reported = [run(step, 4) for step in steps]
    for step, scalars in zip(steps[1:], reported[1:], strict=True):
        assert_same(everything(step), everything(steps[0]), atol=1e-10)
        assert_same(scalars, reported[0], atol=1e-10)


def test_rounds_are_the_batch_of_the_statistics() -> None:
    run(gan_step(d := watched(batch_norm=True), batch_gpu=2), 1)
    assert [len(call.images) for call in d.calls] == [2] * 6


def test_frozen_parameters_are_shared_unoptimised_and_untouched() -> None:
    step = gan_step()
    frozen = {n: p for n, p in step.generator.named_parameters() if not p.requires_grad}
    before = {n: p.detach().clone() for n, p in frozen.items()}
    encoder = {n: t.clone() for n, t in step.discriminator.network.state_dict().items()}
    run(step, 17)
    average = dict(step.average.named_parameters())
    slots = {name.rpartition("/")[0] for name in step.update_g.state()}
    assert slots == set(trainable(step.generator)) and frozen and not slots & frozen.keys()
    for name, parameter in frozen.items():
        assert torch.equal(parameter, before[name]) and parameter.grad is None
        assert average[name].data_ptr() == parameter.data_ptr()
    assert_same(dict(step.discriminator.network.state_dict()), encoder)


@pytest.mark.parametrize("share_fakes", [False, True])
def test_no_gradients_are_left_and_none_reach_the_other_network(
    share_fakes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = gan_step(d := watched(), share_fakes=share_fakes)
    parameters = {"G": list(trainable(step.generator).values()), "D": list(d.parameters())}
    update, found = Updater.__call__, []

    def with_gradients() -> set[str]:
        return {of for of, ps in parameters.items() if any(p.grad is not None for p in ps)}

    def watch(self: Updater, loss: torch.Tensor) -> torch.Tensor:
        found.append(with_gradients())
        assert all(p.grad is not None for p in self.parameters)
        return update(self, loss)

    monkeypatch.setattr(Updater, "__call__", watch)
    run(step, 1)
    assert found == ([{"D"}, {"G"}] if share_fakes else [{"G"}, {"D"}]) and not with_gradients()


class _Broken(Watched):
    """Answers NaN while `broken`."""

    broken = False

    def judge(self, index, features, labels):
        logits = super().judge(index, features, labels)
        return logits * math.nan if self.broken else logits


def test_an_update_that_is_not_finite_is_left_out() -> None:
    d = _Broken().double()
    step = gan_step(d)
    step.run(reals(0), None, 0)
    d.broken = True
    before = everything(step)
    assert step.run(reals(1), None, 1).skipped == {"G": 1, "D": 1}
    assert_same(everything(step), before)
    assert step.blamed()["generator"] == step.update_g.names
    d.broken = False
    assert step.run(reals(2), None, 2).skipped == {"G": 0, "D": 0}
    after = everything(step)
    assert all(t.isfinite().all() for t in after.values())
    assert not torch.equal(after["discriminator/heads.0.0.weight"], d.heads[0][0].weight * 0)


def test_published_goes_on_with_repaired_gradients() -> None:
    d = _Broken().double()
    d.broken = True
    step = gan_step(d, nonfinite="published")
    assert step.run(reals(0), None, 0).skipped == {"G": 0, "D": 0}
    assert all(t.isfinite().all() for t in everything(step).values())


def test_hinge_and_two_steps_train() -> None:
    step = gan_step(loss="hinge", steps=2, mid_sigma=0.8)
    before = everything(step)
    scalars = run(step, 2)
    assert not torch.equal(everything(step)["average/model.out_conv.weight"],
                           before["average/model.out_conv.weight"])  # fmt: skip
    assert all(value.isfinite() for value in scalars.values())


def test_an_iteration_is_a_function_of_its_number_alone() -> None:
    """Augmentation included; the global generator is neither read nor moved."""
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        network = generator()
        d = diffusion_heads(network, augment=("color", "translation", "cutout"))
        step = PlainStep(network, averaged_copy(network), d, settings(), ALONE)
        run(step, 2)
        found.append(everything(step))
        assert torch.equal(torch.get_rng_state(), state)
    assert_same(*found)
