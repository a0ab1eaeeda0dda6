"""How norm_silu_conv may run in one direction, and which way won where it was measured.

`python -m fastgan_kernels.tune` times the plans on a GPU and writes a table by architecture into
the cache folder: for each shape, dtype and direction the fastest plan, and whether it beat the
library there. Without a table, or for a shape that is not in it, the library runs. A convolution's
speed hardly depends on the batch once it fills the GPU: it is no key.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastgan_kernels import dispatch
from fastgan_kernels.runtime import next_power_of_2

Direction = Literal["forward", "backward"]
DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")
Architecture = tuple[int, int]


@dataclass(frozen=True)
class Plan:
    """A program's tile and how it is filled.

    form: library (cuDNN and the norm's own kernels), fused (the loop normalises what it loads;
    backward, the epilogue has SiLU' and the norm's sums), behind (forward only: the norm's kernel
    writes the activations, the epilogue adds and sums up).
    m, n, k: pixels, channels of the result, channels summed over in a step. descriptors: tensor
    descriptors (TMA on sm_90) fetch boxes of whole image rows, which come padded with zeros; else
    pointers. tanh: SiLU by the hardware's approximation (2^-11), one special function in place of
    two.
    """

    form: Literal["library", "fused", "behind"] = "library"
    m: int = 0
    n: int = 0
    k: int = 0
    warps: int = 0
    stages: int = 0
    descriptors: bool = False
    tanh: bool = False

    def __str__(self) -> str:
        if self.form == "library":
            return "library"
        words = [self.form, f"{self.m}x{self.n}x{self.k}", f"w{self.warps}", f"s{self.stages}"]
        words += [name for name in ("descriptors", "tanh") if getattr(self, name)]
        return " ".join(words)


LIBRARY = Plan()


@dataclass(frozen=True)
class Shape:
    """A convolution [N, cin, height, width] -> cout channels, stride 1, kernel 1 or 3."""

    cin: int
    cout: int
    height: int
    width: int
    kernel: int

    @property
    def pixels(self) -> int:
        return self.height * self.width

    def channels(self, direction: Direction) -> tuple[int, int]:
        """Of what is convolved, and of the result."""
        return (self.cin, self.cout) if direction == "forward" else (self.cout, self.cin)


# The first of a list is what norm_silu_conv=triton takes where nothing was measured.
_SIXTEEN_BITS: dict[tuple[Architecture, Direction], tuple[Plan, ...]] = {
    ((8, 0), "forward"): (
        Plan("fused", 128, 256, 32, 8, 3, tanh=True),
        Plan("fused", 128, 256, 32, 8, 3),
        Plan("fused", 128, 128, 32, 8, 3, tanh=True),
        Plan("behind", 128, 256, 32, 8, 3),
        Plan("behind", 128, 128, 32, 4, 4),
    ),
    ((8, 0), "backward"): (
        Plan("fused", 128, 128, 64, 8, 3),
        Plan("fused", 128, 64, 64, 8, 3),
        Plan("fused", 64, 64, 64, 4, 3),
    ),
    ((9, 0), "forward"): (
        Plan("fused", 128, 256, 64, 8, 3, descriptors=True, tanh=True),
        Plan("fused", 128, 256, 64, 8, 3, descriptors=True),
        Plan("fused", 128, 256, 32, 8, 4, tanh=True),
        Plan("fused", 64, 256, 64, 4, 3, descriptors=True, tanh=True),
        Plan("behind", 128, 256, 64, 8, 4, descriptors=True),
        Plan("behind", 128, 128, 64, 4, 4, descriptors=True),
    ),
    ((9, 0), "backward"): (
        Plan("fused", 128, 128, 64, 8, 3, descriptors=True),
        Plan("fused", 64, 128, 64, 4, 4, descriptors=True),
        Plan("fused", 128, 64, 64, 8, 3),
    ),
}
# Without tensor cores, which would multiply float32 as TF32.
_FLOAT32 = Plan("fused", 32, 64, 16, 4, 2)


def candidates(
    architecture: Architecture, dtype: torch.dtype, direction: Direction, shape: Shape
) -> Iterator[Plan]:
    """What can run there, cut to small images and few channels; the untested default first."""
    plans: tuple[Plan, ...] = (_FLOAT32,)
    if dtype.itemsize == 2:
        plans = _SIXTEEN_BITS.get((architecture, direction), _SIXTEEN_BITS[(8, 0), direction])
    yield from dict.fromkeys(fitted(plan, direction, shape) for plan in plans)


def fitted(plan: Plan, direction: Direction, shape: Shape) -> Plan:
    """The plan with a tile no larger than the image, and by pointers where descriptors cannot."""
    depth, channels = shape.channels(direction)
    # On images of fewer pixels half the warps, four of which multiply 64 rows on sm_90; each would
    # hold twice as much of the weight.
    part = 1 if shape.pixels > plan.m // 2 or plan.warps <= 4 else 2
    m, n, k = (
        max(16, min(most, next_power_of_2(there)))
        for most, there in ((plan.m, shape.pixels), (plan.n // part, channels), (plan.k, depth))
    )
    # Boxes hold whole rows of the image, rows of memory multiples of 16 bytes.
    addressable = not (m % shape.width or depth % 8 or channels % 8)
    descriptors = plan.descriptors and addressable
    return replace(plan, m=m, n=n, k=k, warps=plan.warps // part, descriptors=descriptors)


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
