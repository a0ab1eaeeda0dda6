"""Which plan of a convolution is fastest on this GPU, measured."""
