"""Pictures, and files that look like some: absurd sizes, bombs."""

import io
import struct
import zlib

import numpy as np
from PIL import Image

from tests.hostile.damage import png_chunk

PIXELS = np.random.default_rng(3).integers(0, 256, (3, 8, 8, 3), dtype=np.uint8)


def png(pixels: np.ndarray, **options: object) -> bytes:
    return encoded(pixels, "PNG", **options)


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def header(width: int, height: int, depth: int = 8, kind: int = 2, interlace: int = 0) -> bytes:
    fields = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, interlace)
    return b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", fields)


def picture(header: bytes, rows: bytes, *chunks: bytes) -> bytes:
    end = png_chunk(b"IEND", b"")
    return header + b"".join(chunks) + png_chunk(b"IDAT", zlib.compress(rows, 9)) + end


def large_webp(side: int) -> bytes:
    """A WebP's headers with a large canvas, around a small picture."""
    size = struct.pack("<I", side - 1)[:3] * 2
    small = encoded(PIXELS[0], "WEBP", lossless=True)[12:]
    canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + size
    frame = struct.pack("<I", 0)[:3] * 2 + b"\x07\0\0" * 2 + b"\x01\0\0\0"
    animated = b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    animated += b"ANMF" + struct.pack("<I", len(frame) + len(small)) + frame + small
    body = b"WEBP" + canvas + animated
    return b"RIFF" + struct.pack("<I", len(body)) + body


def many_scans(side: int, scans: int) -> bytes:
    """A progressive JPEG whose last scan occurs again and again: each takes a pass over it."""
    whole = encoded(np.zeros((side, side, 3), np.uint8), "JPEG", progressive=True)
    last = whole.rindex(b"\xff\xda")
    return whole[:last] + whole[last:-2] * scans + b"\xff\xd9"


def picture_bombs(zeros: bytes) -> dict[str, bytes]:
    """Files of 8 x 8 pixels or of a huge size; `zeros` is what they are to unpack."""
    packed, rows, small = zlib.compress(zeros, 9), bytes(8 * 25), header(8, 8)
    text = png_chunk(b"zTXt", b"k\0\0" + packed)
    jpeg = bytearray(encoded(PIXELS[0], "JPEG"))
    struct.pack_into(">HH", jpeg, jpeg.index(b"\xff\xc0") + 5, 10_000, 10_000)
    bitmap = bytearray(encoded(PIXELS[0], "BMP"))
    struct.pack_into("<ii", bitmap, 18, 10_000, 10_000)
    plays = png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    frame = png_chunk(b"fcTL", struct.pack(">5I2H2B", 0, 8, 8, 0, 0, 1, 1, 0, 0))
    return {
        "rows without end": picture(small, zeros),
        "the largest WebP": large_webp(16_383), "a large WebP": large_webp(10_000),
        "a large JPEG": bytes(jpeg), "a large bitmap": bytes(bitmap),
        "compressed text": picture(small, rows, text),
        "a compressed profile": picture(small, rows, png_chunk(b"iCCP", b"k\0\0" + packed)),
        "international text": picture(small, rows, png_chunk(b"iTXt", b"k\0\1\0\0\0" + packed)),
        "500 compressed texts": picture(small, rows, *[text[:100_000]] * 500),
        "50,000 empty chunks": picture(small, rows, *[png_chunk(b"tEXt", b"a\0b")] * 50_000),
        "an animation": picture(small, rows, plays, frame),
    }  # fmt: skip
