"""DiffAugment's transforms against their definitions."""

import pytest
import torch

from fastgan.common.errors import UserError
from fastgan.discriminator.augment import (
    POLICIES,
    brightness,
    check_policy,
    contrast,
    cutout,
    diff_augment,
    saturation,
    translation,
)

ALL = ("color", "translation", "cutout")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n: int = 2, channels: int = 3, size: int = 16) -> torch.Tensor:
    return torch.rand(n, channels, size, size, generator=generator(9)) * 2 - 1


def test_brightness_adds_one_number_per_image():
    shift = brightness(images(1000, size=2), generator()) - images(1000, size=2)
    per_image = shift.mean(dim=(1, 2, 3))
    torch.testing.assert_close(shift, per_image[:, None, None, None].expand_as(shift))
    assert -0.5 <= per_image.min() < -0.48 and 0.48 < per_image.max() <= 0.5


@pytest.mark.parametrize(
    ("transform", "dims", "low", "high"),
    [(saturation, (1,), 0, 2), (contrast, (1, 2, 3), 0.5, 1.5)],
)
def test_distances_from_a_mean_are_scaled(transform, dims, low, high):
    x = images(1000, size=2)
    out, mean = transform(x, generator()), x.mean(dims, keepdim=True)
    torch.testing.assert_close(out.mean(dims), x.mean(dims))
    factor = ((out - mean) * (x - mean)).sum((1, 2, 3)) / ((x - mean) ** 2).sum((1, 2, 3))
    torch.testing.assert_close(out, mean + (x - mean) * factor[:, None, None, None])
    assert low - 1e-4 <= factor.min() < low + 0.02 and high - 0.02 < factor.max() <= high + 1e-4


@pytest.mark.parametrize("size", [16, 32])
def test_translation_shifts_up_to_an_eighth_with_zeros(size):
    x = images(300, channels=1, size=size)
    out, most = translation(x, generator()), size // 8
    padded = torch.nn.functional.pad(x, [most] * 4)
    seen = set()
    for source, moved in zip(padded, out, strict=True):
        matches = [
            (dy, dx)
            for dy in range(2 * most + 1)
            for dx in range(2 * most + 1)
            if torch.equal(source[:, dy : dy + size, dx : dx + size], moved)
        ]
        assert len(matches) == 1
        seen.update(matches)
    assert {dy for dy, _ in seen} == {dx for _, dx in seen} == set(range(2 * most + 1))


@pytest.mark.parametrize(("size", "length"), [(16, 3), (32, 6)])
def test_cutout_zeroes_one_square(size, length):
    x = torch.ones(500, 2, size, size)
    out = cutout(x, generator())
    assert torch.equal(out[:, 0], out[:, 1])
    holes = out[:, 0] == 0
    heights, widths = holes.any(2).sum(1), holes.any(1).sum(1)
    assert torch.equal(holes.sum((1, 2)), heights * widths)
    assert heights.max() == widths.max() == length
    # Centres run over the whole side, the border included.
    assert holes.any(0)[0].any() and holes.any(0)[-1].any()
    assert heights.min() >= length // 2


def test_draws_come_from_the_generator_alone():
    before = torch.get_rng_state()
    x = images()
    a, b, c = (diff_augment(x, ALL, generator(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("policy", ALL)
def test_gradient_flows(policy):
    x = images(size=6).double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda y: diff_augment(y, (policy,), generator()), x, fast_mode=True
    )
    assert diff_augment(x, (policy,), generator()).dtype == torch.float64


def test_policies_are_checked():
    assert check_policy(list(POLICIES)) == ALL
    with pytest.raises(UserError, match=r"'blur'.*color, translation, cutout"):
        check_policy(["color", "blur"])
