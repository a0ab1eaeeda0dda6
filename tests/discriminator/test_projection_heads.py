"""Random projection and heads: names, initialisation, norms, sizes."""

import math

import pytest
import torch
from torch.nn import functional as F

from fastgan.discriminator.heads import ConditionalPatchHead, PatchHead
from fastgan.discriminator.projected import RandomProjection


def features(n: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, channels, size, size, generator=generator)
        for channels, size in [(3, 16), (4, 8), (5, 4), (6, 2)]
    ]


def test_projection_widths_and_sizes():
    projection = RandomProjection([3, 4, 5, 6])
    sizes = [(x.shape[1], x.shape[3]) for x in projection(features())]
    assert sizes == [(64, 32), (64, 16), (128, 8), (256, 4)]
    assert projection.get_parameter("layer3_ccm.weight").shape == (512, 6, 1, 1)


def test_projection_mixes_across_scales():
    """The deepest level reaches every output, the shallowest only its own."""
    projection = RandomProjection([3, 4, 5, 6])
    base = projection(features())
    deep = features()
    deep[3] = deep[3] + 1
    assert all(not torch.equal(a, b) for a, b in zip(base, projection(deep), strict=True))
    shallow = features()
    shallow[0] = shallow[0] + 1
    same = [torch.equal(a, b) for a, b in zip(base, projection(shallow), strict=True)]
    assert same == [False, True, True, True]


def test_projection_takes_maps_that_do_not_halve_exactly():
    maps = [torch.zeros(1, c, s, s) for c, s in [(3, 25), (4, 12), (5, 5), (6, 2)]]
    sizes = [x.shape[-1] for x in RandomProjection([3, 4, 5, 6])(maps)]
    assert sizes == [50, 25, 12, 5]


@pytest.mark.parametrize(
    ("nominal", "size", "channels", "patches"),
    [
        (128, 112, [64, 64, 128, 256, 512], 4),
        (64, 56, [64, 128, 256, 512], 4),
        (32, 28, [64, 256, 512], 4),
        (16, 14, [64, 512], 4),
        (16, 28, [64, 512], 11),
    ],
)
def test_head_depth_and_widths(nominal, size, channels, patches):
    head = PatchHead(64, nominal)
    weights = [
        v.shape[:2] for k, v in head.state_dict().items() if k.endswith("main.0.weight_orig")
    ]
    pairs = list(zip(channels[1:], channels[:-1], strict=True))
    assert [tuple(w) for w in weights] == pairs
    assert head(torch.zeros(2, 64, size, size)).shape == (2, 1, patches, patches)


def test_head_stays_in_train_mode():
    """The batch decides the normalisation and every pass moves running statistics, also in eval."""
    head = PatchHead(3, 16).eval()
    x = torch.randn(4, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    before = head.main[0].main[1].running_mean.clone()
    alone = head(x[:2])
    together = head(x)[:2]
    assert not torch.allclose(alone, together, atol=1e-4)
    assert not torch.equal(before, head.main[0].main[1].running_mean)


def test_last_convolution_has_unit_spectral_norm_once_converged():
    head = PatchHead(3, 16)
    x = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    for _ in range(200):
        head(x)
    for convolution in (head.main[0].main[0], head.main[1]):
        matrix = convolution.weight.detach().flatten(1)
        assert torch.linalg.matrix_norm(matrix, 2).item() == pytest.approx(1, abs=1e-2)


def test_conditional_logits_by_hand():
    embedding = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    head = ConditionalPatchHead(3, 16, embedding)
    assert not torch.any(head.embed_proj.bias)
    x = torch.randn(2, 3, 14, 14, generator=torch.Generator().manual_seed(0))
    labels = F.one_hot(torch.tensor([4, 1]), 5).float()
    logits = head(x, labels)
    rows = embedding[[4, 1]] @ head.embed_proj.weight.T / math.sqrt(7)
    weights = math.sqrt(2) * torch.where(rows > 0, rows, 0.2 * rows)
    maps = F.conv2d(head.main(x), head.cls.weight)
    expected = torch.einsum("nchw,nc->nhw", maps, weights)[:, None] / 8
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
