"""The networks through Triton kernels equal the original code's outputs and gradients."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from fastgan_kernels import dispatch, frozen_block, runtime

from fastgan.common.precision import strict_float32
from fastgan.models.freeze import freeze, is_frozen
from tools.parity import check_file, load_arrays, network_of

DDPMPP, NCSNPP, ADM = "ddpmpp_cond_edm.npz", "ncsnpp_uncond_d2o.npz", "adm_cond_d2o.npz"
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in (NCSNPP, ADM)]


@pytest.fixture(autouse=True)
def on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU's default is the plain definition, a GPU's the kernels."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_configured", "triton")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """How often blocks ran as one op."""
    calls: list[str] = []
    original = frozen_block.forward
    monkeypatch.setattr(frozen_block, "forward", lambda i: calls.append("") or original(i))
    yield calls


@pytest.mark.skipif(not runtime.INTERPRETED, reason="parity is checked on the CPU")
@pytest.mark.parametrize("name", ["unet_block_adm_two_heads.npz", *SLOW])
def test_golden_vectors_with_everything_trained(golden: Path, name: str, fused: list[str]) -> None:
    verdict = check_file(golden / name)
    assert verdict["ok"], verdict
    assert not fused


@pytest.mark.parametrize("name", [DDPMPP, *SLOW])
def test_golden_vectors_with_frozen_convolutions(golden: Path, name: str, fused: list[str]) -> None:
    """D2O-F: each block one op; what still trains gets the original's gradient."""
    arrays = load_arrays(golden / name)
    network = network_of(arrays)
    freeze(network, 1)
    device = torch.device("cpu" if runtime.INTERPRETED else "cuda")
    network.to(device)
    strict_float32()
    case = next(key.split("/")[0] for key in arrays if key.endswith("/out"))
    part = {k: torch.from_numpy(v).to(device) for k, v in arrays.items() if k.startswith(case)}
    x = part[f"{case}/x"].requires_grad_()
    out = network(x, part[f"{case}/sigma"], part.get(f"{case}/labels"))
    (out * part[f"{case}/probe"]).sum().backward()
    assert close(out, part[f"{case}/out"], 1e-5)
    assert close(x.grad, part[f"{case}/grad_x"], 1e-4)
    compared = 0
    for key, expected in part.items():
        parameter = key.removeprefix(f"{case}/grad/")
        if parameter == key or is_frozen(parameter, 1) or "map_augment" in parameter:
            continue
        assert close(network.get_parameter(parameter).grad, expected, 1e-4), parameter
        compared += 1
    assert compared > 10 and len(fused) >= 4


def close(ours: torch.Tensor | None, golden: torch.Tensor, tolerance: float) -> bool:
    """Relative to the largest value, as `tools/parity.py` judges."""
    assert ours is not None
    difference = float((ours.detach() - golden).abs().max())
    return difference <= tolerance * max(float(golden.abs().max()), 1e-6)
