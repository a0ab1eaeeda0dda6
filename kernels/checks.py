"""What a caller got wrong, as one line: WHAT, WHERE, WHAT WOULD BE RIGHT."""

from collections.abc import Sequence

import torch
from torch import Tensor

ALLOWED = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check_float(name: str, value: Tensor) -> None:
    """ValueError unless the dtype is one that the ops compute in."""
    if value.dtype not in ALLOWED:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in ALLOWED)
        raise ValueError(f"{name} is {value.dtype}, one of {allowed} would do")


def check_image(name: str, x: Tensor) -> None:
    """ValueError unless x is a non-empty [N, C, H, W] of an allowed dtype."""
    if x.ndim != 4 or not x.numel():
        raise ValueError(f"{name} has shape {list(x.shape)}, non-empty [N, C, H, W] would do")
    check_float(name, x)


def check_groups(name: str, groups: int, x: Tensor) -> None:
    """ValueError unless the channels of x split into `groups` equal groups."""
    channels = x.shape[1]
    if groups < 1 or channels % groups:
        raise ValueError(f"{name} {groups} does not divide the {channels} channels of x")


def check_tensor(name: str, value: Tensor | None, shape: Sequence[int], like: Tensor) -> None:
    """ValueError unless `value` is None or has `shape` (1 in front is broadcast) beside `like`."""
    if value is None:
        return
    check_float(name, value)
    broadcast = len(shape) > 1 and tuple(value.shape) == (1, *shape[1:])
    if tuple(value.shape) != tuple(shape) and not broadcast:
        raise ValueError(f"{name} has shape {list(value.shape)}, {list(shape)} would fit x")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}, x on {like.device}, one device would do")
