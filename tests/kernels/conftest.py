"""What every kernel test needs: kernels that run here, and memory that is poisoned."""

import os
from collections.abc import Iterator

import pytest
import torch
from fastgan_kernels import dispatch

from fastgan.common.precision import strict_within

# Several processes (pytest-xdist) replace one that ends.
WORKER = "PYTEST_XDIST_WORKER"
# Before any test pretends that there is one.
HAS_GPU = torch.cuda.is_available()


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """float32 is float32: cuDNN would otherwise multiply it as TF32, which no tolerance expects."""
    with strict_within():
        yield


@pytest.fixture(autouse=True)
def sound_gpu() -> Iterator[None]:
    """A worker whose GPU a kernel broke ends: every later test would fail in it."""
    yield
    if HAS_GPU and WORKER in os.environ:
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os._exit(1)


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
