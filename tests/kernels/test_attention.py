"""Self-attention behind a block: the library's and xformers' against the definition."""

import sys
from types import ModuleType

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels.attention import (
    Attention,
    Conv,
    Norm,
    _dense_heads,
    _sdpa,
    attention_ref,
    self_attention,
)
from oracle import DEVICE, assert_as_accurate, results
from torch import Tensor


def make() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(5)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=draw).to(DEVICE)

    return {
        "x": normal(2, 16, 4, 4),
        "weight": 1 + 0.3 * normal(16),
        "bias": normal(16),
        "qkv": normal(48, 16, 1, 1) / 4,
        "qkv_bias": normal(48),
        "proj": normal(16, 16, 1, 1) / 4,
        "proj_bias": normal(16),
    }


def attend(x: Tensor, **p: Tensor) -> Tensor:
    norm = Norm(p["weight"], p["bias"], 4, 1e-5)
    qkv, proj = (Conv(p[name], p[f"{name}_bias"]) for name in ("qkv", "proj"))
    return self_attention(x, Attention(norm, qkv, proj, 2), 0.7)


def by_definition(**p: Tensor) -> Tensor:
    with dispatch.twice_differentiable():
        return attend(**p)


def test_the_librarys_is_the_definition_on_reordered_weights() -> None:
    """proj is frozen: its convolution keeps nothing."""
    inputs = make()
    trains = [name for name in inputs if not name.startswith("proj")]
    double = {name: value.double() for name, value in inputs.items()}
    sides = ((attend, inputs), (by_definition, inputs), (by_definition, double))
    found = [results(function, given, trains) for function, given in sides]
    assert_as_accurate(*found, largest=False)


def test_one_head_by_hand() -> None:
    """Channels of qkv come as q0 k0 v0 q1 k1 v1 ...: two pixels, two channels."""
    qkv = torch.randn(1, 6, 1, 2, dtype=torch.float64)
    q, k, v = (qkv[0, j::3, 0] for j in range(3))
    weights = (q.T @ k / 2**0.5).softmax(dim=1)
    assert torch.allclose(attention_ref(qkv, 1)[0, :, 0], v @ weights.T)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_attention_gets_heads_whose_elements_are_neighbours(
    layout: torch.memory_format,
) -> None:
    """Otherwise PyTorch takes neither of its fused kernels, without a word."""
    strides = []

    def spy(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        strides.append([t.stride(-1) for t in (q, k, v)])
        return v

    qkv = torch.randn(2, 48, 4, 4, device=DEVICE).to(memory_format=layout)
    mixed = _dense_heads(qkv, 2, spy)
    assert strides == [[1, 1, 1]]
    assert torch.equal(mixed, qkv.reshape(2, 3, 16, 4, 4)[:, 2])


def test_xformers_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's kernel in xformers' place where that is missing; also as one graph."""
    if dispatch._obstacle("attention", "xformers", DEVICE, torch.float32):
        ops = ModuleType("xformers.ops")
        ops.memory_efficient_attention = _sdpa  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
        monkeypatch.setitem(sys.modules, "xformers.ops", ops)
        monkeypatch.setattr(dispatch, "_obstacle", lambda *_: None)
    expected = by_definition(**make())
    dispatch.use("attention=xformers")
    torch.compiler.reset()
    for run in (attend, torch.compile(attend, fullgraph=True, backend="aot_eager")):
        assert torch.allclose(run(**make()), expected, atol=1e-4)
