"""Kills a training run at random until it is done, and compares it with one left alone.

    python tools/soak.py --out runs/soak -- experiment=demo total_images=12k snapshot=1k

Writes OUT/soak.json and prints it; exits with 1 if the last checkpoints differ in a bit.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from fastgan.common.errors import ArgumentParser, run_command
from fastgan.common.files import replace_atomically
from fastgan.evaluation.protocol import versions
from tests.reliability.soak import soak

# The demo in small steps: a minute of training, a checkpoint every few seconds.
DEMO = ("experiment=demo", "total_images=9600", "snapshot=480", "tick=480")


def main() -> int:
    parser = ArgumentParser(prog="soak.py", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/soak"), help="a new folder")
    parser.add_argument("--command", choices=("train", "pretrain"), default="train")
    parser.add_argument("--seed", type=int, default=0, help="of when and how it is killed")
    parser.add_argument(
        "--longest", type=float, default=10.0, help="seconds of training that a start gets at most"
    )
    parser.add_argument("overrides", nargs="*", default=DEMO, help="key=value of the command")
    options = parser.parse_args()
    # As many threads in every start: how a sum is split over threads decides its bits.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    module = ["-m", f"fastgan.{options.command}", *options.overrides]
    found = soak(
        lambda run_dir: [sys.executable, *module, f"run_dir={run_dir}"],
        options.out,
        seed=options.seed,
        longest=options.longest,
    )
    result = {
        "command": " ".join(["python", *module]),
        "seed": options.seed,
        "longest": options.longest,
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        **asdict(found),
        "equal": found.equal,
        "versions": versions(),
    }
    text = json.dumps(result, indent=2) + "\n"
    with replace_atomically(options.out / "soak.json") as file:
        file.write(text.encode())
    print(text, end="")
    return 0 if found.equal else 1


if __name__ == "__main__":
    run_command(main)
