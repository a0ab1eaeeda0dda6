"""Measures kernels here and prints a line each: python -m benchmarks OP WORD ... (default: all).

Only what has all the words in its name OP-NETWORK-SHAPE-CANDIDATE. Without a GPU the code is tried
on tiny shapes in Triton's interpreter: no speeds.
"""

import os
import sys

import torch

# Before the kernels are imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("FASTGAN_KERNELS", None)

from benchmarks.cases import rows
from benchmarks.measure import ON_GPU
from benchmarks.ops import OPS


def main(words: list[str]) -> int:
    """The exit status: 1 where something failed."""
    failed = False
    for name in words[:1] if words and words[0] in OPS else OPS:
        for row in rows(OPS[name], [word for word in words if word not in OPS]):
            about = " ".join(row[key] for key in ("op", "network", "shape", "candidate"))
            text = row.get("failed") or "right; a CPU measures no speed"
            if ON_GPU and "seconds" in row:
                spent = row["seconds"]["median"]
                text = f"{1e6 * spent:.1f} us, {row['floor_seconds'] / spent:.0%} of the floor"
            print(f"{about} {row.get('direction', '')}: {text}", flush=True)
            failed |= "failed" in row
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
