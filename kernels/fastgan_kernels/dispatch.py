"""Which implementation of an op runs: a Triton kernel, a library's, or the plain definition.

Chosen by (op, device, architecture, dtype). `use` (the configuration's `kernels=`) and the
environment variable FASTGAN_KERNELS, which wins, override the choice: one implementation for all
ops that have it (`library`), or one per op (`group_norm_silu=apex,attention=xformers`).
`python -m fastgan_kernels` prints the table with the reasons.
"""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fastgan_kernels import runtime

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "group_norm_silu": ("triton", "library", "apex", "reference"),
    "frozen_conv2d": ("library", "reference"),
    "norm_silu_conv": ("tuned", "library", "triton", "reference"),
    "frozen_unet_block": ("triton", "library", "reference"),
    "attention": ("library", "xformers", "reference"),
    "resample2x": ("triton", "library", "reference"),
    "resize_normalize": ("triton", "library", "reference"),
}
GENERAL = ("triton", "library", "reference")
# A setting for all ops takes these by Triton only where that was measured to be faster.
MEASURED = ("norm_silu_conv",)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# Every kernel is compiled for these ahead of time; on others nothing was ever tried.
KNOWN_ARCHITECTURES = ((8, 0), (9, 0))
VARIABLE = "FASTGAN_KERNELS"

unmeasured: dict[str, Callable[[], str | None]] = {}
"""By `tuned` op: why nothing was measured on this GPU, or None; the op registers it."""


@dataclass(frozen=True)
class Choice:
    """An implementation's name and why it was taken."""

    implementation: str
    reason: str


_configured = "auto"
_twice = 0


def use(setting: str) -> None:
    """Sets the implementation for this process; ValueError naming what `setting` gets wrong."""
    global _configured
    _parse(setting, "kernels")
    _configured = setting


@contextmanager
def twice_differentiable() -> Iterator[None]:
    """Inside, every op takes its plain definition, which autograd can differentiate twice (R1)."""
    global _twice
    _twice += 1
    try:
        yield
    finally:
        _twice -= 1


def implementation(op: str, device_type: str, dtype: torch.dtype) -> str:
    """The name of the implementation for tensors of `dtype` on a device of this type.

    A constant of the graph for torch.compile, which compiles again when `use` changes the setting
    or R1 begins or ends (it guards on the globals read here), not when the environment changes.
    """
    return "reference" if _twice else _chosen(op, device_type, dtype, _configured)


@torch.compiler.assume_constant_result
def _chosen(op: str, device_type: str, dtype: torch.dtype, configured: str) -> str:
    return choose(op, device_type, dtype).implementation


