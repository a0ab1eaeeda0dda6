"""Every plan that norm_silu_conv may run by gives its results, and fits what it runs on."""

from importlib import import_module
from itertools import product

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels.norm_silu_conv import launch as norm_silu_conv_launch
from fastgan_kernels.norm_silu_conv import norm_silu_conv
from fastgan_kernels.norm_silu_conv.plans import (
    DIRECTIONS,
    LIBRARY,
    Direction,
    Plan,
    Shape,
    candidates,
    fitted,
)
from norm_silu_conv_cases import check, make
from oracle import DEVICE
from torch import Tensor

MODULE = import_module(
    "fastgan_kernels.norm_silu_conv"
)  # its name in the package is the function's


@pytest.fixture(autouse=True)
def by_name(on_kernels: None) -> None:
    """A setting for all ops leaves this one to the table of measurements."""
    dispatch.use("triton,norm_silu_conv=triton")


PLANS = {
    f"sm_{major}{minor} {direction} {plan}": ((major, minor), direction, plan)
    for (major, minor), direction in product(((8, 0), (9, 0)), DIRECTIONS)
    for plan in candidates((major, minor), torch.float16, direction, Shape(512, 512, 64, 64, 3))
}
# So few warps that the epilogue goes by halves, as it does for 128 x 256 pixels and channels.
PLANS |= {
    f"in halves, {direction}": ((8, 0), direction, Plan("fused", 64, 64, 32, 1, 2))
    for direction in DIRECTIONS
}


@pytest.mark.parametrize("name", PLANS)
def test_every_plan(name: str, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """On images of whole tiles, with a partial tile, and (no boxes) of an odd width."""
    architecture, direction, plan = PLANS[name]
    if DEVICE == "cuda" and torch.cuda.get_device_capability() != architecture:
        return
    asked = []

    def plan_for(of: Direction, x: Tensor, shape: Shape) -> Plan:
        asked.append(fitted(plan, direction, shape) if of == direction else LIBRARY)
        return asked[-1]

    monkeypatch.setattr(MODULE, "plan_for", plan_for)
    monkeypatch.setattr(norm_silu_conv_launch, "_processors", lambda device: 1)
    for shape in ((2, 72, 40, 8, 16), (1, 32, 48, 12, 8), (1, 24, 16, 9, 15)):
        check(make((*shape, 3, 4, 4), torch.float16), 4)
    used = [found.loads for found in asked if found != LIBRARY]
    fallback = "rows" if plan.loads == "boxes" else plan.loads
    assert set(used) == {plan.loads, fallback}


def test_what_descriptors_cannot_address_is_loaded_by_pointers(
    monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """Rows of channels that are no multiple of 16 bytes, and a tensor that starts between them."""
    plan = Plan("fused", 64, 64, 64, 4, 3, "rows")
    monkeypatch.setattr(MODULE, "plan_for", lambda way, x, shape: fitted(plan, way, shape))
    check(make((1, 12, 20, 8, 8, 3, 4, 4), torch.float16), 4)
    inputs = make((1, 16, 16, 8, 8, 3, 4, 4), torch.float16, "")
    whole = torch.zeros(inputs["x"].numel() + 4, dtype=torch.float16, device=DEVICE)
    x = whole[4:].view(1, 8, 8, 16).movedim(3, 1).copy_(inputs["x"])
    assert x.data_ptr() % 16
    arguments = inputs | {"num_groups": 4, "eps": 1e-5}
    aligned, found = norm_silu_conv(**arguments), norm_silu_conv(**arguments | {"x": x})
    assert torch.allclose(aligned, found, atol=1e-2)
