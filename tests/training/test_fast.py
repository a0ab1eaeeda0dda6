"""engine=fast against the plain step, recorded and replayed iterations included."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgan.common.errors import UserError
from fastgan.training.fast import WARMUP, Replayed
from fastgan.training.state import StepResult
from fastgan.training.step import PlainStep
from tests.training.tape import Tape, TapedStep
from tests.training.toys import assert_same, everything, gan_step, one_hot, reals

AUGMENT = ("color", "translation", "cutout")


def both(iterations: int, first: int = 0, label_dim: int = 0, **changes):
    """Plain and taped steps after the same iterations; asserts that they report the same."""
    plain, taped = (
        gan_step(kind=kind, label_dim=label_dim, augment=AUGMENT, **changes)
        for kind in (PlainStep, TapedStep)
    )
    for k in range(first, first + iterations):
        labels = one_hot(k, label_dim) if label_dim else None
        expected, told = (s.run(reals(k), labels, k) for s in (plain, taped))
        assert told.scalars.keys() == expected.scalars.keys()
        for name, value in expected.scalars.items():
            assert float(value) == float(told.scalars[name]), (k, name)
        assert {n: float(x) for n, x in told.skipped.items()} == dict.fromkeys(told.skipped, 0.0)
    return plain, taped


@pytest.mark.parametrize(
    "changes",
    [
        {"r1_interval": 2},
        {"r1_interval": 2, "label_dim": 3, "share_fakes": True},
        {"batch_gpu": 2, "r1_interval": 3},
        {"decay_from": 0.0, "total_images": 100, "ema_half_life": 50.0, "r1_interval": 0},
        {"loss": "hinge", "steps": 2, "mid_sigma": 0.8},
        {"nonfinite": "published"},
    ],
    ids=["r1", "labels-shared", "rounds", "decay-ramp", "hinge-two-steps", "published"],
)
def test_replays_equal_the_plain_step_bitwise(changes: dict[str, Any]) -> None:
    """Learning rate, EMA's weight, noise and augmentation change from one iteration to the next."""
    plain, taped = both(14, **changes)
    assert_same(everything(plain), everything(taped))
    kinds = 2 if changes.get("r1_interval", 16) in (2, 3) else 1
    assert len(taped.tapes) == kinds and all(t.operations for t in taped.tapes)


def test_an_update_left_out_in_a_replay_changes_nothing() -> None:
    step = gan_step(kind=TapedStep, r1_interval=0)
    for k in range(WARMUP + 2):
        step.run(reals(k), None, k)
    before = everything(step)
    bad = reals(9)
    bad[0, 0, 0, 0] = math.nan
    told = step.run(bad, None, WARMUP + 2).skipped
    assert {n: float(x) for n, x in told.items()} == {"G": 0.0, "D": 1.0}
    after = everything(step)
    d = {n: t for n, t in after.items() if n.startswith(("discriminator/", "optimizer_d/"))}
    assert_same(d, {n: before[n] for n in d})
    assert step.blamed()["discriminator"]
    told = step.run(reals(3), None, WARMUP + 3).skipped
    assert {n: float(x) for n, x in told.items()} == {"G": 0.0, "D": 0.0}


def test_a_state_loaded_after_recording_is_the_one_that_trains() -> None:
    plain, taped = both(6, r1_interval=0)
    state = {n: t.clone() for n, t in plain.state().items()}
    average = {n: t.clone() for n, t in plain.average.state_dict().items()}
    for k in (6, 7):
        plain.run(reals(k), None, k)
        taped.run(reals(k + 50), None, k)
    taped.load_state(state)
    taped.average.load_state_dict(average)
    for k in range(6, 12):
        taped.run(reals(k), None, k)
    for k in range(8, 12):
        plain.run(reals(k), None, k)
    assert_same(everything(plain), everything(taped))


def test_frozen_parameters_stay() -> None:
    step = gan_step(kind=TapedStep)
    frozen = {n: p.clone() for n, p in step.generator.named_parameters() if not p.requires_grad}
    for k in range(8):
        step.run(reals(k), None, k)
    assert frozen
    own = dict(step.generator.named_parameters())
    assert all(torch.equal(own[n], t) for n, t in frozen.items())


def test_a_value_read_on_the_host_cannot_be_recorded() -> None:
    def iteration(x: Tensor) -> StepResult:
        return StepResult({"Loss/G": x * float(x.sum())})

    replayed = Replayed(iteration, Tape)
    for _ in range(WARMUP):
        replayed(torch.ones(2))
    with pytest.raises(UserError, match=r"reads a value on the host\), engine=fast, fast.graphs="):
        replayed(torch.ones(2))


def test_what_a_recording_freezes_is_seen() -> None:
    """The tape is a test's instrument: it must notice numbers and tensors from elsewhere."""
    count = iter(range(100))

    def iteration(x: Tensor) -> StepResult:
        return StepResult({"Loss/G": x + next(count)})

    replayed = Replayed(iteration, Tape)
    values = [replayed(torch.tensor(10.0 * k)).scalars["Loss/G"].item() for k in range(WARMUP + 3)]
    assert values == [0.0, 11.0, 22.0, 33.0, 43.0, 53.0]
