"""fastgan: a pre-trained diffusion UNet becomes a one-step generator by a short GAN fine-tune."""

import kernels

# Hugging Face publishes another package of this name, which its libraries look for.
if not hasattr(kernels, "group_norm_silu"):
    raise ImportError(
        f"another package named kernels ({kernels.__file__}) is found first, on the import path, "
        "fastgan's own in front of it (pip uninstall kernels) would be right"
    )
