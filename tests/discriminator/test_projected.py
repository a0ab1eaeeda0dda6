"""The assembled discriminator on tiny random backbones."""

from itertools import combinations

import pytest
import torch

from fastgan.common.errors import UserError
from fastgan.discriminator.projected import build_projected

TINY = "test_efficientnet"
RANDOM = {TINY: "random", "test_vit": "random"}


def images(n: int, size: int = 16, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(n)
    return torch.rand(n, channels, size, size, generator=generator) * 2 - 1


@pytest.fixture(scope="module")
def shared():
    return build_projected([TINY], RANDOM, seed=1)


def test_one_entry_of_logits_per_backbone():
    discriminator = build_projected([TINY, "test_vit"], RANDOM)
    logits = discriminator(images(2))
    # 4x4 patches from each of 4 heads; this ViT's patch grid is 10, not 14: 2x2 patches.
    assert [x.shape for x in logits] == [(2, 4 * 16), (2, 4 * 4)]
    assert all(x.dtype == torch.float32 for x in logits)
    assert [p["backbone"] for p in discriminator.provenance] == [TINY, "test_vit"]


@pytest.mark.parametrize(
    ("name", "patches"),
    [
        ("tf_efficientnet_lite0", 4 * 16),
        pytest.param("deit_base_distilled_patch16_224", 4 * 16, marks=pytest.mark.slow),
        pytest.param("vgg16_bn", 4 * 121, marks=pytest.mark.slow),
    ],
)
def test_published_patch_counts(name, patches):
    discriminator = build_projected([name], {name: "random"})
    with torch.no_grad():
        assert discriminator(images(2))[0].shape == (2, patches)


def test_only_heads_get_gradients_while_the_image_does(shared):
    x = images(2).requires_grad_()
    sum(y.sum() for y in shared(x)).backward()
    assert x.grad.abs().max() > 0
    with_gradient = {name for name, p in shared.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n, _ in shared.named_parameters() if n.startswith("heads.")}
    shared.zero_grad(set_to_none=True)


def test_nothing_frozen_can_be_thawed(shared):
    shared.requires_grad_(False)
    assert not any(p.requires_grad for p in shared.parameters())
    shared.requires_grad_(True)
    trained = {id(p) for p in shared.trainable_parameters()}
    assert {id(p) for p in shared.parameters() if p.requires_grad} == trained
    assert len(trained) == len(list(shared.heads.parameters()))


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_fixed(mode, shared):
    shared.train(mode)
    assert not any(m.training for m in shared.backbones[0].modules())
    assert not any(m.training for m in shared.projections[0].modules())
    norms = [m for m in shared.heads.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 4 + 3 + 2 + 1 and all(m.training for m in norms)


def test_penalty_gradient_reaches_every_head_weight(shared):
    x = images(2).requires_grad_()
    total = sum(y.sum() for y in shared(x))
    (g,) = torch.autograd.grad(total, x, create_graph=True)
    g.square().sum(dim=(1, 2, 3)).mean().backward()
    weights = [p for n, p in shared.heads.named_parameters() if n.endswith("weight_orig")]
    assert all(p.grad.isfinite().all() and p.grad.abs().max() > 0 for p in weights)
    shared.zero_grad(set_to_none=True)


def test_same_seed_same_discriminator_and_global_generator():
    before = torch.get_rng_state()
    a, b, c = (build_projected([TINY], RANDOM, seed=s).save_state() for s in (1, 1, 2))
    assert all(torch.equal(a[k], b[k]) for k in a)
    key = "projections.0.layer0_ccm.weight"
    assert not torch.equal(a[key], c[key])
    assert torch.equal(before, torch.get_rng_state())


def test_saved_state_restores_logits_without_the_backbone():
    a = build_projected(["test_vit"], RANDOM, seed=1)
    b = build_projected(["test_vit"], RANDOM, seed=2)
    b.backbones[0].extractor.load_state_dict(a.backbones[0].extractor.state_dict())
    state = a.save_state()
    assert not any("extractor" in key for key in state)
    assert any("reassembly" in key for key in state) and any("_ccm" in key for key in state)
    b.load_save_state({key: value.clone() for key, value in state.items()})
    x = images(2)
    torch.testing.assert_close(a(x)[0], b(x)[0])


def test_a_state_that_does_not_fit_is_refused(shared):
    state = shared.save_state()
    key = "projections.0.layer0_ccm.weight"
    for bad in (
        {k: v for k, v in state.items() if k != key},
        state | {key: torch.zeros(1)},
        state | {"heads.9.weight": torch.zeros(1)},
    ):
        with pytest.raises(UserError, match="does not fit"):
            shared.load_save_state(bad)


def test_every_head_trains_its_own_copy_of_the_embedding():
    embedding = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    discriminator = build_projected([TINY], RANDOM, label_dim=3, embedding=embedding)
    copies = [p for n, p in discriminator.heads.named_parameters() if n.endswith("embed.weight")]
    assert len(copies) == 4 == len({p.data_ptr() for p in copies})
    assert all(torch.equal(p, embedding) and p.requires_grad for p in copies)


def test_augmentation_is_drawn_per_pass_and_backbone_and_only_with_a_generator():
    discriminator = build_projected([TINY, TINY], RANDOM, augment=("color",))
    x, generator = images(2), torch.Generator().manual_seed(0)
    assert all(view is x for view in discriminator.views(x, None))
    views = [*discriminator.views(x, generator), *discriminator.views(x, generator)]
    assert not any(torch.equal(a, b) for a, b in combinations([x, *views], 2))


def test_bad_arguments_are_user_errors():
    with pytest.raises(UserError, match="no backbones"):
        build_projected([], {})
    with pytest.raises(UserError, match="unknown augmentation 'colour'"):
        build_projected([TINY], RANDOM, augment=("colour",))
