"""Which plan of a convolution is fastest on this GPU, measured by trials that may fail."""
