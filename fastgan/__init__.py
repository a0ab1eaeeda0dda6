"""fastgan: a pre-trained diffusion UNet becomes a one-step generator by a short GAN fine-tune."""

from importlib.util import find_spec
from pathlib import Path

# Hugging Face publishes another package of this name, which its libraries look for. Looking for a
# file tells them apart without importing torch.
_found = find_spec("kernels")
_origin = _found.origin if _found is not None else None
if _origin is None or not Path(_origin).with_name("norm_silu.py").is_file():
    raise ImportError(
        f"another package named kernels ({_origin}) is found first, on the import path, "
        "fastgan's own in front of it (pip uninstall kernels) would be right"
    )
