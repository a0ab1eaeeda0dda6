"""What the loop adds up between two ticks, and what of it tells that a run goes wrong."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.training.losses import diversity
from fastgan.training.monitor import Averages, Health, Skips

CPU = torch.device("cpu")


class Operators(TorchDispatchMode):
    """Names of the operators called within."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Any] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        self.found.append(operator)
        return operator(*args, **(kwargs or {}))


def scalars(g: float, r1: float | None = None) -> dict[str, Tensor]:
    found = {"Loss/G": g} | ({} if r1 is None else {"Loss/R1": r1})
    return {name: torch.tensor(value) for name, value in found.items()}


def test_means_are_of_the_iterations_that_had_a_value() -> None:
    averages = Averages()
    for one in (scalars(1.0), scalars(2.0, 10.0), scalars(6.0, 20.0)):
        averages.add(one)
    assert averages.take() == {"Loss/G": 3.0, "Loss/R1": 15.0}
    averages.add(scalars(5.0))
    assert averages.take() == {"Loss/G": 5.0}
    assert averages.take() == {}


def test_a_recording_may_give_the_same_tensors_again() -> None:
    averages, result = Averages(), scalars(1.0)
    for value in (1.0, 3.0):
        result["Loss/G"].fill_(value)
        averages.add(result)
    assert averages.take() == {"Loss/G": 2.0} and result["Loss/G"] == 3.0


def test_between_ticks_nothing_is_allocated_or_read() -> None:
    averages, skips = Averages(), Skips(CPU)
    flags = {name: torch.zeros(()) for name in ("G", "D", "R1")}
    averages.add(scalars(1.0, 2.0))
    skips.add(flags)
    averages.take()
    skips.take()
    again = scalars(1.0, 2.0)
    with Operators() as operators:
        averages.add(again)
        skips.add(flags)
    assert 0 < len(operators.found) <= 12
    # What writes into its arguments makes no tensor; reading a value writes nowhere.
    assert all(operator._schema.is_mutable for operator in operators.found)


FINE = {"Loss/sign_real": 0.6, "Loss/sign_fake": -0.5, "Loss/diversity": 0.9}


def flags(*left_out: int) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(float(f)) for name, f in zip("GDR", left_out, strict=False)}


def test_skips_are_counted_by_update_and_forgotten_once_told() -> None:
    skips = Skips(torch.device("cpu"))
    for step in (flags(1, 0), flags(0, 0), flags(1, 1), flags(0, 0, 1)):
        skips.add(step)
    assert skips.take() == {"G": 2, "D": 1, "R": 1}
    assert skips.take() == {}


def test_the_longest_row_is_kept() -> None:
    """An iteration counts once, however many of its updates were left out; takes do not matter."""
    skips = Skips(torch.device("cpu"))
    assert skips.longest() == 0
    for k, step in enumerate([(1, 1), (0, 1), (1, 0), (0, 0), (1, 0), (0, 1)]):
        skips.add(flags(*step))
        if k == 1:
            skips.take()
    assert skips.longest() == 3


def test_a_sure_discriminator() -> None:
    health = Health()
    assert health.warnings(FINE) == []
    sure = FINE | {"Loss/sign_real": 0.99, "Loss/sign_fake": -0.995}
    (line,) = health.warnings(sure)
    assert "0.99 and -0.99" in line or "0.99 and -1.00" in line
    assert "optim.lr_d" in line and "\n" not in line
    # Sure of one kind only: it answers the same to everything.
    assert health.warnings(FINE | {"Loss/sign_real": 1.0, "Loss/sign_fake": 1.0}) == []


def test_collapse_is_said_again_only_after_it_was_better() -> None:
    health, collapsed = Health(), FINE | {"Loss/diversity": 0.05}
    said = [len(health.warnings(m)) for m in (collapsed, collapsed, FINE, collapsed)]
    assert said == [1, 0, 0, 1]


def test_pretraining_reports_neither() -> None:
    assert Health().warnings({"Loss/denoising": 3.0}) == []


def test_diversity() -> None:
    draw = torch.Generator().manual_seed(0)
    reals = torch.randn(64, 3, 4, 4, generator=draw)
    assert diversity(reals, reals) == 1
    torch.testing.assert_close(diversity(0.5 * reals + 3, reals), torch.tensor(0.5))
    # The same images for every sample, however contrasty each is.
    assert diversity(reals[:1].expand(64, -1, -1, -1), reals) == 0
