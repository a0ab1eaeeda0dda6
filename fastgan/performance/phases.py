"""Named ranges around the parts of a step, so that a profile can tell them apart.

They are put there from outside and only while a profile runs: training code stays as it is. What a
compiled graph calls inside itself has no range; another `forward` there would only recompile it.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch.profiler import record_function

from fastgan.discriminator.base import Discriminator
from fastgan.training import step as step_module
from fastgan.training.step import PlainStep

PREFIX = "phase/"
"""How the ranges' names begin in a trace, in front of `generator`, `backbone`, ..."""
DISCRIMINATOR = frozenset({"discriminator", "backbone", "mixing", "heads"})


@contextmanager
def marked_phases(step: PlainStep) -> Iterator[frozenset[str]]:
    """Inside, the parts of `step` run in ranges; gives the names of the phases marked.

    generator; discriminator, and in the plain engine's backbone, mixing (with a ViT's reassembly)
    and heads; optimiser (averaging and checking gradients included); ema.
    """
    calls: list[tuple[str, Any, str]] = [
        ("generator", step, "_generate"),
        ("discriminator", step, "_encode"),
        ("discriminator", step, "_judge"),
        ("discriminator", step.discriminator, "forward"),
        ("ema", step_module, "update_ema"),
    ]
    calls += [("optimiser", c, "__call__") for c in {type(step.update_g), type(step.update_d)}]
    if type(step) is PlainStep:
        calls += _inside(step.discriminator)
    with ExitStack() as stack:
        for phase, owner, name in calls:
            stack.enter_context(_replaced(owner, name, _in_range(phase, getattr(owner, name))))
        yield frozenset(phase for phase, _, _ in calls)


def _inside(discriminator: Discriminator) -> Iterator[tuple[str, Any, str]]:
    if hasattr(discriminator, "network"):  # whose encoder gives the diffusion features
        yield "backbone", discriminator.network, "features"
    for backbone in getattr(discriminator, "backbones", ()):
        yield "backbone", backbone, "forward"
        yield from (("mixing", layer, "forward") for layer in backbone.reassembly)
    for projection in getattr(discriminator, "projections", ()):
        yield "mixing", projection, "forward"
    for heads in discriminator.heads:
        yield "heads", heads, "forward"


def _in_range(phase: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def marked(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + phase):
            return call(*args, **kwargs)

    return marked


@contextmanager
def _replaced(owner: Any, name: str, value: object) -> Iterator[None]:
    own = vars(owner).get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)
