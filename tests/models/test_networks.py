"""Properties of the networks that no golden file covers."""

import copy
import math

import pytest
import torch

from fastgan.common.errors import UserError
from fastgan.models import network_from_config
from fastgan.models.freeze import freeze
from fastgan.models.layers import XAVIER, Conv2d, Init
from fastgan.models.unet_block import UNetBlock
from tests.conftest import live_network

SONG = {
    "precond": "EDMPrecond",
    "img_resolution": 8,
    "img_channels": 3,
    "label_dim": 0,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1, 2, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
}


@pytest.mark.parametrize("encoder", ["standard", "skip", "residual"])
@pytest.mark.parametrize("decoder", ["standard", "skip"])
@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1]])
def test_every_song_unet_variant_uses_all_its_parameters(
    encoder: str, decoder: str, taps: list[int]
) -> None:
    config = {**SONG, "encoder_type": encoder, "decoder_type": decoder, "resample_filter": taps}
    network = live_network(config).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    out = network(x, torch.tensor([1.0, 2.0]))
    out.sum().backward()
    assert out.shape == x.shape and out.dtype == torch.float64
    assert all(p.grad is not None and p.grad.any() for p in network.parameters())


def test_d2o_is_the_identity_at_its_smallest_sigma(tiny_network) -> None:
    x = torch.randn(2, 1, 8, 8)
    torch.testing.assert_close(tiny_network(x, torch.tensor([0.002])), x, rtol=0, atol=1e-7)


def test_missing_labels_are_zeros() -> None:
    network = live_network({**SONG, "label_dim": 4}).double()
    x, sigma = torch.randn(2, 3, 8, 8, dtype=torch.float64), torch.tensor([1.0])
    torch.testing.assert_close(network(x, sigma), network(x, sigma, torch.zeros(2, 4)))
    assert not torch.allclose(network(x, sigma), network(x, sigma, torch.eye(4)[:2]))


def test_float64_images_keep_float64_outside_a_float32_network(tiny_network) -> None:
    x = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    out = tiny_network(x, torch.tensor([0.01]))
    raw = (out - tiny_network.c_skip(torch.tensor(0.01, dtype=torch.float64)) * x).detach()
    assert out.dtype == torch.float64
    assert raw.abs().max() < 0.1  # the skip path, in float64, carries the image


def test_bf16_compute_stays_near_float32(tiny_network) -> None:
    x, sigma = torch.randn(2, 1, 8, 8), torch.tensor([1.0])
    expected = tiny_network(x, sigma)
    tiny_network.compute_dtype = torch.bfloat16
    out = tiny_network(x, sigma)
    assert out.dtype == torch.float32 and 0 < (out - expected).abs().max() < 0.05


def test_blocks_below_64_channels_have_no_attention_by_head_width() -> None:
    assert UNetBlock(32, 32, 8, attention=True).num_heads == 0
    assert UNetBlock(64, 128, 8, attention=True).num_heads == 2
    assert UNetBlock(64, 64, 8, attention=True, num_heads=1, channels_per_head=16).num_heads == 1


def test_freeze_leaves_map_augment_out(tiny_config) -> None:
    network = network_from_config({**tiny_config, "augment_dim": 9})
    names = freeze(network, 0)
    assert "model.map_augment.weight" not in names
    assert not network.model.map_augment.weight.requires_grad
    assert len(names) == len(list(network.parameters())) - 1


def test_initial_bounds() -> None:
    weight, bias = torch.empty(64, 32, 3, 3), torch.empty(64)
    XAVIER.fill(weight, bias)
    bound = math.sqrt(6 / ((64 + 32) * 9))
    assert weight.abs().max() <= bound and weight.std() > 0.5 * bound and not bias.any()
    Init("fan_in").fill(weight, bias)
    assert weight.abs().max() <= 1 / math.sqrt(32 * 9) and bias.any()
    Init("fan_in").scaled(0.0, bias=0.0).fill(weight, bias)
    assert not weight.any() and not bias.any()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model_type": "UNet"}, "model_type"),
        ({"precond": "VPPrecond"}, "precond"),
        ({"encoder_type": "odd"}, "encoder_type"),
        ({"img_resolution": 6}, "img_resolution"),
        ({"img_channels": None}, "img_channels"),
        ({"widht": 3}, "widht"),
        ({"model_channels": 48, "channel_mult": [2, 2]}, "144 channels"),
    ],
)
def test_bad_configs_are_refused_by_name(change: dict, named: str) -> None:
    with pytest.raises(UserError, match=named) as refused:
        network_from_config({**SONG, **change})
    assert "\n" not in str(refused.value)


def test_a_frozen_weight_is_cast_once() -> None:
    conv = Conv2d(4, 4, 3).requires_grad_(False)
    first = conv.parameters_of_conv(torch.bfloat16)
    assert first.weight.dtype == torch.bfloat16
    assert conv.parameters_of_conv(torch.bfloat16) is first
    with torch.no_grad():
        conv.weight.add_(1)
    again = conv.parameters_of_conv(torch.bfloat16)
    assert torch.equal(again.weight, conv.weight.bfloat16())
    assert set(conv.state_dict()) == {"weight", "bias"}
    twin = copy.deepcopy(conv)
    with torch.no_grad():
        twin.bias.add_(1)
    assert torch.equal(twin.parameters_of_conv(torch.bfloat16).bias, twin.bias.bfloat16())
    conv.requires_grad_(True)
    assert conv.parameters_of_conv(torch.bfloat16).weight.requires_grad
