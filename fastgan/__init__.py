"""fastgan: a pre-trained diffusion UNet becomes a one-step generator by a short GAN fine-tune."""
