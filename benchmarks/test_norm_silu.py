"""group_norm_silu: 4 bytes per element forward, 6 backward (bfloat16).

`one_launch` is ours without chunks, where this GPU takes the batch in chunks.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
from fastgan_kernels import group_norm_silu
from fastgan_kernels.dispatch import apex_group_norm_class
from fastgan_kernels.norm_silu import apex_group_norm, group_norm_silu_ref
from fastgan_kernels.norm_silu import device as norm_silu_triton
from fastgan_kernels.norm_silu.tiles import Chip, chunks, plan
from torch import Tensor

from benchmarks import plain
from benchmarks.cases import Case, Norm
from benchmarks.measure import DEVICE, DTYPE, ON_GPU, seconds
from benchmarks.op import Inputs, Op

pytestmark = pytest.mark.benchmark(timer=seconds, disable_gc=True)


def inputs(case: Case, normal: Callable[..., Tensor]) -> Inputs:
    """Parameters of norms are float32 masters; all of them train."""
    norm, n = _norm(case), case.batch
    x = normal(n, norm.channels, norm.size, norm.size, std=2) + 0.5
    found = {
        "x": x,
        "weight": 1 + normal(norm.channels, std=0.3, dtype=torch.float32),
        "bias": normal(norm.channels, std=0.3, dtype=torch.float32),
    }
    found |= {name: normal(n, norm.channels, std=0.5) for name in norm.embedding.split()}
    return {name: value.requires_grad_() for name, value in found.items()}


def eager(case: Case, t: Inputs) -> Tensor:
    return plain.norm_silu(**t, act=_norm(case).act)


def apex(case: Case, t: Inputs) -> Tensor:
    """apex's own SiLU where nothing comes in between; PyTorch around it elsewhere."""
    norm, x = _norm(case), t["x"]
    if "pre_shift" in t:
        x = x + t["pre_shift"][:, :, None, None]
    fused = norm.act and "scale" not in t
    z = apex_group_norm(x, norm.groups, t["weight"], t["bias"], 1e-5, fused)
    if "scale" in t:
        z = torch.addcmul(t["shift"][:, :, None, None], z, 1 + t["scale"][:, :, None, None])
    return z if fused or not norm.act else torch.nn.functional.silu(z)


def ours(case: Case, t: Inputs) -> Tensor:
    return group_norm_silu(num_groups=_norm(case).groups, act=_norm(case).act, **t)


def exact(case: Case, t: Inputs) -> Tensor:
    return group_norm_silu_ref(num_groups=_norm(case).groups, act=_norm(case).act, **t)


def parts(case: Case, direction: str) -> Sequence[tuple[float, float]]:
    """One pass: x and y; x, dy and dx."""
    elements = case.batch * case.channels * case.pixels
    return [({"forward": 2, "backward": 3}[direction] * DTYPE.itemsize * elements, 0)]


def _norm(case: Case) -> Norm:
    assert isinstance(case.shape, Norm)
    return case.shape


def chunked(case: Case, direction: str) -> bool:
    """Whether the batch takes several launches on this device."""
    norm, backward = _norm(case), direction == "backward"
    p = plan(case.pixels, norm.channels, norm.groups, DTYPE.itemsize, backward=backward)
    chip = norm_silu_triton.chip(torch.empty(0, device=DEVICE).device)
    return len(chunks(case.batch, norm.channels // p.slab, p, chip)) > 1


# Holds everything that runs at a time.
BOUNDLESS = Chip(processors=1, l2_bytes=2**62)
CANDIDATES = {"eager": eager, "ours": ours, "one_launch": ours}
if ON_GPU and apex_group_norm_class() is not None:
    CANDIDATES["apex"] = apex
OP = Op("group_norm_silu", inputs, CANDIDATES, exact, parts)


RUNS = [
    pytest.param(case, candidate, direction, id=f"{case}-{candidate}-{direction}")
    for case in OP.cases
    for candidate, direction in OP.runs
    if candidate != "one_launch" or chunked(case, direction)
]


@pytest.mark.parametrize(("case", "candidate", "direction"), RUNS)
def test_group_norm_silu(
    bench: Callable, monkeypatch: pytest.MonkeyPatch, case: Case, candidate: str, direction: str
) -> None:
    if candidate == "one_launch":
        monkeypatch.setattr(norm_silu_triton, "chip", lambda device: BOUNDLESS)
    bench(OP, case, candidate, direction)
