"""Encoded images to pixels; a broken, huge or unexpected file is a UserError that names it.

The caller describes the file in `where` ("entry 'a.png' of 'x.zip'"), which goes into messages.
"""

import io
import struct
import warnings

import numpy as np
from PIL import Image, UnidentifiedImageError

from fastgan.common.errors import UserError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CHANNELS_OF_MODE = {"L": 1, "RGB": 3}
# Below the 89 million at which Pillow itself starts to warn of decompression bombs; what is refused
# here needs no warning besides.
MAX_PIXELS = 1 << 26
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
# Only these decoders ever see the data, whatever it claims to be.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# A training image; the UNets' own bound on img_resolution.
MAX_RESOLUTION = 4096
# A progressive JPEG has about ten, each a pass over all pixels that may be stored in a few bytes.
MAX_SCANS = 100
_JPEG_SIGNATURE, _SCAN = b"\xff\xd8", b"\xff\xda"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def open_image(data: bytes, where: str) -> Image.Image:
    """Reads the header (size and mode), no pixels. Refuses more than MAX_PIXELS and 16-bit PNGs.

    Pillow would reduce 16-bit colour to 8 bits without a word.
    """
    if data.startswith(_PNG_SIGNATURE) and len(data) >= 25:
        width, height, depth = struct.unpack_from(">IIB", data, 16)
        _check_pixels(width, height, where)
        if depth == 16:
            raise UserError(f"16-bit image, {where}, 8 bits per channel expected")
    if data.startswith(_JPEG_SIGNATURE) and data.count(_SCAN) > MAX_SCANS:
        raise UserError(f"JPEG of many scans, {where}, at most {MAX_SCANS} expected")
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError as error:
        raise UserError(f"unreadable image, {where}, a PNG, JPEG, WebP or BMP expected") from error
    except Exception as error:  # decoders raise nearly anything on broken bytes
        raise _corrupt(error, where) from error
    _check_pixels(*image.size, where)
    return image


def load_pixels(image: Image.Image, where: str) -> Image.Image:
    """Decodes the pixels of an image that `open_image` returned."""
    try:
        image.load()
    except Exception as error:  # as above
        raise _corrupt(error, where) from error
    return image


def check_header(image: Image.Image, where: str, resolution: int, channels: int) -> None:
    """Holds an image to what the first image of its dataset has set."""
    if image.size != (resolution, resolution):
        raise UserError(
            f"image of {image.width} x {image.height}, {where}, "
            f"{resolution} x {resolution} expected as in the dataset's first image"
        )
    if CHANNELS_OF_MODE.get(image.mode) != channels:
        expected = "L (grey)" if channels == 1 else "RGB"
        raise UserError(
            f"image mode {image.mode}, {where}, {expected} expected as in the dataset's first image"
        )


def dataset_shape(image: Image.Image, where: str) -> tuple[int, int]:
    """(resolution, channels) that this image, a dataset's first, sets for all of them."""
    if image.width != image.height:
        raise UserError(
            f"image of {image.width} x {image.height}, {where}, "
            "a square one expected: tools/dataset.py convert crops"
        )
    if image.mode not in CHANNELS_OF_MODE:
        raise UserError(
            f"image mode {image.mode}, {where}, "
            "L (grey) or RGB expected: tools/dataset.py convert converts"
        )
    if image.width > MAX_RESOLUTION:
        raise UserError(
            f"image of {image.width} x {image.height}, {where}, at most {MAX_RESOLUTION} x "
            f"{MAX_RESOLUTION} expected: tools/dataset.py convert resizes"
        )
    return image.width, CHANNELS_OF_MODE[image.mode]


def decode_image(data: bytes, where: str, resolution: int, channels: int) -> np.ndarray:
    """uint8 [channels, resolution, resolution], after every check of this module."""
    image = open_image(data, where)
    check_header(image, where, resolution, channels)
    if data.startswith(_PNG_SIGNATURE):
        # Loading pixels skips the checksums of a PNG's chunks; verify uses the image up.
        try:
            image.verify()
        except Exception as error:  # as above
            raise _corrupt(error, where) from error
        image = open_image(data, where)
    pixels = np.asarray(load_pixels(image, where))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)


def _check_pixels(width: int, height: int, where: str) -> None:
    if width * height > MAX_PIXELS:
        raise UserError(
            f"image of {width} x {height}, {where}, at most {MAX_PIXELS} pixels expected"
        )


def _corrupt(error: Exception, where: str) -> UserError:
    return UserError(f"corrupt image ({error}), {where}, a complete image file expected")
