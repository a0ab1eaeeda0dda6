"""Case `environment`: versions, device, memory, driver, clocks (read, never set) and commit."""

import csv
import os
import platform
import shutil
import subprocess

import torch

from benchmarks.gpu_report.parts import ROOT
from benchmarks.gpu_report.results import Content, case_parser, header, package_version, write_json
from fastgan.common.errors import run_command

PACKAGES = ("numpy", "torchvision", "timm", "safetensors", "hydra-core", "omegaconf", "pytest")
# Of `nvidia-smi --query-gpu`.
QUERY = (
    "driver_version",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "ecc.mode.current",
    "mig.mode.current",
)


def environment() -> Content:
    """All that a number's reader may ask about the machine, without its name."""
    return header() | {
        "packages": {name: package_version(name) for name in PACKAGES},
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "nvidia_smi": _nvidia_smi(),
        "commit": _commit(),
    }


def _gpu() -> Content | None:
    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return {
        "memory_bytes": found.total_memory,
        "free_bytes": torch.cuda.mem_get_info()[0],
        "l2_bytes": found.L2_cache_size,
        "multiprocessors": found.multi_processor_count,
        "capability": f"{found.major}.{found.minor}",
    }


def _nvidia_smi() -> dict[str, str] | None:
    """The driver and clocks of the first GPU as it idles; None without a GPU or the command."""
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader"]
    text = _output(query)
    if text is None:
        return None
    first = next(csv.reader(text.splitlines(), skipinitialspace=True))
    return dict(zip(QUERY, first, strict=True))


def _commit() -> Content | None:
    """What is checked out; None outside a checkout."""
    commit = _output(["git", "rev-parse", "HEAD"])
    if commit is None:
        return None
    changes = _output(["git", "status", "--porcelain", "--untracked-files=no"])
    return {"id": commit, "changed": bool(changes)}


def _output(command: list[str]) -> str | None:
    """What a command prints, None where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else None


def main() -> int:
    options = case_parser(__doc__).parse_args()
    write_json(options.out, environment())
    return 0


if __name__ == "__main__":
    run_command(main)
