"""The GAN step on Triton kernels: the same losses as on the plain definitions, R1 included."""

import pytest
import torch
from fastgan_kernels import dispatch, runtime

from fastgan.training.fast import WARMUP
from fastgan.training.step import PlainStep
from tests.training.tape import TapedStep
from tests.training.toys import gan_step, generator, reals


def losses(
    monkeypatch: pytest.MonkeyPatch,
    setting: str,
    kind: type[PlainStep] = PlainStep,
    iterations: int = 1,
) -> tuple[list[float], PlainStep]:
    """R1 in all iterations; the heads read a frozen copy of the network."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_configured", setting)
    step = gan_step(kind=kind, dtype=torch.float32, batch=2, batch_gpu=2, r1_interval=1)
    found: list[float] = []
    for iteration in range(1, 1 + iterations):
        result = step.run(reals(iteration, 2, torch.float32), None, iteration)
        assert not any(result.skipped.values())
        found += [float(value) for value in result.scalars.values()]
    return found, step


@pytest.mark.skipif(not runtime.INTERPRETED, reason="the toy networks live on the CPU")
def test_losses_equal_those_of_the_definitions(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: p.clone() for name, p in generator(dtype=torch.float32).named_parameters()}
    plain, _ = losses(monkeypatch, "reference")
    ours, step = losses(monkeypatch, "triton")
    assert len(ours) == 6 and ours == pytest.approx(plain, rel=1e-4)
    frozen = {n: p for n, p in step.generator.named_parameters() if not p.requires_grad}
    assert len(frozen) > 10
    assert all(torch.equal(p, before[n]) for n, p in frozen.items())


@pytest.mark.slow
@pytest.mark.skipif(not runtime.INTERPRETED, reason="the toy networks live on the CPU")
def test_recorded_kernels_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Iterations 4 and 5 are the recording, which is its own first replay, and a replay."""
    iterations = WARMUP + 3
    plain, _ = losses(monkeypatch, "reference", iterations=iterations)
    ours, step = losses(monkeypatch, "triton", TapedStep, iterations)
    assert ours == pytest.approx(plain, rel=1e-4) and len(ours) == 6 * iterations
    recorded = {str(operator) for tape in step.tapes for operator, *_ in tape.operations}
    assert any("frozen_unet_block" in name for name in recorded), recorded
