"""Part `kernels`: benchmarks/, network by network and op by op, as its README measures them."""

import subprocess
import sys
from pathlib import Path

from benchmarks.gpu_report.parts import RESULT, ROOT, Case
from benchmarks.gpu_report.results import Content
from fastgan.common.files import replace_atomically

# As in benchmarks/test_OP.py, with expected seconds per network; the targets' ops come first.
OPS = {
    "norm_silu": 180,
    "frozen_block": 300,
    "frozen_conv": 150,
    "resample": 40,
    "resize_normalize": 20,
    "norm_silu_conv": 200,
}
NETWORKS = ("CIFAR", "FFHQ", "ImageNet")
_KEYS = ("op", "network", "shape", "direction", "candidate", "count", "kept_bytes", "peak_bytes")


def cases(tiny: bool) -> list[Case]:
    """A file of pytest-benchmark per op and network. A test that fails (status 1) is recorded in
    the file, which has no time for it."""
    return [
        Case("kernels", f"{op}-{network}", expected, _command(op, network), accepted=(0, 1))
        for op, expected in OPS.items()
        for network in (NETWORKS[:1] if tiny else NETWORKS)
    ]


def _command(op: str, network: str) -> tuple[str, ...]:
    tests = f"benchmarks/test_{op}.py"
    quiet = ("-q", "-p", "no:cacheprovider", "--benchmark-columns=median")
    return ("-m", "pytest", tests, "-k", network, f"--benchmark-json={RESULT}", *quiet)


def merged(found: dict[str, Content]) -> Content:
    """A row per measured candidate with its median; the samples stay in the files."""
    first = next(iter(found.values()))
    rows = [_row(each) for document in found.values() for each in document["benchmarks"]]
    failed = [case for document in found.values() for case in document["failed"]]
    return {
        "chip": first["chip"]["name"],
        "dry_run": first["device"] != "cuda",
        "software": first["software"],
        "rates": {name: document["chip"] for name, document in found.items()},
        "rows": rows,
        "failed": failed,
    }


def _row(benchmark: Content) -> Content:
    info, stats = benchmark["extra_info"], benchmark["stats"]
    row = {key: info[key] for key in _KEYS}
    row |= {"seconds": stats["median"], "n": stats["rounds"]}
    return row | {"share_of_floor": info["floor_seconds"] / stats["median"]}


def result_files(out: Path) -> dict[str, list[Path]]:
    """By op what is there."""
    found = {op: [out / "kernels" / f"{op}-{n}.json" for n in NETWORKS] for op in OPS}
    there = {op: [file for file in files if file.is_file()] for op, files in found.items()}
    return {op: files for op, files in there.items() if files}


def write_table(out: Path) -> None:
    """kernels.md: what `python -m benchmarks.summarise` says of all files, a line per case."""
    files = [str(file) for each in result_files(out).values() for file in each]
    if not files:
        return
    command = [sys.executable, "-m", "benchmarks.summarise", *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    with replace_atomically(out / "kernels.md") as file:
        file.write((done.stdout or done.stderr).encode())
