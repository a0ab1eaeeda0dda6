"""What `python -m kernels.tune` is made of; nothing that trains needs it."""
