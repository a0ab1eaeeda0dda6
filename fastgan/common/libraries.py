"""torchvision and timm, imported where they are needed and also on CPU builds of torch.

PyPI's torchvision wheel is built against CUDA torch. Beside a CPU build its import stops at
"operator torchvision::nms does not exist", since its compiled library does not load and the
schemas it would declare are missing. Declaring these schemas ourselves lets models and transforms
work; torchvision.ops and torchvision.io stay unusable, and nothing here needs them.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

import torch

from fastgan.common.errors import UserError

# Kept alive for the life of the process: a Library takes its schemas along when it dies.
_schemas: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """torchvision, with the missing operator schemas declared if its own library did not load."""
    try:
        return _import("torchvision")
    except (RuntimeError, AttributeError):
        _forget("torchvision")
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
        return _import("torchvision")


def import_timm() -> ModuleType:
    """timm, whose import needs torchvision's."""
    import_torchvision()
    return _import("timm")


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{name} is not installed, needed for pre-trained feature networks, "
            "install it with: pip install 'fastgan[vision]'"
        ) from error


def _forget(package: str) -> None:
    """Drops a half-imported package, so that the next import starts afresh."""
    for name in [m for m in sys.modules if m == package or m.startswith(package + ".")]:
        del sys.modules[name]


def import_pyplot(purpose: str) -> Any:
    """pyplot without a window. UserError: not installed, needed for `purpose`."""
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise UserError(
            f"matplotlib is not installed, needed for {purpose}, "
            "install it with: pip install 'fastgan[plot]'"
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
