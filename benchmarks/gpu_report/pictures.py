"""A dataset on disk that nobody has to download: what reading and decoding images costs in a step.

The zip is what tools/dataset.py makes of photographs: PNGs that are not compressed, so that what is
in the pictures does not matter to the time they take.
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from fastgan.data.convert import Conversion, convert
from fastgan.data.sources import INDEX_NAME

# Pixels a side from which a picture is enlarged, and how far each pixel then strays.
_COARSE, _GRAIN = 8, 6


def write_pictures(
    target: Path, count: int, *, resolution: int, channels: int, label_dim: int
) -> None:
    """`count` smooth random pictures with some grain into the dataset zip `target`, the same every
    time; with classes up to `label_dim` - 1 unless that is 0. UserError: it cannot be written."""
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory(prefix="pictures-") as folder:
        names = [f"{index:06d}.png" for index in range(count)]
        for name in names:
            picture = _picture(draw, resolution, channels)
            picture.save(Path(folder, name), compress_level=0)
        if label_dim:
            # The last of them is the largest class, by which a dataset knows how many there are.
            classes = [index % label_dim for index in range(label_dim - count, label_dim)]
            labels = [list(pair) for pair in zip(names, classes, strict=True)]
            Path(folder, INDEX_NAME).write_text(json.dumps({"labels": labels}))
        how = Conversion(channels=channels, labels="source" if label_dim else "none")
        convert(folder, target, how)


def _picture(draw: np.random.Generator, resolution: int, channels: int) -> Image.Image:
    coarse = draw.integers(256, size=(_COARSE, _COARSE, channels), dtype=np.uint8).squeeze()
    smooth = Image.fromarray(coarse).resize((resolution, resolution), Image.Resampling.BICUBIC)
    pixels = np.asarray(smooth, dtype=np.int16)
    grainy = pixels + draw.integers(-_GRAIN, _GRAIN + 1, size=pixels.shape)
    return Image.fromarray(grainy.clip(0, 255).astype(np.uint8))
