"""apex and xformers: parity where they are installed, and their wiring where they are not."""

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels import dispatch as optional
from fastgan_kernels.attention import Attention, Conv, Norm, _dense_heads, self_attention
from fastgan_kernels.norm_silu import group_norm_silu, group_norm_silu_ref
from oracle import DEVICE, assert_as_accurate
from torch import Tensor, nn
from torch.nn import functional as F


def require(name: str) -> None:
    missing = optional.obstacle(name, DEVICE)
    if missing:
        pytest.skip(missing)


@pytest.fixture
def forget() -> Iterator[None]:
    """What was found installed is remembered for the process: not from one test to the next."""
    found = (optional.apex_group_norm_class, optional.fused_adam, optional._xformers_function)
    for function in (*found, optional._apex_module):
        function.cache_clear()
    yield
    for function in (*found, optional._apex_module):
        function.cache_clear()


def module(monkeypatch: pytest.MonkeyPatch, path: str, **content: object) -> None:
    """Installs `path` as an importable module with these names, its parents too."""
    parts = path.split(".")
    for i in range(len(parts)):
        name = ".".join(parts[: i + 1])
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    vars(sys.modules[path]).update(content)


class NhwcGroupNorm(nn.GroupNorm):
    """The signature of apex's module."""

    def __init__(self, groups: int, channels: int, eps: float, affine: bool, act: str) -> None:
        super().__init__(groups, channels, eps, affine)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        assert x.is_contiguous(memory_format=torch.channels_last)
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        y = F.group_norm(x, self.num_groups, weight, bias, self.eps)
        return F.silu(y) if self.act == "silu" else y


@pytest.mark.parametrize("modulated", [True, False])
def test_apex_is_wired_right(
    modulated: bool, forget: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module(monkeypatch, "apex.contrib.group_norm", GroupNorm=NhwcGroupNorm)
    monkeypatch.setattr(dispatch, "_obstacle", lambda *_: None)
    dispatch.use("group_norm_silu=apex")
    x = torch.randn(2, 32, 4, 4, device=DEVICE)
    weight, bias = torch.randn(32, device=DEVICE), torch.randn(32, device=DEVICE)
    rows = torch.randn(2, 32, device=DEVICE)
    options = {"pre_shift": rows} | ({"scale": rows, "shift": rows} if modulated else {})
    y = group_norm_silu(x, 16, weight, bias, **options)
    assert torch.allclose(y, group_norm_silu_ref(x, 16, weight, bias, **options), atol=1e-5)
    assert optional._apex_module.cache_info().currsize == 1


def test_a_broken_installation_counts_as_none(
    forget: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyPI's apex has no contrib; an apex built against another CUDA fails in its own ways."""
    module(monkeypatch, "apex")
    module(monkeypatch, "xformers")
    assert optional.obstacle("apex", "cuda") == "apex is not installed"
    assert optional.obstacle("xformers", "cuda") == "xformers is not installed"
    assert optional.fused_adam() is None


def test_they_need_a_gpu(forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    module(monkeypatch, "apex.contrib.group_norm", GroupNorm=NhwcGroupNorm)
    assert optional.obstacle("apex", "cpu") == "apex needs a CUDA device"
    assert optional.obstacle("apex", "cuda") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_apex_group_norm_is_as_accurate(dtype: torch.dtype) -> None:
    require("apex")
    x = torch.randn(4, 256, 16, 16, device=DEVICE, dtype=dtype)
    weight, bias = (torch.randn(256, device=DEVICE) for _ in range(2))
    results = []
    for setting in ("group_norm_silu=apex", "library"):
        dispatch.use(setting)
        results.append({"y": group_norm_silu(x, 32, weight, bias)})
    exact = group_norm_silu_ref(x.double(), 32, weight.double(), bias.double())
    assert_as_accurate(*results, {"y": exact})


def test_fused_adam_is_adam() -> None:
    require("apex")
    make = optional.fused_adam()
    assert make is not None
    ours, theirs = (nn.Parameter(torch.ones(1000, device=DEVICE)) for _ in range(2))
    optimizers = [
        kind([p], lr=1e-3, betas=(0.0, 0.99), eps=1e-8)
        for kind, p in ((make, ours), (torch.optim.Adam, theirs))
    ]
    for k in range(5):
        gradient = torch.sin(torch.arange(1000.0, device=DEVICE) + k)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fused_attention_gets_heads_whose_elements_are_neighbours(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise PyTorch takes neither of its fused kernels, without a word."""
    strides = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        strides.append([t.stride(-1) for t in (q, k, v)])
        return v

    qkv = torch.randn(2, 48, 4, 4, device=DEVICE).to(memory_format=layout)
    mixed = _dense_heads(qkv, 2, attend)
    assert strides == [[1, 1, 1]]
    assert torch.equal(mixed, qkv.reshape(2, 3, 16, 4, 4)[:, 2])


@pytest.mark.parametrize("stand_in", [True, False])
def test_xformers_attention(stand_in: bool, forget: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the definition; with PyTorch's kernel in xformers' place where that is missing."""
    if stand_in:

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        module(monkeypatch, "xformers.ops", memory_efficient_attention=attend)
        monkeypatch.setattr(dispatch, "_obstacle", lambda *_: None)
    else:
        require("xformers")
    x = torch.randn(2, 16, 4, 4, device=DEVICE)
    norm = Norm(torch.ones(16, device=DEVICE), torch.zeros(16, device=DEVICE), 4, 1e-5)
    qkv, proj = (
        Conv(torch.randn(n, 16, 1, 1, device=DEVICE) / 4, torch.randn(n, device=DEVICE))
        for n in (48, 16)
    )
    attention = Attention(norm, qkv, proj, 2)
    results = []
    for setting in ("attention=xformers", "reference"):
        dispatch.use(setting)
        results.append(self_attention(x, attention, 0.7))
    assert torch.allclose(*results, atol=1e-4)
