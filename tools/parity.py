"""Compares fastgan with arrays of the original code: a JSON line per file, exit 1 if any fails."""

import json

from fastgan.errors import ArgumentParser, run_command
from fastgan.parity import check_file


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.npz")
    verdicts = []
    for file in parser.parse_args().files:
        verdicts.append(check_file(file))
        print(json.dumps(verdicts[-1]), flush=True)
    return 0 if all(verdict["ok"] for verdict in verdicts) else 1


if __name__ == "__main__":
    run_command(main)
