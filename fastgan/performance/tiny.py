"""Any experiment shrunk to seconds on one core: dry runs of the commands that measure."""

from typing import Any

from fastgan.models.published import PUBLISHED_NETWORKS

_BACKBONE = "mobilenetv2_050"
_BATCH = 2
_SMALL = {
    "model_channels": 32,
    # 64 channels at the bottom: less gives an ADM block no attention head.
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "img_resolution": 16,
    "img_channels": 3,
}
# Experiments whose network comes from a file that cannot be presumed here.
_NARROW = {"cifar10_narrow": "cifar10_uncond"}


def tiny_overrides(experiment: str) -> list[str]:
    """Overrides for `measured_config`: a small network of the experiment's own kind (UNet type,
    embedding, encoder, classes), one light backbone and a batch of 2; later overrides win.

    An experiment whose network ships with the package keeps it, and its discriminator.
    """
    dataset = experiment.removesuffix("_f").removesuffix("_d2o")
    published = PUBLISHED_NETWORKS.get(_NARROW.get(dataset, dataset))
    if published is None:
        return [f"batch={_BATCH}"]
    return [
        f"batch={_BATCH}",
        f"discriminator.backbones=[{_BACKBONE}]",
        "init.path=null",
        f"init.network={_hydra({**published, **_SMALL})}",
    ]


def _hydra(value: Any) -> str:
    """A value in the grammar of Hydra's command line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_hydra(entry)}" for key, entry in value.items()) + "}"
    return str(value)
