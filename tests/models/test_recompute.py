"""Blocks that are computed again in backward: the same gradients, and their inputs alone kept."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from fastgan_kernels import dispatch
from torch import Tensor

from fastgan.models import Precond, network_from_config, unet_block
from fastgan.models.build import PUBLISHED_NETWORKS
from fastgan.models.freeze import freeze
from fastgan.models.sampling import few_step
from fastgan.models.unet_block import UNetBlock, recompute_blocks
from tests.conftest import TINY, live_network
from tests.kept_bytes import kept_bytes

# The published kinds, scaled down: attention in both.
CIFAR10 = {
    **PUBLISHED_NETWORKS["cifar10_uncond"],
    **{"precond": "D2OPrecond", "model_channels": 16, "img_resolution": 16, "num_blocks": 2},
    "attn_resolutions": [8],
}
IMAGENET = {
    **PUBLISHED_NETWORKS["imagenet64"],
    **{"precond": "D2OPrecond", "model_channels": 32, "img_resolution": 8, "label_dim": 3},
    **{"channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
}


@pytest.fixture(autouse=True)
def fresh_graphs() -> Iterator[None]:
    torch.compiler.reset()
    yield


def network_of(config: dict[str, Any], level: int, recomputed: bool, **to: Any) -> Precond:
    network = live_network(config).to(**to).train()
    freeze(network, level)
    if recomputed:
        recompute_blocks(network)
    return network


def inputs_of(network: Precond) -> tuple[Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(2)
    size, channels = network.model.img_resolution, network.model.img_channels
    masters = next(network.parameters()).dtype
    z = torch.randn(2, channels, size, size, generator=draw, dtype=masters)
    labels = torch.eye(network.label_dim, dtype=masters)[:2] if network.label_dim else None
    return z, labels


def fakes_and_gradients(
    network: Precond, generate: Callable[..., Tensor] | None = None
) -> dict[str, Tensor]:
    z, labels = inputs_of(network)
    fakes = (generate or few_step)(network, z, labels)
    trained = {n: p for n, p in network.named_parameters() if p.requires_grad}
    fakes.square().sum().backward(inputs=list(trained.values()))
    found = {f"gradient of {n}": p.grad for n, p in trained.items() if p.grad is not None}
    assert len(found) == len(trained)
    return {"fakes": fakes.detach(), **found}


def kept_by(network: Precond, generate: Callable[..., Tensor] = few_step) -> int:
    z, labels = inputs_of(network)
    given = [*network.parameters(), *network.buffers(), z]
    return kept_bytes(lambda: generate(network, z, labels), given)


@pytest.mark.parametrize("config", [CIFAR10, IMAGENET], ids=["cifar10", "imagenet64"])
@pytest.mark.parametrize(("level", "compute"), [(0, None), (1, torch.bfloat16), (3, None)])
def test_the_same_bits(config: dict[str, Any], level: int, compute: torch.dtype | None) -> None:
    results = []
    for recomputed in (False, True):
        network = network_of(config, level, recomputed)
        network.compute_dtype = compute
        results.append(fakes_and_gradients(network))
    plain, again = results
    assert plain.keys() == again.keys() and len(plain) > 50
    assert all(torch.equal(t, again[name]) for name, t in plain.items())


def test_a_network_keeps_the_inputs_of_its_blocks() -> None:
    network = network_of(CIFAR10, 1, True)
    seen: dict[int, Tensor] = {}
    blocks = [m for m in network.modules() if isinstance(m, UNetBlock)]
    assert len(blocks) == 3 * 2 + 2 + 2 + 2 + 3 * 3
    handles = [b.register_forward_pre_hook(lambda m, i: seen.update({id(m): i[0]})) for b in blocks]
    kept = kept_by(network)
    for handle in handles:
        handle.remove()
    # The rest: images, the embedding's own layers, the last norm and convolution.
    inputs = sum(x.nbytes for x in seen.values())
    assert inputs < kept < 1.5 * inputs
    assert kept < 0.25 * kept_by(network_of(CIFAR10, 1, False))


def test_each_block_runs_once_more_and_only_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """And reads or draws no random state, which a CUDA graph could not hold."""
    ran: list[UNetBlock] = []
    compute = UNetBlock._compute
    monkeypatch.setattr(
        UNetBlock, "_compute", lambda b, x, emb: ran.append(b) or compute(b, x, emb)
    )
    network = network_of(TINY, 1, True)
    blocks = [m for m in network.modules() if isinstance(m, UNetBlock)]
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(unet_block, "checkpoint", lambda *a, **k: pytest.fail("for no gradient"))
        few_step(network, *inputs_of(network))
    assert ran == blocks
    ran.clear()
    given = inputs_of(network)
    monkeypatch.setattr(torch, "get_rng_state", lambda: pytest.fail("the state is read"))
    monkeypatch.setattr(torch, "set_rng_state", lambda state: pytest.fail("the state is set"))
    few_step(network, *given).sum().backward()
    assert ran == [*blocks, *reversed(blocks)]


def test_dropout_is_refused() -> None:
    with pytest.raises(AssertionError, match="dropout"):
        recompute_blocks(network_from_config({**TINY, "dropout": 0.1}))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_frozen_block_on_our_kernels(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is one op that keeps its input, and one that is as large; computed again the former."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_configured", "triton")
    results, kept = [], []
    for recomputed in (False, True):
        block = UNetBlock(16, 16, 8)
        for name, parameter in block.named_parameters():
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
            parameter.requires_grad_("conv" not in name)
        if recomputed:
            recompute_blocks(block)
        draw = torch.Generator().manual_seed(0)
        x, emb = torch.randn(2, 16, 8, 8, generator=draw), torch.randn(2, 8, generator=draw)
        call = torch.compile(block, fullgraph=True, backend="aot_eager") if compiled else block
        given = [emb, *block.parameters()]
        kept.append(kept_bytes(lambda: call(x.requires_grad_(), emb), given))  # noqa: B023
        results.append({n: p.grad for n, p in block.named_parameters() if p.requires_grad})
        results[-1]["x"] = x.grad
    plain, again = results
    assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())
    assert kept[0] > 2 * x.nbytes and kept[1] == x.nbytes
