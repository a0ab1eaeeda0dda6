"""python -m fastgan_kernels: which implementation of each op runs here, and why."""

import sys

import torch

from fastgan_kernels.aot.__main__ import Parser
from fastgan_kernels.dispatch import GENERAL, IMPLEMENTATIONS, VARIABLE, choose
from fastgan_kernels.runtime import FLOATS, dtype_name


def main() -> int:
    parser = Parser(
        prog="python -m fastgan_kernels",
        description=__doc__,
        epilog=f"{VARIABLE} takes one of auto, {', '.join(GENERAL)} for all ops, or op=name,... "
        "with the names of the last column; kernels= of the configuration likewise.",
    )
    parser.parse_args()
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = [("op", "device", "dtype", "runs as", "because", "may be")]
    for op, names in IMPLEMENTATIONS.items():
        for device in devices:
            for dtype in (*FLOATS, torch.float64):
                choice = _choice(op, device, dtype)
                rows.append((op, device, dtype_name(dtype), *choice, ", ".join(names)))
    if all(row[3] == "-" for row in rows[1:]):
        print(f"error: {rows[1][4]}", file=sys.stderr)
        return 1
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


def _choice(op: str, device: str, dtype: torch.dtype) -> tuple[str, str]:
    try:
        choice = choose(op, device, dtype)
    except ValueError as error:
        return "-", str(error)
    return choice.implementation, choice.reason


if __name__ == "__main__":
    raise SystemExit(main())
