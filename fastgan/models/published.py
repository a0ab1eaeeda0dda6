"""The architectures of the published pre-trained networks, by the experiments' names for them."""

from typing import Any

_NCSNPP = {
    "model_type": "SongUNet",
    "embedding_type": "fourier",
    "encoder_type": "residual",
    "decoder_type": "standard",
    "channel_mult_noise": 2,
    "resample_filter": [1, 3, 3, 1],
    "model_channels": 128,
    "augment_dim": 9,
    "img_channels": 3,
}
_CIFAR10 = {**_NCSNPP, "img_resolution": 32, "channel_mult": [2, 2, 2]}
_FACES64 = {**_NCSNPP, "img_resolution": 64, "channel_mult": [1, 2, 2, 2], "label_dim": 0}

PUBLISHED_NETWORKS: dict[str, dict[str, Any]] = {
    "cifar10_uncond": {**_CIFAR10, "label_dim": 0},
    "cifar10_cond": {**_CIFAR10, "label_dim": 10},
    "ffhq64": _FACES64,
    "afhqv2_64": _FACES64,
    "imagenet64": {
        "model_type": "DhariwalUNet",
        "model_channels": 192,
        "channel_mult": [1, 2, 3, 4],
        "img_channels": 3,
        "img_resolution": 64,
        "label_dim": 1000,
    },
}
"""Arguments of `network_from_config` without `precond` (ImageNet's is ADM)."""
