"""How a picture of any size becomes a training image. FID depends on it, so each has a name.

`lanczos`               no crop (FFHQ, AFHQv2)
`center-crop`           the central square, then Lanczos (ImageNet as EDM prepares it)
`center-crop-dhariwal`  box halving, bicubic, then the central square (ImageNet as ADM prepares it)
"""

from collections.abc import Callable

from PIL import Image

from fastgan.errors import UserError

_NARROWER_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr")


def to_mode(image: Image.Image, where: str, channels: int) -> Image.Image:
    """RGB (channels 3) or grey (1); transparency is dropped. Refuses more than 8 bits a channel."""
    if image.mode not in _NARROWER_MODES:
        raise UserError(f"image mode {image.mode}, {where}, 8 bits per channel expected")
    return image.convert("RGB" if channels == 3 else "L")


def lanczos(image: Image.Image, resolution: int, where: str) -> Image.Image:
    """Resizes a square image; refuses another, whose proportions would change."""
    _check_square(image, where)
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


def _check_square(image: Image.Image, where: str) -> None:
    if image.width != image.height:
        raise UserError(
            f"image of {image.width} x {image.height}, {where}, "
            "a square one expected: center-crop makes squares"
        )
