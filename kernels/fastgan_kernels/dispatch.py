"""Which implementation of an op runs: a Triton kernel, a library's, or the plain definition.

Chosen by (op, device, architecture, dtype). `use` (the configuration's `kernels=`) and the
environment variable FASTGAN_KERNELS, which wins, override the choice: one implementation for all
ops that have it (`library`), or one per op (`group_norm_silu=apex,attention=xformers`).
`python -m fastgan_kernels` prints the table with the reasons.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastgan_kernels import runtime
from fastgan_kernels.runtime import FLOATS, dtype_name

IMPLEMENTATIONS: dict[str, tuple[str, ...]] = {
    "group_norm_silu": ("triton", "library", "apex", "reference"),
    "frozen_conv2d": ("library", "reference"),
    "norm_silu_conv": ("tuned", "library", "triton", "reference"),
    "frozen_unet_block": ("triton", "library", "reference"),
    "attention": ("library", "xformers", "reference"),
    "resample2x": ("triton", "library", "reference"),
    "resize_normalize": ("triton", "library", "reference"),
}
"""By op, the best first; `tuned` is triton where that was measured to be faster, else library."""
GENERAL = ("triton", "library", "reference")
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
    wanted, origin = _asked_for(op)
    if wanted == "auto":
        return _automatic(op, device_type, dtype)
    obstacle = _obstacle(op, wanted, device_type, dtype)
    if obstacle:
        raise ValueError(
            f"{op} cannot run as {wanted} ({obstacle}), as {origin} asks, "
            f"{_automatic(op, device_type, dtype).implementation} or auto would"
        )
    return Choice(wanted, f"asked for by {origin}")


def _asked_for(op: str) -> tuple[str, str]:
    """What is asked for this op (`auto` if nothing) and who asks."""
    variable = os.environ.get(VARIABLE)
    setting, origin = (variable, VARIABLE) if variable else (_configured, "kernels")
    per_op = _parse(setting, origin)
    wanted = per_op.get(op, per_op["*"])
    if wanted == "triton" and "triton" not in IMPLEMENTATIONS[op]:
        wanted = "library"
    if wanted == "triton" and "tuned" in IMPLEMENTATIONS[op] and op not in per_op:
        # Who asks for all kernels means those that are known to be faster.
        wanted = "auto"
    return wanted, f"{origin}={setting}"


@cache
def _parse(setting: str, origin: str) -> dict[str, str]:
    """`library` or `op=implementation,...` as {op: implementation}, `*` for the other ops."""
    parsed, where = {"*": "auto"}, f"in {origin}={setting}"
    for entry in setting.split(","):
        op, separator, wanted = entry.strip().rpartition("=")
        if separator and op not in IMPLEMENTATIONS:
            raise ValueError(f"no op {op!r}, {where}, one of {', '.join(IMPLEMENTATIONS)} is")
        allowed = ("auto", *(IMPLEMENTATIONS[op] if separator else GENERAL))
        if wanted not in allowed:
            raise ValueError(f"no {wanted!r}, {where}, one of {', '.join(allowed)} would do")
        parsed[op if separator else "*"] = wanted
    return parsed


def _automatic(op: str, device_type: str, dtype: torch.dtype) -> Choice:
    if device_type in ("cpu", "meta"):
        return Choice("reference", "not on a GPU")
    if dtype not in FLOATS:
        return Choice("reference", f"{dtype_name(dtype)} is for checking")
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
    if implementation in ("apex", "xformers"):
        found = apex_group_norm_class() if implementation == "apex" else xformers_attention()
        if found is None:
            return f"{implementation} is not installed"
        return None if device_type == "cuda" else f"{implementation} needs a CUDA device"
    if implementation not in ("triton", "tuned"):
        return None
    if not runtime.HAS_TRITON:
        return "triton is not installed"
    if dtype not in FLOATS:
        return f"no kernel for {dtype_name(dtype)}, float32, bfloat16 or float16 would do"
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


@cache
def _say_once(message: str) -> None:
    warnings.warn(message, stacklevel=2)


# Imported only when asked for: xformers takes seconds. An apex built against another CUDA fails in
# its own ways, and PyPI's is something else. By name, or torch.compile could not follow.
def apex_group_norm_class() -> type[torch.nn.Module] | None:
    """apex's NHWC group normalisation, or None."""
    try:
        from apex.contrib.group_norm import GroupNorm
    except Exception:
        return None
    return GroupNorm


def xformers_attention() -> Callable[..., Tensor] | None:
    """softmax(q k^T / sqrt(d)) v over [N, pixels, heads, d] by xformers, or None."""
    try:
        from xformers.ops import memory_efficient_attention
    except Exception:
        return None
    return memory_efficient_attention


@cache
def fused_adam() -> type[torch.optim.Optimizer] | None:
    """apex's FusedAdam, or None."""
    try:
        from apex.optimizers import FusedAdam
    except Exception:
        return None
    return FusedAdam
