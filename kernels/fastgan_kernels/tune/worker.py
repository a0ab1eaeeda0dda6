"""One measurement of `python -m fastgan_kernels.tune`: a plan beside the library's.

The op as a block calls it: its first convolution has no bias, which the second norm adds. But it
stands alone: a kernel is not given the moments that the one in front of it could have summed up,
and sums up none for the one behind.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastgan_kernels.norm_silu.device import Gradients
from fastgan_kernels.norm_silu_conv.launch import norm_silu_conv_backward, norm_silu_conv_forward
from fastgan_kernels.norm_silu_conv.plans import LIBRARY, Plan
from fastgan_kernels.norm_silu_conv.sums import Affine
from fastgan_kernels.norm_silu_conv.table import SHORT
from fastgan_kernels.tune.jobs import Case
from fastgan_kernels.tune.timing import DEVICE, Rotation, copies, medians, one_stream

DTYPES = {name: dtype for dtype, name in SHORT.items()}
INDUCTOR = "inductor"
Candidate = Plan | str
"""A plan, or INDUCTOR: what one would write in PyTorch, compiled."""
EPS = 1e-5
# What may lie between a result and the library's, in units of the dtype's eps of a size: up to four
# roundings of eps / 2, forward three of the library's (convolution, bias, join) and one of the
# kernel's, backward two of each (ds or dz, and dx). Roundings of what is summed over 9 C products
# or over pixels, and tanh.approx's 2^-11, average out to less than one more. That is 2.5 at most.
# As root mean squares a rounding is 0.29 and four are 0.6; up to twice that where dx is a small
# difference, or where a compiler leaves more roundings in (1.3 without any fusion).
TOLERANCES: tuple[tuple[str, Callable[[Tensor], Tensor], float], ...] = (
    ("largest value", lambda v: v.abs().max(), 3.0),
    ("root mean square", lambda v: v.square().mean().sqrt(), 2.0),
)


@dataclass(frozen=True)
class Timing:
    """Medians of ROUNDS rounds, in microseconds a call, and those of the library in between."""

    us: float
    library_us: float


@dataclass(frozen=True)
class Inputs:
    """x and dy [N, C, H, W], `statistics` of x; one weight and embedding serves all calls."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    after: Affine
    residual: Tensor | None
    dy: Tensor
    statistics: Tensor

    def copy(self) -> "Inputs":
        """With images of its own."""
        residual = None if self.residual is None else self.residual.clone()
        shared = self.weight, self.bias, self.after
        return Inputs(self.x.clone(), *shared, residual, self.dy.clone(), self.statistics)


def measure(case: Case, candidate: Candidate) -> Timing:
    """ValueError where the candidate's results are not the library's; whatever its kernel raises.

    Results are compared before the timing, with memory that no kernel wrote read as NaN, and again
    after it, so that a race has had its chance.
    """
    torch.backends.cudnn.benchmark = True
    with one_stream(), _compiling_often():
        bench = _bench(case)
        if candidate == LIBRARY:
            (us,) = medians([bench.library])
            return Timing(us, us)
        calls = [_call(case, inputs, candidate) for inputs in bench.inputs]
        if candidate != INDUCTOR:  # which would compile once more for a changed setting
            with _poisoned():
                bench.check(calls[0]())
        rotation = Rotation(calls)
        timing = Timing(*medians([rotation, bench.library]))
        bench.check(rotation.outputs[-1])
    return timing


class Bench:
    """What all candidates of a case share: the inputs, the library's results and its calls."""

    def __init__(self, case: Case) -> None:
        self.case = case
        first = inputs_of(case)
        moved = first.x.nbytes + first.dy.nbytes * (1 if first.residual is None else 2)
        self.inputs = [first, *(first.copy() for _ in range(copies(moved) - 1))]
        self.library = Rotation([_call(case, inputs, LIBRARY) for inputs in self.inputs])
        self.expected = named(case, _call(case, first, LIBRARY)())

    def check(self, result: Any) -> None:
        found, eps = named(self.case, result), torch.finfo(DTYPES[self.case.dtype]).eps
        wrong = disagreement(found, self.expected, eps)
        if wrong:
            raise ValueError(wrong)


@lru_cache(maxsize=1)
def _bench(case: Case) -> Bench:
    return Bench(case)


