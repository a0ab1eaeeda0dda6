"""What kind of work a kernel or operator does, told by its name and by where it was launched.

Names are those of ATen, cuDNN, cuBLAS, CUTLASS, Inductor, apex and our own kernels. A step's table
needs few kinds, so GroupNorm's SiLU counts with the norm (most engines fuse them), and matrix
products outside attention count as convolutions (1x1 ones and embeddings).
"""

import re
from collections.abc import Sequence

KINDS = (
    "convolution",
    "norm",
    "attention",
    "backbone",
    "mixing",
    "heads",
    "optimiser",
    "copies",
    "resampling",
    "other",
)
PHASE_KINDS = {
    "backbone": "backbone",
    "mixing": "mixing",
    "heads": "heads",
    "optimiser": "optimiser",
    "ema": "optimiser",
}
"""Phases of a step that are kinds of their own, whatever runs in them."""

_LAYOUT = r"nchwtonhwc|nhwctonchw|converttensor|transpose_readwrite"
_NORM = r"group_?norm|batch_?norm|layer_?norm|rowwisemoments|bn_(?:fw|bw)|silu|swish"
# Of the first pattern found in a name, from the specific to the general.
_RULES = tuple(
    (kind, re.compile(pattern))
    for kind, pattern in (
        ("copies", _LAYOUT),
        ("optimiser", r"multi_tensor_apply|adam|_foreach_|lerp"),
        ("attention", r"softmax|flash|fmha|sdpa|scaled_dot_product|attention|bmm"),
        ("norm", rf"{_NORM}|fusedparamscudakernel|internalgradientscudakernel|gammabeta"),
        ("resampling", r"resample|upsample|interpolate|resize_normalize|avg_?pool|grid_sampl"),
        ("resampling", r"depthwise|2d_c1_k1|^_adjoint_kernel|^_kernel$"),
        ("norm", r"^_(?:two_tile_)?(?:forward|backward)_kernel"),
        ("convolution", r"conv|cudnn|gemm|xmma|wgrad|dgrad|fprop|winograd|cutlass|nvjet"),
        ("convolution", r"splitkreduce|gemv|\b(?:add)?m[mv]\b|(?:^|add)m[mv]backward|linear$"),
        ("copies", r"memcpy|memset|copy|clone|contiguous|\bcat\b|catarray|fill|zero_"),
    )
)
# A custom op counts as a whole: its library form may well call a convolution.
_WHOLE = re.compile(r"fastgan::(group_norm_silu|norm_silu_conv|resample2x|resize_normalize)")
_WHOLE_KINDS = {"group_norm_silu": "norm", "norm_silu_conv": "convolution"}
_INDUCTOR = re.compile(r"(?:triton_(?P<form>[a-z]+)|cpp)_fused_(?P<ops>\w+?)(?:_\d+)?$")
_FUSED_RULES = (
    ("attention", re.compile(r"softmax|attention|bmm")),
    ("norm", re.compile(_NORM)),
    ("resampling", re.compile(r"upsample|avg_pool|unsafe_index")),
    ("convolution", re.compile(r"convolution|(?:^|_)(?:add)?mm(?:_|$)")),
    ("copies", re.compile(r"^(?:_|to_copy|clone|copy|cat|view|permute|transpose|slice|fill)+$")),
)


def kind_of(phase: str | None, names: Sequence[str]) -> str:
    """One of KINDS for work in `phase` of the step (None: not known).

    `names`: of the kernel, then of the operators that it was launched in, innermost first.
    """
    if phase in PHASE_KINDS:
        return PHASE_KINDS[phase]
    for name in names:
        if whole := _WHOLE.match(name):
            return _WHOLE_KINDS.get(whole[1], "resampling")
    return next(filter(None, map(_kind_by_name, names)), "other")


def _kind_by_name(name: str) -> str | None:
    """A name alone; None where it says nothing, as those of elementwise kernels do."""
    if fused := _INDUCTOR.search(name):
        return _kind_of_fused(fused["form"], fused["ops"])
    lowered = name.lower()
    return next((kind for kind, pattern in _RULES if pattern.search(lowered)), None)


def _kind_of_fused(form: str | None, operators: str) -> str:
    """An Inductor kernel by the operators that its name lists: the heaviest kind of them."""
    if form == "for":  # its foreach kernels: Adam and the EMA
        return "optimiser"
    if form == "tem" and "bmm" not in operators:  # its templates: products and convolutions
        return "convolution"
    return next((kind for kind, pattern in _FUSED_RULES if pattern.search(operators)), "other")
