"""Small pictures in zips and folders, and what is said where a dataset does not open."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastgan.common.errors import UserError
from fastgan.data import open_dataset


def encoded(pixels: np.ndarray, mode: str | None = None, kind: str = "PNG") -> bytes:
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    (image if mode is None else image.convert(mode)).save(file, kind)
    return file.getvalue()


def write_zip(
    path: Path, entries: dict[str, bytes], labels: Any = None, method: int = zipfile.ZIP_STORED
) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
        if labels is not None:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_dataset(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)