def choose(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    """The implementation of `op` and the reason; ValueError where a forced one cannot run."""
    if _twice:
        return Choice("reference", "R1 differentiates twice")
    forced, origin = _forced(op)
    if forced == "auto":
        return _automatic(op, device_type, dtype)
    obstacle = _obstacle(op, forced, device_type, dtype)
    if obstacle:
        raise ValueError(
            f"{op} cannot run as {forced} ({obstacle}), as {origin} asks, "
            f"{_automatic(op, device_type, dtype).implementation} or auto would"
        )
    return Choice(forced, f"asked for by {origin}")


def _automatic(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    if device_type in ("cpu", "meta"):
        return Choice("reference", "not on a GPU")
    if dtype not in FLOATS:
        return Choice("reference", f"{_name(dtype)} is for checking")
    best = IMPLEMENTATIONS[op][0]
    obstacle = _obstacle(op, best, device_type, dtype)
    if obstacle:
        if best == "triton":
            _say_once(f"{op} runs as library: {obstacle}")
        return Choice("library", obstacle)
    by_shape = "kernel or library, whichever was measured to be faster for a shape"
    return Choice(best, by_shape if best == "tuned" else "first of those that can run here")


def _obstacle(op: str, implementation: str, device_type: str, dtype: torch.dtype) -> str | None:
    """Why `implementation` cannot run, or None."""
    if implementation == "reference":
        return None
    if implementation in ("apex", "xformers"):
        return obstacle(implementation, device_type)
    if implementation not in ("triton", "tuned"):
        return None
    if not runtime.HAS_TRITON:
        return "triton is not installed"
    if dtype not in FLOATS:
        return f"no kernel for {_name(dtype)}, float32, bfloat16 or float16 would do"
    if device_type == "cpu":
        return None if runtime.INTERPRETED else "CPU tensors need TRITON_INTERPRET=1"
    if runtime.INTERPRETED:
        return "TRITON_INTERPRET=1 is set"
    unknown = unknown_architecture(device_type)
    return unknown or (unmeasured[op]() if implementation == "tuned" else None)


@cache
def unknown_architecture(device_type: str) -> str | None:
    """Why this GPU is not one that the kernels were made for, or None."""
    if device_type != "cuda" or torch.version.hip:
        return "the kernels were never tried on this kind of GPU"
    capability = torch.cuda.get_device_capability()
    if capability in KNOWN_ARCHITECTURES:
        return None
    return f"the kernels were never tried on sm_{capability[0]}{capability[1]}"


def _forced(op: str) -> tuple[str, str]:
    """What is asked for this op (`auto` if nothing) and who asks."""
    variable = os.environ.get(VARIABLE)
    setting, origin = (variable, VARIABLE) if variable else (_configured, "kernels")
    per_op = _parse(setting, origin)
    wanted = per_op.get(op, per_op["*"])
    if wanted == "triton" and "triton" not in IMPLEMENTATIONS[op]:
        wanted = "library"
    if wanted == "triton" and op in MEASURED and op not in per_op:
        wanted = "auto"
    return wanted, f"{origin}={setting}"


@cache
def _parse(setting: str, origin: str) -> dict[str, str]:
    """`library` or `op=implementation,...` as {op: implementation}, `*` for the other ops."""
    parsed = {"*": "auto"}
    for entry in setting.split(","):
        op, separator, wanted = entry.strip().rpartition("=")
        allowed = IMPLEMENTATIONS.get(op, ()) if separator else GENERAL
        where = f"in {origin}={setting}"
        if separator and not allowed:
            raise ValueError(f"no op {op!r}, {where}, one of {_list(IMPLEMENTATIONS)} is")
        if wanted not in ("auto", *allowed):
            raise ValueError(f"no {wanted!r}, {where}, one of {_list(('auto', *allowed))} would do")
        parsed[op if separator else "*"] = wanted
    return parsed


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def obstacle(name: str, device_type: str) -> str | None:
    """Why the library `name` cannot run on such a device, or None."""
    present = {"apex": apex_group_norm_class, "xformers": _xformers_function}[name]() is not None
    if not present:
        return f"{name} is not installed"
    return None if device_type == "cuda" else f"{name} needs a CUDA device"


@cache
def apex_group_norm_class() -> type[torch.nn.Module] | None:
    """apex's NHWC group normalisation, or None."""
    try:
        from apex.contrib.group_norm import GroupNorm
    except Exception:
        return None
    return GroupNorm


@cache
def fused_adam() -> type[torch.optim.Optimizer] | None:
    """apex's FusedAdam, or None."""
    try:
        from apex.optimizers import FusedAdam
    except Exception:
        return None
    return FusedAdam


@cache
def _xformers_function() -> Callable[..., Tensor] | None:
    # Imported only when asked for: it takes seconds.
    try:
        from xformers.ops import memory_efficient_attention
    except Exception:
        return None
    return memory_efficient_attention


@cache
def _apex_module(channels: int, groups: int, eps: float, act: bool) -> Any:
    make = apex_group_norm_class()
    assert make is not None
    return make(groups, channels, eps=eps, affine=True, act="silu" if act else "")


def apex_group_norm(
    x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, act: bool
) -> Tensor:
    """GroupNorm, then SiLU if `act`, by apex; x [N, C, H, W] channels_last on CUDA."""
    channels = x.shape[1]
    parameters = {
        "weight": x.new_ones(channels) if weight is None else weight,
        "bias": x.new_zeros(channels) if bias is None else bias,
    }
    module = _apex_module(channels, num_groups, eps, act)
    return torch.func.functional_call(module, parameters, (x,))


def xformers_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over [N, pixels, heads, d] by xformers."""
    run = _xformers_function()
    assert run is not None
    return run(q, k, v)
