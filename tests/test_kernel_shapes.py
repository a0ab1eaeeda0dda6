"""aot/shapes.py says what the published networks are; here the networks say it themselves."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from fastgan_kernels import dispatch, runtime
from fastgan_kernels.aot.builds import Started, builds, specialised
from fastgan_kernels.aot.shapes import CIFAR10, FFHQ, IMAGENET, Block, Network
from torch import nn

from fastgan.models import Precond, network_from_config
from fastgan.models.freeze import freeze
from fastgan.models.layers import Conv2d, GroupNorm
from fastgan.models.unet_block import UNetBlock

LAYOUTS = json.loads((Path(__file__).parent / "golden/edm_checkpoint_layouts.json").read_text())
FILES = {
    "edm-cifar10-32x32-uncond-ve": CIFAR10,
    "edm-cifar10-32x32-cond-ve": CIFAR10,
    "edm-ffhq-64x64-uncond-ve": FFHQ,
    "edm-afhqv2-64x64-uncond-ve": FFHQ,
    "edm-imagenet-64x64-cond-adm": IMAGENET,
}


def on_meta(name: str) -> Precond:
    with torch.device("meta"):
        network = network_from_config({"precond": "EDMPrecond", **LAYOUTS[name]["init_kwargs"]})
    freeze(network, 1)
    return network


def watch_blocks(network: nn.Module, published: Network) -> Counter[Block]:
    found: Counter[Block] = Counter()

    def note(block: UNetBlock, args: tuple, y: torch.Tensor) -> None:
        x = args[0]
        found[Block(x.shape[1], y.shape[1], x.shape[2], block.resample, block.num_heads)] += 1
        assert block.taps == published.filter and block.norm0.num_groups == 32
        assert block.adaptive_scale == published.adm
        assert (block.skip is not None and block.skip.weight is not None) == published.projects(
            Block(x.shape[1], y.shape[1], x.shape[2], block.resample)
        )
        assert y.shape[2] == Block(1, 1, x.shape[2], block.resample).out_size

    for module in network.modules():
        if isinstance(module, UNetBlock):
            module.register_forward_hook(note)
    return found


@pytest.mark.parametrize("name", FILES)
def test_the_tables_are_the_networks(name: str) -> None:
    published = FILES[name]
    network = on_meta(name)
    blocks = watch_blocks(network, published)
    size, labels = published.resolution, LAYOUTS[name]["init_kwargs"]["label_dim"]
    one = torch.ones(1, device="meta")
    network(one.expand(1, 3, size, size), one, one.expand(1, labels) if labels else None)
    table: Counter[Block] = Counter()
    for block in published.blocks:
        table[Block(*[getattr(block, k) for k in ("cin", "cout", "size", "resample", "heads")])] = (
            block.count
        )
    assert blocks == table
    norms = [m.weight.shape[0] for m in network.modules() if isinstance(m, GroupNorm)]
    expected: Counter[int] = Counter()
    for norm, count in published.norms().items():
        expected[norm.channels] += count
    assert Counter(norms) == expected
    frozen = Counter(
        (m.weight.shape[1], m.weight.shape[0], m.weight.shape[2])
        for m in network.modules()
        if isinstance(m, Conv2d) and m.weight is not None and not m.weight.requires_grad
    )
    listed: Counter[tuple[int, int, int]] = Counter()
    for (cin, cout, _, kernel), count in published.convolutions().items():
        listed[cin, cout, kernel] += count
    assert frozen == listed


IMAGENET_ADM = pytest.param("edm-imagenet-64x64-cond-adm", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["edm-cifar10-32x32-uncond-ve", IMAGENET_ADM])
def test_what_a_network_starts_is_compiled_ahead_of_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frozen network's forward and backward, with launches noted instead of started."""
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_configured", "triton")
    network = network_from_config({"precond": "EDMPrecond", **LAYOUTS[name]["init_kwargs"]})
    freeze(network.eval(), 1)
    network.compute_dtype = torch.bfloat16
    size, labels = FILES[name].resolution, LAYOUTS[name]["init_kwargs"]["label_dim"]
    with runtime.recording() as launches:
        y = network(
            torch.zeros(1, 3, size, size), torch.ones(1), torch.zeros(1, labels) if labels else None
        )
        y.sum().backward()
    started = {specialised(Started((), launch), "bf16").key for launch in launches}
    assert len(started) > 30
    assert started <= {build.key for build in builds([torch.bfloat16])}
