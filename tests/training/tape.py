"""What a CUDA graph does to an iteration, on the CPU: operations on fixed tensors, done again.

A replay calls the recorded operators with the recorded tensors and Python numbers; what a function
reads from anywhere else, or leaves in a new tensor for the next iteration, is lost, as it would be
on a GPU. Reading a value on the host is refused, as a capturing stream refuses it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from fastgan.training.fast import FastStep, Graph
from fastgan.training.state import StepResult

_READS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
}


class Tape(TorchDispatchMode):
    """Records every operator below autograd; as a Graph, recording is its own first replay."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, Any]] = []
        self._recorded_now = False

    def record(self, function: Callable[[], StepResult]) -> StepResult:
        with self:
            result = function()
        self._recorded_now = True
        return result

    @torch.no_grad()
    def replay(self) -> None:
        if self._recorded_now:
            self._recorded_now = False
            return
        for operator, args, kwargs, out in self.operations:
            again = operator(*args, **kwargs)
            for work in (x for x in tree_flatten(again)[0] if hasattr(x, "wait")):
                work.wait()
            if not operator._schema.is_mutable:
                _refill(out, again)

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if operator in _READS:
            raise RuntimeError(f"{operator} reads a value on the host")
        held = tree_map(_held, (args, kwargs))
        out = operator(*args, **kwargs)
        self.operations.append((operator, *held, tree_map(_held, out)))
        return out


def _held(value: Any) -> Any:
    """The same memory in the shape that it has now: `unsqueeze_` and its like change a tensor's."""
    return torch.ops.aten.alias.default(value) if isinstance(value, Tensor) else value


def _refill(out: Any, again: Any) -> None:
    """Puts new values where the recorded results lie; views show their base's already."""
    for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
        if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
            old.copy_(new)


class TapedStep(FastStep):
    """A FastStep recorded on tapes: uncompiled, since a tape does not see into compiled code."""

    def _can_record(self) -> bool:
        return True

    def _make_graph(self) -> Graph:
        tape = Tape()
        self.tapes = [*getattr(self, "tapes", []), tape]
        return tape

    def _compile(self, function: Any) -> Any:
        return function

    def _rehearse(self, reals: Tensor, labels: Tensor | None) -> None:
        """There is no cache to fill."""
