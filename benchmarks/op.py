"""An op with its candidates: made, compared with float64, and only then timed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from oracle import assert_as_accurate
from torch import Tensor

from benchmarks.cases import DIRECTIONS, Case, published, tiny
from benchmarks.measure import DEVICE, DTYPE, ON_GPU

Inputs = dict[str, Any]
"""Tensors by argument name."""
Function = Callable[[Case, Inputs], Tensor]


@dataclass(frozen=True, eq=False)
class Op:
    """How to measure one op.

    inputs: its arguments by name, `x` first, those whose gradients a D2O-F fine-tune computes with
    requires_grad; candidates: what may run it, plain PyTorch as `eager`; exact: the definition,
    which gets float64; parts: (bytes, FLOP) of our kernels in one direction, one after the other.
    largest: whether the largest error is compared too (behind many roundings it is luck).
    """

    name: str
    inputs: Callable[[Case, Callable[..., Tensor]], Inputs]
    candidates: Mapping[str, Function]
    exact: Function
    parts: Callable[[Case, str], Sequence[tuple[float, float]]]
    largest: bool = True
    directions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def cases(self) -> list[Case]:
        cases = published(self.name)
        return cases if ON_GPU else tiny(cases)

    @property
    def runs(self) -> list[tuple[str, str]]:
        """(candidate, direction), a candidate's directions in a row: it compiles once."""
        names = ["eager", "compile", *(name for name in self.candidates if name != "eager")]
        return [(n, d) for n in names for d in self.directions.get(n, DIRECTIONS)]


def make(op: Op, case: Case) -> Inputs:
    """The same numbers for every candidate."""
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
        value = torch.randn(size, generator=generator, device=DEVICE) * std
        value = value.to(dtype)
        return value.to(memory_format=torch.channels_last) if len(size) == 4 else value

    return op.inputs(case, normal)


def incoming(y: Tensor) -> Tensor:
    """A gradient that arrives at y."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, device=DEVICE)
    return dy.to(y.dtype).to(memory_format=torch.channels_last)


def results(function: Callable[[Inputs], Tensor], inputs: Inputs, dy: Tensor | None) -> Inputs:
    """The output and the gradients that are asked for, by name."""
    wanted = {name: value for name, value in inputs.items() if value.requires_grad}
    y = function(inputs)
    dy = incoming(y) if dy is None else dy.to(y.dtype)
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    found = {f"grad {name}": g for name, g in zip(wanted, gradients, strict=True)}
    return {"y": y.detach(), **found}


@lru_cache(maxsize=1)
def truth(op: Op, case: Case) -> tuple[Inputs, Inputs, Tensor]:
    """What plain PyTorch finds, what is right, and the incoming gradient of both."""
    inputs = make(op, case)
    double = {k: v.detach().double().requires_grad_(v.requires_grad) for k, v in inputs.items()}
    plain = results(partial(op.candidates["eager"], case), inputs, None)
    dy = incoming(plain["y"])
    return plain, results(partial(op.exact, case), double, dy), dy


@lru_cache(maxsize=1)
def accurate(op: Op, case: Case, candidate: str) -> Callable[[Inputs], Tensor]:
    """The candidate, compiled if it is `compile`; AssertionError if it is not accurate."""
    function: Callable[[Inputs], Tensor]
    function = partial(op.candidates["eager" if candidate == "compile" else candidate], case)
    if candidate == "compile":
        torch._dynamo.reset()
        backend = "inductor" if ON_GPU else "aot_eager"
        function = torch.compile(function, backend=backend, fullgraph=True, dynamic=False)
    plain, exact, dy = truth(op, case)
    found = results(function, make(op, case), dy)
    assert_as_accurate(found, plain, exact, largest=op.largest)
    return function


def calls(
    function: Callable[[Inputs], Tensor], inputs: Inputs, dy: Tensor, direction: str, count: int
) -> list[Callable[[], object]]:
    """`count` calls with an x and a dy each; parameters are shared, as they are in training."""
    sets = [inputs | {"x": _leaf(inputs["x"])} for _ in range(count)]
    if direction == "forward":
        return [partial(function, each) for each in sets]
    return [_backward(function(each), each, dy.clone()) for each in sets]


def _backward(y: Tensor, inputs: Inputs, dy: Tensor) -> Callable[[], object]:
    wanted = [value for value in inputs.values() if value.requires_grad]
    return lambda: torch.autograd.grad(y, wanted, dy, retain_graph=True)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_(x.requires_grad)
