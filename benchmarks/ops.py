"""The ops by the name of their files, here and in tests/kernels."""

from benchmarks import (
    test_frozen_block,
    test_frozen_conv,
    test_norm_silu,
    test_norm_silu_conv,
    test_resample,
    test_resize_normalize,
)

OPS = {
    "norm_silu": test_norm_silu.OP,
    "frozen_block": test_frozen_block.OP,
    "norm_silu_conv": test_norm_silu_conv.OP,
    "frozen_conv": test_frozen_conv.OP,
    "resample": test_resample.OP,
    "resize_normalize": test_resize_normalize.OP,
}
