"""fastgan: a pre-trained diffusion UNet becomes a one-step generator by a short GAN fine-tune."""

import os

# OpenMP threads that spin while they wait starve everything else on busy cores (measured: 30 ->
# 268 images a second on two). The runtime reads this when torch is imported, hence here.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
