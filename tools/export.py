"""Makes a folder to publish from a checkpoint: weights, pictures, a card, a program.

    python tools/export.py runs/cifar10 assets/NAME --dtype bf16 --metrics fid.json --max-mib 16

Prints one JSON line: the folder, size and SHA-256 of its files, what rounding changed.
"""

import json
from pathlib import Path

from fastgan.common.errors import ArgumentParser, run_command
from fastgan.export.card import GIVEN
from fastgan.export.command import Options, export
from fastgan.export.program import DTYPES


def main() -> None:
    parser = ArgumentParser(prog="export.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("checkpoint", help="a network file, a run directory or a folder of its checkpoints")
    add("out", type=Path, metavar="OUT_FOLDER", help="a new folder")
    add("--dtype", choices=DTYPES, default="bf16", help="of the weights (default: bf16)")
    add("--name", help="of the files (default: the folder's)")
    add("--metrics", nargs="+", default=(), metavar="JSON", help="results of fastgan.evaluate")
    add("--max-mib", type=float, help="refuse a larger network file")
    add("--license", choices=GIVEN, help="of a network that was trained from random weights")
    add("--note", help="a paragraph for the card, in markdown")
    add("--program", action="store_true", help="also a torch.export program (one-step generators)")
    add("--images", type=int, default=64, help="drawn to measure what rounding changes")
    options = vars(parser.parse_args())
    checkpoint, out = options.pop("checkpoint"), options.pop("out")
    options["metrics"] = tuple(options["metrics"])
    print(json.dumps(export(checkpoint, out, Options(**options))))


if __name__ == "__main__":
    run_command(main)