def inputs_of(case: Case) -> Inputs:
    """The same numbers in every process; the norm's parameters are float32, as in training."""
    s, n, dtype = case.shape, case.batch, DTYPES[case.dtype]
    generator = torch.Generator(DEVICE).manual_seed(0)

    def normal(*size: int, std: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        value = (torch.randn(size, generator=generator, device=DEVICE) * std).to(dtype)
        return value.to(memory_format=torch.channels_last) if len(size) == 4 else value

    x = normal(n, s.cin, s.height, s.width, std=2) + 0.5
    weight = normal(s.cout, s.cin, s.kernel, s.kernel, std=(s.kernel**2 * s.cin) ** -0.5)
    bias = normal(s.cout) if case.embedding else None
    dy = normal(n, s.cout, s.height, s.width)
    affine = (normal(s.cin, std=0.3, dtype=torch.float32) + centre for centre in (1, 0))
    rows = {name: normal(n, s.cin, std=0.5) for name in case.embedding.split()}
    after = Affine(*affine, **rows)
    residual = normal(n, s.cout, s.height, s.width) if case.embedding else None
    _, statistics, _ = norm_silu_conv_forward(
        *(x, case.groups, weight, bias, EPS, after, residual, case.gain)
    )
    return Inputs(x, weight, bias, after, residual, dy, statistics)


def _call(case: Case, i: Inputs, candidate: Candidate) -> Callable[[], Any]:
    if not isinstance(candidate, Plan):
        return _inductor_call(case, i)
    plan = candidate
    if case.direction == "forward":
        arguments = (i.x, case.groups, i.weight, i.bias, EPS, i.after, i.residual, case.gain)
        return lambda: norm_silu_conv_forward(*arguments, plan)[0]
    wanted = frozenset({"x", "affine", *case.embedding.split()})
    saved = (i.x, i.statistics, case.groups, i.weight, i.after, case.gain, wanted)
    return lambda: norm_silu_conv_backward(i.dy, *saved, plan)


def named(case: Case, result: Any) -> dict[str, Tensor]:
    """y, or the gradients that a block asks for, of a plan's or of Inductor's call."""
    if case.direction == "forward":
        return {"y": result.detach()}
    names = ["x", "affine", *case.embedding.split()]
    if isinstance(result, Gradients):
        return {name: getattr(result, name) for name in names}
    dx, of_weight, of_bias, *rows = result
    return dict(zip(names, (dx, torch.stack((of_weight, of_bias)), *rows), strict=True))


def disagreement(found: dict[str, Tensor], expected: dict[str, Tensor], eps: float) -> str | None:
    """The first result that differs from what is expected by more than TOLERANCES, or None."""
    for name, right in expected.items():
        right = right.float()
        error = found[name].float() - right
        for size, of, allowed in TOLERANCES:
            off = float(of(error) / of(right))
            if not off <= allowed * eps:  # as NaN is not
                return f"{name} is off by {off:.2g} of its {size}, more than {allowed * eps:.2g}"
    return None


def definition(
    x: Tensor,
    groups: int,
    after: Affine,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    gain: float,
) -> Tensor:
    """What one would write in PyTorch, in x's dtype."""
    if after.pre_shift is not None:
        x = x + after.pre_shift[:, :, None, None]
    assert after.weight is not None and after.bias is not None
    z = F.group_norm(x, groups, after.weight.to(x.dtype), after.bias.to(x.dtype), EPS)
    if after.scale is not None and after.shift is not None:
        z = torch.addcmul(after.shift[:, :, None, None], z, 1 + after.scale[:, :, None, None])
    y = F.conv2d(F.silu(z), weight, bias, padding=weight.shape[-1] // 2)
    return y if residual is None else (y + residual) * gain


@cache
def _compiled() -> Callable[..., Tensor]:
    """Both directions of a case share a compilation."""
    backend = "inductor" if DEVICE == "cuda" else "aot_eager"
    return torch.compile(definition, backend=backend, fullgraph=True, dynamic=False)


@contextmanager
def _compiling_often() -> Iterator[None]:
    """Inside, a function is compiled for more shapes than PyTorch expects, and a compiled backward
    may run a second time on the same forward."""
    with (
        torch._dynamo.config.patch(recompile_limit=1000),
        torch._functorch.config.patch(donated_buffer=False),
    ):
        yield


def _inductor_call(case: Case, i: Inputs) -> Callable[[], Any]:
    """Of leaves of its own, as autograd would otherwise join all calls."""
    leaves = [v.detach().requires_grad_() for v in (i.x, *i.after.tensors) if v is not None]
    after = Affine(*leaves[1:3], **dict(zip(case.embedding.split(), leaves[3:], strict=True)))
    arguments = (leaves[0], case.groups, after, i.weight, i.bias, i.residual, case.gain)
    if case.direction == "forward":
        return lambda: _compiled()(*arguments)
    y = _compiled()(*arguments)
    return lambda: torch.autograd.grad(y, leaves, i.dy, retain_graph=True)


@contextmanager
def _poisoned() -> Iterator[None]:
    """Inside, new memory reads as NaN, and not as the library's results that lay there."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
