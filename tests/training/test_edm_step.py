"""EDM pre-training: one iteration written out, dropout, the learning rate's shape."""

import pytest
import torch

from fastgan.common.noise import normal, stream
from fastgan.training.edm_step import EdmStep, warmup_then_cosine
from tests.training.toys import SHAPE, assert_same, edm_step, everything, reals


def run(step: EdmStep, iterations: int) -> list[float]:
    return [step.run(reals(k), None, k).scalars["Loss/denoising"].item() for k in range(iterations)]


def test_iterations_equal_edm_written_out() -> None:
    step = edm_step()
    told = run(step, 3)
    network = edm_step().generator
    adam = torch.optim.Adam(network.parameters(), lr=1e-3, betas=(0.9, 0.999), eps=1e-8)
    for k in range(3):
        draw = stream(3, "edm", k)
        sigma = (-1.2 + 1.2 * normal(draw, 4, dtype=torch.float64)).exp()
        noise = normal(draw, 4, *SHAPE, dtype=torch.float64)
        noisy = reals(k) + sigma.reshape(4, 1, 1, 1) * noise
        error = (network(noisy, sigma) - reals(k)).square().sum((1, 2, 3))
        loss = ((sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        assert told[k] == pytest.approx(loss.item(), rel=1e-9)
    expected = {n: p.detach() for n, p in network.named_parameters()}
    assert_same({n: p.detach() for n, p in step.generator.named_parameters()}, expected, atol=1e-10)


def test_rounds_are_one_batch() -> None:
    whole, split = edm_step(batch_gpu=4), edm_step(batch_gpu=1)
    assert run(whole, 3) == pytest.approx(run(split, 3), rel=1e-10)
    assert_same(everything(whole), everything(split), atol=1e-10)


def test_dropout_is_drawn_by_iteration_and_the_global_generator_stays() -> None:
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        state = torch.get_rng_state()
        step = edm_step(dropout=0.3)
        found.append(run(step, 2))
        assert torch.equal(torch.get_rng_state(), state)
    assert found[0] == found[1] != run(edm_step(), 2)


def test_learning_rate() -> None:
    constant = warmup_then_cosine(100, 1000, cosine=False)
    assert [constant(n) for n in (0, 50, 100, 900)] == [0, 0.5, 1, 1]
    cosine = warmup_then_cosine(0, 1000, cosine=True)
    assert [cosine(n) for n in (0, 500, 1000, 2000)] == pytest.approx([1, 0.5, 0, 0], abs=1e-15)


def test_the_learning_rate_is_used() -> None:
    step = edm_step(lr_factor=warmup_then_cosine(100, 1000, cosine=False))
    before = {n: p.clone() for n, p in step.generator.named_parameters()}
    run(step, 1)
    assert all(torch.equal(p, before[n]) for n, p in step.generator.named_parameters())
    step.run(reals(1), None, 1)
    assert not all(torch.equal(p, before[n]) for n, p in step.generator.named_parameters())
