"""What every kernel test needs: kernels that run here, and memory that is poisoned."""

from collections.abc import Iterator

import pytest
import torch
from fastgan_kernels import dispatch

from fastgan.common.precision import strict_within


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """float32 is float32: cuDNN would otherwise multiply it as TF32, which no tolerance expects."""
    with strict_within():
        yield


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ops run as Triton kernels unless a test asks for something else."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_configured", "triton")


@pytest.fixture
def poisoned() -> Iterator[None]:
    """torch.empty returns NaN, so that what a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(before)
