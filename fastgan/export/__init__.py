"""A folder to publish: weights, grid, card, and a program for PyTorch alone."""
