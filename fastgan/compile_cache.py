"""Where torch.compile and Triton keep what they compiled: one folder for all runs and processes."""

import os
import shutil
from pathlib import Path

import torch

from fastgan.errors import UserError

FOLDERS = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}


def prepare_compiler(cache: str | None, device: torch.device) -> Path:
    """Sets the cache folders of this process (variables that are set already win); their parent.

    `cache` None is $XDG_CACHE_HOME/fastgan. Graphs are found there by their contents and by the
    versions of what compiled them: a run on another GPU or torch compiles its own. UserError where
    the folder cannot be written, or where the CPU has no C++ compiler.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    root = Path(cache) if cache else Path(base) / "fastgan"
    for variable, name in FOLDERS.items():
        folder = Path(os.environ.setdefault(variable, str(root / name)))
        try:
            # What lies there is loaded and run: nobody else may write it.
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the compile cache cannot be written ({error.strerror}), {folder}, "
                "compile.cache=FOLDER would name another"
            ) from error
    if device.type == "cpu" and not any(map(shutil.which, _compilers())):
        raise UserError(
            "no C++ compiler, on PATH, engine=compiled or fast on the CPU needs g++ or clang++, "
            "engine=plain does not"
        )
    return root


def _compilers() -> tuple[str, ...]:
    return (os.environ.get("CXX", "g++"), "c++", "g++", "clang++")
