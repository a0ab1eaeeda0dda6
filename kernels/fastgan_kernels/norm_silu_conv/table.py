"""Which plan norm_silu_conv runs by, where `python -m fastgan_kernels.tune` measured.

sm_90.json and its like in the user's cache hold, for each shape, dtype and direction, the fastest
Triton plan and whether it beat the library there. Without a file, or for a shape that is not in it,
the library runs. A convolution's speed hardly depends on the batch once it fills the GPU: it is no
key.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgan_kernels import dispatch
from fastgan_kernels.norm_silu_conv.plans import (
    LIBRARY,
    Architecture,
    Direction,
    Plan,
    Shape,
    candidates,
    fitted,
)

OP = "norm_silu_conv"
SHORT = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
FOLDER = Path(CACHE, "fastgan", "tuned")
Key = tuple[Shape, str, Direction]


@dataclass(frozen=True)
class Entry:
    """The fastest plan of a shape that is not the library's, and the microseconds of both.

    dtype: bf16, fp16 or fp32; batch: images that it was measured with.
    """

    shape: Shape
    dtype: str
    direction: Direction
    batch: int
    plan: Plan
    us: float
    library_us: float

    @property
    def key(self) -> Key:
        return self.shape, self.dtype, self.direction

    @property
    def wins(self) -> bool:
        return self.us < self.library_us


def path(architecture: Architecture) -> Path:
    """The file of a GPU's architecture; it need not exist."""
    return FOLDER / f"sm_{architecture[0]}{architecture[1]}.json"


def write(file: Path, header: dict[str, Any], entries: Iterable[Entry]) -> None:
    """Replaces the table; `header` says of what machine it is and how it was made."""
    aside = file.with_suffix(".part")
    content = {**header, "entries": [asdict(entry) for entry in entries]}
    aside.write_text(json.dumps(content, indent=1) + "\n")
    aside.replace(file)


def read(file: Path) -> dict[Key, Entry]:
    """The table's entries; none where there is no file. ValueError where it is not one."""
    if not file.is_file():
        return {}
    try:
        rows = json.loads(file.read_text())["entries"]
        entries = [
            Entry(**row | {"shape": Shape(**row["shape"]), "plan": Plan(**row["plan"])})
            for row in rows
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"not a table of plans ({error}), {file}, python -m fastgan_kernels.tune would make one"
        ) from None
    return {entry.key: entry for entry in entries}


@cache
def table(architecture: Architecture) -> dict[Key, Entry]:
    """The table of a GPU's architecture, read once."""
    return read(path(architecture))


def plan_for(direction: Direction, x: Tensor, shape: Shape) -> Plan:
    """The plan for a convolution of x's dtype and device, as dispatch and the table say."""
    chosen = dispatch.implementation(OP, x.device.type, x.dtype)
    if chosen not in ("tuned", "triton"):
        return LIBRARY
    architecture = capability(x.device)
    entry = table(architecture).get((shape, SHORT[x.dtype], direction))
    if chosen == "tuned":
        return fitted(entry.plan, direction, shape) if entry and entry.wins else LIBRARY
    if entry:
        return fitted(entry.plan, direction, shape)
    return next(candidates(architecture, x.dtype, direction, shape))


@cache
def capability(device: torch.device) -> Architecture:
    """The device's; an A100's where it is no CUDA device."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


@cache
def unmeasured() -> str | None:
    """Why no table says which kernels are faster on this GPU than the library, or None."""
    major, minor = torch.cuda.get_device_capability()
    if path((major, minor)).is_file():
        return None
    return f"nothing was measured on sm_{major}{minor}, python -m fastgan_kernels.tune would"


dispatch.unmeasured[OP] = unmeasured
