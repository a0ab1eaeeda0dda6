"""Pictures of any size into a dataset zip in EDM's format.

The same source gives the same bytes: entries follow the sorted source names and carry no dates.
"""

import io
import json
import os
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL
from PIL import Image
from tqdm import tqdm

from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically
from fastgan.data.dataset import subset_indices
from fastgan.data.decode import load_pixels, open_image
from fastgan.data.labels import labels_from_folders
from fastgan.data.sources import INDEX_NAME, ImageSource, open_source, read_image, shape_from

LabelRule = Literal["source", "from-folders", "none"]
_BATCH = 256
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)
_NARROWER_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def lanczos(image: Image.Image, resolution: int, where: str) -> Image.Image:
    """Resizes a square image; refuses another, whose proportions would change."""
    if image.width != image.height:
        raise UserError(
            f"image of {image.width} x {image.height}, {where}, "
            "a square one expected: center-crop makes squares"
        )
    return image.resize((resolution, resolution), Image.Resampling.LANCZOS)


def center_crop(image: Image.Image, resolution: int, where: str) -> Image.Image:
    """The central square of the short side's length, resized by Lanczos."""
    square = _central(image, min(image.size))
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS)


def center_crop_dhariwal(image: Image.Image, resolution: int, where: str) -> Image.Image:
    """Halves by box while the short side is >= 2 x resolution, bicubic to it, then crops."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = (round(image.width * scale), round(image.height * scale))
    return _central(image.resize(size, Image.Resampling.BICUBIC), resolution)


def keep(image: Image.Image, resolution: int, where: str) -> Image.Image:
    """The image as it is; refuses one of another size."""
    if image.size != (resolution, resolution):
        raise UserError(
            f"image of {image.width} x {image.height}, {where}, "
            f"{resolution} x {resolution} expected without a transform"
        )
    return image


TRANSFORMS: dict[str, Callable[[Image.Image, int, str], Image.Image]] = {
    "none": keep,
    "lanczos": lanczos,
    "center-crop": center_crop,
    "center-crop-dhariwal": center_crop_dhariwal,
}


def _central(image: Image.Image, side: int) -> Image.Image:
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


@dataclass(frozen=True)
class Conversion:
    """What to make of the pictures; `resolution` None keeps the first one's side (only `none`)."""

    transform: str = "none"
    resolution: int | None = None
    channels: int = 3
    labels: LabelRule = "source"
    max_images: int | None = None


def convert(source_path: str | Path, target: str | Path, how: Conversion) -> int:
    """Writes the dataset zip `target` from a zip or folder; returns the number of images.

    A UserError leaves no file behind, and an existing target is never replaced.
    """
    target = Path(target)
    _check_request(target, how)
    source = open_source(source_path)
    labels = source.labels if how.labels == "source" else None
    if how.labels == "from-folders":
        labels = labels_from_folders(source.names, f"{source.kind} {source.path}")
    total = len(source.names)
    chosen = subset_indices(total, total if how.max_images is None else how.max_images)
    names = [source.names[index] for index in chosen]
    resolution = how.resolution
    if resolution is None:
        resolution = open_image(source.read(names[0]), source.where(names[0])).width

    def encode(name: str) -> bytes:
        return _encode(source, name, resolution, how)

    with replace_atomically(target) as file, zipfile.ZipFile(file, "w") as archive:
        entries = [entry_name(index) for index in range(len(names))]
        for entry, image in zip(entries, _in_threads(encode, names), strict=True):
            _write(archive, entry, image)
        index: dict[str, Any] = {"labels": None}
        if labels is not None:
            pairs = zip(entries, labels[chosen].tolist(), strict=True)
            index["labels"] = [list(pair) for pair in pairs]
        index["resampling"] = f"{how.transform} to {resolution} (Pillow {PIL.__version__})"
        if how.transform == "none":
            index["resampling"] = source.metadata.get("resampling", "none")
        index["source"] = f"{source.path.name}, {source.fingerprint()}"
        _write(archive, INDEX_NAME, json.dumps(index).encode())
    return len(names)


def entry_name(index: int) -> str:
    """EDM's name of image `index`: a thousand images to a folder."""
    return f"{index:08d}"[:5] + f"/img{index:08d}.png"


def _check_request(target: Path, how: Conversion) -> None:
    if target.suffix != ".zip":
        raise UserError(f"target {target}, a name ending in .zip expected")
    if target.exists():
        raise UserError(f"target {target} exists, a new file's name expected")
    if how.resolution is None and how.transform != "none":
        raise UserError(f"transform {how.transform} without a resolution, for example 64 expected")
    if how.resolution is not None and how.resolution < 1:
        raise UserError(f"resolution {how.resolution}, at least 1 expected")
    if how.max_images is not None and how.max_images < 1:
        raise UserError(f"max_images {how.max_images}, at least 1 expected")


def _encode(source: ImageSource, name: str, resolution: int, how: Conversion) -> bytes:
    where = source.where(name)
    image = load_pixels(open_image(source.read(name), where), where)
    if image.mode not in _NARROWER_MODES:
        raise UserError(f"image mode {image.mode}, {where}, 8 bits per channel expected")
    image = image.convert("RGB" if how.channels == 3 else "L")  # transparency is dropped
    image = TRANSFORMS[how.transform](image, resolution, where)
    # A fresh image: profiles, gamma and comments of the original are no part of a dataset. Not
    # compressed, as EDM does: inflating takes a third of the time that a small image needs to load.
    encoded = io.BytesIO()
    Image.fromarray(np.asarray(image)).save(encoded, format="PNG", compress_level=0)
    return encoded.getvalue()


def _in_threads(encode: Callable[[str], bytes], names: list[str]) -> Iterator[bytes]:
    """`encode` of every name in order; Pillow works outside the interpreter's lock."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, tqdm(total=len(names), disable=None) as bar:
        # In batches, since the pool would otherwise run ahead of the writing without bound.
        for start in range(0, len(names), _BATCH):
            batch = names[start : start + _BATCH]
            yield from pool.map(encode, batch)
            bar.update(len(batch))


def _write(archive: zipfile.ZipFile, name: str, data: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, _ZIP_EPOCH), data, zipfile.ZIP_STORED)


def problems(source: ImageSource) -> Iterator[str]:
    """Decodes every image; one line for each that is broken or unlike the first sound one."""
    shape: tuple[int, int] | None = None
    for name in tqdm(source.names, disable=None):
        try:
            shape = shape or shape_from(source, name)
            read_image(source, name, *shape)
        except UserError as error:
            yield str(error)
