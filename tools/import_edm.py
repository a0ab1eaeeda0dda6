"""Turns a published EDM, D2O or GDD pickle into a network file, executing nothing in it.

    python tools/import_edm.py edm-cifar10-32x32-uncond-ve.pkl cifar10.safetensors

Prints one JSON line: source class, licence, number of values, SHA-256 of both files.
"""

import json
from pathlib import Path

from fastgan.checkpoint.edm_pickle import import_edm
from fastgan.common.errors import ArgumentParser, run_command


def main() -> None:
    parser = ArgumentParser(prog="import_edm.py", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, metavar="SRC.pkl")
    parser.add_argument("destination", type=Path, metavar="DST.safetensors")
    parser.add_argument("--network", choices=("ema", "net"), default="ema", help="default: ema")
    parser.add_argument("--force", action="store_true", help="replace DST if it exists")
    options = parser.parse_args()
    print(json.dumps(import_edm(**vars(options))))


if __name__ == "__main__":
    run_command(main)
