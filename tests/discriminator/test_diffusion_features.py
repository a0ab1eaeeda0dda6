"""Heads on a denoiser's own encoder."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fastgan.discriminator.diffusion_features import DiffusionDiscriminator
from fastgan.models.build import network_from_config

ADM = {
    "precond": "D2OPrecond",
    "img_resolution": 16,
    "img_channels": 1,
    "model_type": "DhariwalUNet",
    "model_channels": 16,
    "channel_mult": [1, 2, 3],
    "num_blocks": 1,
    "attn_resolutions": [4],
}
SHAPE = (1, 16, 16)


class ToyEncoder(nn.Module):
    """Two maps whose values show which sigma and labels were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(0.5)
        self.asked: list[tuple[float, torch.Tensor | None]] = []

    def features(self, x, sigma, class_labels=None):
        self.asked.append((sigma, class_labels))
        x = self.dropout(x * self.scale)
        return [x, F.avg_pool2d(x, 2).repeat(1, 3, 1, 1)]


def images(n: int = 2) -> torch.Tensor:
    return torch.rand(n, *SHAPE, generator=torch.Generator().manual_seed(n)) * 2 - 1


@pytest.fixture(scope="module")
def adm():
    network = network_from_config(ADM)
    # At initialisation the residual branches are zero and the encoder is linear.
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    return network


def test_one_entry_with_all_patches(adm):
    logits = DiffusionDiscriminator(adm, SHAPE)(images())
    # Encoder maps of 16, 8 and 4 pixels and the image: 4x4, 4x4, 2x2 and 4x4 patches.
    assert [x.shape for x in logits] == [(2, 16 + 16 + 4 + 16)]
    assert logits[0].dtype == torch.float32


def test_the_encoder_is_a_frozen_copy(adm):
    discriminator = DiffusionDiscriminator(adm, SHAPE)
    before = discriminator(images())[0]
    saved = {k: v.clone() for k, v in adm.state_dict().items()}
    with torch.no_grad():
        for p in adm.parameters():
            p.add_(1)
    torch.testing.assert_close(discriminator(images())[0], before)
    adm.load_state_dict(saved)
    assert not any(p.requires_grad for p in discriminator.network.parameters())
    assert all(p.requires_grad for p in adm.parameters())


def test_gradients_reach_images_and_heads_only(adm):
    discriminator = DiffusionDiscriminator(adm, SHAPE)
    x = images().requires_grad_()
    (g,) = torch.autograd.grad(discriminator(x)[0].sum(), x, create_graph=True)
    g.square().sum().backward()
    assert x.grad.abs().max() > 0
    frozen = [p for n, p in discriminator.named_parameters() if not n.startswith("heads.")]
    assert all(p.grad is None for p in frozen)
    weights = [p for n, p in discriminator.heads.named_parameters() if n.endswith("weight")]
    assert all(p.grad.abs().max() > 0 for p in weights)


def test_dropout_of_the_encoder_stays_off():
    discriminator = DiffusionDiscriminator(ToyEncoder(), SHAPE).train()
    assert torch.equal(discriminator(images())[0], discriminator(images())[0])
    assert not discriminator.network.dropout.training


def test_sigma_and_labels_are_passed_on():
    discriminator = DiffusionDiscriminator(ToyEncoder(), SHAPE, sigma=0.7, label_dim=3)
    labels = F.one_hot(torch.tensor([0, 2]), 3).float()
    discriminator(images(), labels)
    sigma, seen = discriminator.network.asked[-1]
    assert sigma == 0.7 and torch.equal(seen, labels)


def test_labels_shift_every_patch_of_a_head_alike():
    discriminator = DiffusionDiscriminator(ToyEncoder(), SHAPE, label_dim=3)
    a, b = (
        discriminator(images(), F.one_hot(torch.tensor(c), 3).float())[0] for c in ([0, 1], [2, 1])
    )
    assert torch.equal(a[1], b[1])
    shift = (a[0] - b[0])[:16]
    assert shift.abs().max() > 1e-4
    torch.testing.assert_close(shift, shift[:1].expand(16), atol=1e-6, rtol=1e-4)


def test_saved_state_is_the_heads_and_construction_is_seeded(adm):
    before = torch.get_rng_state()
    a, again, b = (DiffusionDiscriminator(adm, SHAPE, seed=s) for s in (0, 0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(v, again.save_state()[k]) for k, v in a.save_state().items())
    state = {k: v.clone() for k, v in a.save_state().items()}
    assert state and all(key.startswith("heads.") for key in state)
    assert not torch.equal(a(images())[0], b(images())[0])
    b.load_save_state(state)
    assert torch.equal(a(images())[0], b(images())[0])
