"""Libraries that not everybody needs, imported where they are: torchvision, timm, matplotlib.

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


def import_optional(name: str, purpose: str, extra: str) -> Any:
    """The module `name`. UserError: not installed, needed for `purpose`, comes with `extra`."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is not installed, needed for {purpose}, "
            f"install it with: pip install 'fastgan[{extra}]'"
        ) from error


def import_torchvision() -> ModuleType:
    """torchvision, with the missing operator schemas declared if its own library did not load."""
    try:
        return _import_network_library("torchvision")
    except (RuntimeError, AttributeError):
        # What is half imported goes, so that the next import starts afresh.
        for name in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _schemas.append(library)
        return _import_network_library("torchvision")


def import_timm() -> ModuleType:
    """timm, whose import needs torchvision's."""
    import_torchvision()
    return _import_network_library("timm")


def import_pyplot(purpose: str) -> Any:
    """pyplot without a window. UserError: not installed, needed for `purpose`."""
    import_optional("matplotlib", purpose, "plot").use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def _import_network_library(name: str) -> ModuleType:
    return import_optional(name, "pre-trained feature networks", "vision")
