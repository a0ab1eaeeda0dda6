"""Makes, describes and checks image datasets: convert, info, check, grid. See docs/datasets.md."""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from fastgan.common.errors import ArgumentParser, run_command
from fastgan.common.files import file_sha256
from fastgan.data import ImageDataset, open_dataset
from fastgan.data.convert import TRANSFORMS, Conversion, convert, problems
from fastgan.data.sources import open_source

_GRID_ROWS, _GRID_COLUMNS = 8, 16
_ANY = "zip, folder, digits, digits/val or digits/test"


def main() -> int:
    options = vars(_parser().parse_args())
    return options.pop("command")(**options)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    made = commands.add_parser("convert", help="pictures of any size to a dataset zip")
    made.add_argument("source", help="folder or zip of pictures")
    made.add_argument("target", help="the .zip to write; must not exist")
    made.add_argument("--resolution", type=int, help="side in pixels (default: the first image's)")
    made.add_argument("--transform", choices=list(TRANSFORMS), default="none")
    made.add_argument("--channels", type=int, choices=[1, 3], default=3, help="1 = grey, 3 = RGB")
    made.add_argument(
        "--labels",
        choices=["source", "from-folders", "none"],
        default="source",
        help="source: its dataset.json, or a folder's class folders (default); "
        "from-folders: the first folder of every name; none: unlabelled",
    )
    made.add_argument("--max-images", type=int, help="a fixed random subset of that size")
    made.set_defaults(command=_convert)
    described = commands.add_parser("info", help="count, resolution, channels, classes, sha256")
    described.add_argument("path", help=_ANY)
    described.set_defaults(command=_info)
    checked = commands.add_parser("check", help="decode every image; exit 1 on any problem")
    checked.add_argument("path", help="zip or folder")
    checked.set_defaults(command=_check)
    drawn = commands.add_parser("grid", help="a picture of 8 x 16 images, spread evenly")
    drawn.add_argument("path", help=_ANY)
    drawn.add_argument("picture", help="the .png to write")
    drawn.set_defaults(command=_grid)
    return parser


def _convert(source: str, target: str, **how: object) -> int:
    count = convert(source, target, Conversion(**how))  # type: ignore[arg-type]
    print(f"{count} images in {target}")
    return 0


def _info(path: str) -> int:
    dataset = open_dataset(path)
    for key, value in dataset.provenance().items():
        print(f"{key}: {value}")
    print(f"label_dim: {dataset.label_dim}")
    print(f"classes: {_histogram(dataset)}")
    if Path(path).is_file():
        print(f"sha256: {file_sha256(path)}")
    return 0


def _histogram(dataset: ImageDataset) -> str:
    if dataset.labels is None:
        return "unlabelled"
    if dataset.labels.ndim == 2:
        return f"vectors of {dataset.label_dim} numbers"
    counts = np.bincount(dataset.labels, minlength=dataset.label_dim)
    return " ".join(f"{label}:{count}" for label, count in enumerate(counts))


def _check(path: str) -> int:
    source, found = open_source(path), 0
    for problem in problems(source):
        tqdm.write(problem, file=sys.stdout)
        found += 1
    print(f"{len(source.names)} images, {found} problems")
    return 1 if found else 0


def _grid(path: str, picture: str) -> int:
    # Imported here: torch takes seconds that the other commands need not wait.
    import torch

    from fastgan.models.sampling import save_grid

    dataset = open_dataset(path)
    count = min(len(dataset), _GRID_ROWS * _GRID_COLUMNS)
    chosen = np.linspace(0, len(dataset) - 1, count).astype(int)
    save_grid(torch.from_numpy(dataset.images(chosen)), picture, min(count, _GRID_COLUMNS))
    return 0


if __name__ == "__main__":
    run_command(main)
