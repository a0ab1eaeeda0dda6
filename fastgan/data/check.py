"""Every problem of a dataset, instead of the first one."""

from collections.abc import Iterator

from tqdm import tqdm

from fastgan.data.image_source import ImageSource
from fastgan.data.source_dataset import read_image, shape_from
from fastgan.errors import UserError


def problems(source: ImageSource) -> Iterator[str]:
    """Decodes every image; one line for each that is broken or unlike the first sound one."""
    shape: tuple[int, int] | None = None
    for name in tqdm(source.names, disable=None):
        try:
            shape = shape or shape_from(source, name)
            read_image(source, name, *shape)
        except UserError as error:
            yield str(error)
