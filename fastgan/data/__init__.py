"""Image datasets: zips and folders in EDM's format, and the embedded digits."""

from fastgan.data.dataset import ImageDataset, open_dataset

__all__ = ["ImageDataset", "open_dataset"]
