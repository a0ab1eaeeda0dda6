"""The JSON files of a report: what each says about its machine, atomic writing, checked reading."""

import json
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from fastgan.common.errors import ArgumentParser, UserError
from fastgan.common.files import replace_atomically

Content = dict[str, Any]


def write_json(path: Path, content: object) -> None:
    """Replaces `path` by `content`; a reader sees the old file or the new one."""
    with replace_atomically(path) as file:
        file.write((json.dumps(content, indent=1) + "\n").encode())


def read_json(path: Path) -> Content:
    """The object that `path` holds. UserError: it cannot be read, or holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read ({error}), {path}, deleting it would measure it again"
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"holds no object, {path}, deleting it would measure it again")
    return content


def chip_name() -> str:
    """The GPU's name as its driver says it, "CPU" without one."""
    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"


def header() -> Content:
    """Where and with what the numbers beside it were measured; on a CPU they are no speeds."""
    on_gpu = torch.cuda.is_available()
    return {
        "chip": chip_name(),
        "device": "cuda" if on_gpu else "cpu",
        "dry_run": not on_gpu,
        "datetime": datetime.now(UTC).isoformat(timespec="seconds"),
        "software": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": package_version("triton"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        },
    }


def package_version(name: str) -> str | None:
    """Of an installed distribution; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def samples(values: Sequence[float]) -> Content:
    """A measurement: its median, how many samples it is of, and these (all in one unit)."""
    return {"median": median(values), "n": len(values), "samples": list(values)}


def case_parser(description: str | None) -> ArgumentParser:
    """The arguments that the process of every case takes."""
    parser = ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the code")
    return parser
