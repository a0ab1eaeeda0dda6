"""What the loop adds up between two ticks, and that it costs the device nothing but additions."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastgan.training.monitor import Averages, Skips

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
