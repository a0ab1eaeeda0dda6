"""What tells that a run goes wrong."""

import torch

from fastgan.training.losses import diversity
from fastgan.training.monitor import Health, Skips

FINE = {"Loss/sign_real": 0.6, "Loss/sign_fake": -0.5, "Loss/diversity": 0.9}


def flags(*left_out: int) -> dict[str, torch.Tensor]:
    return {name: torch.tensor(float(f)) for name, f in zip("GDR", left_out, strict=False)}


def test_skips_are_counted_by_update_and_forgotten_once_told() -> None:
    skips = Skips(torch.device("cpu"))
    for step in (flags(1, 0), flags(0, 0), flags(1, 1), flags(0, 0, 1)):
        skips.add(step)
    assert skips.take() == {"G": 2, "D": 1, "R": 1}
    assert skips.take() == {}


def test_the_longest_row_is_kept() -> None:
    """An iteration counts once, however many of its updates were left out; takes do not matter."""
    skips = Skips(torch.device("cpu"))
    assert skips.longest() == 0
    for k, step in enumerate([(1, 1), (0, 1), (1, 0), (0, 0), (1, 0), (0, 1)]):
        skips.add(flags(*step))
        if k == 1:
            skips.take()
    assert skips.longest() == 3


def test_a_sure_discriminator() -> None:
    health = Health()
    assert health.warnings(FINE) == []
    sure = FINE | {"Loss/sign_real": 0.99, "Loss/sign_fake": -0.995}
    (line,) = health.warnings(sure)
    assert "0.99 and -0.99" in line or "0.99 and -1.00" in line
    assert "optim.lr_d" in line and "\n" not in line
    # Sure of one kind only: it answers the same to everything.
    assert health.warnings(FINE | {"Loss/sign_real": 1.0, "Loss/sign_fake": 1.0}) == []


def test_collapse_is_said_again_only_after_it_was_better() -> None:
    health, collapsed = Health(), FINE | {"Loss/diversity": 0.05}
    said = [len(health.warnings(m)) for m in (collapsed, collapsed, FINE, collapsed)]
    assert said == [1, 0, 0, 1]


def test_pretraining_reports_neither() -> None:
    assert Health().warnings({"Loss/denoising": 3.0}) == []


def test_diversity() -> None:
    draw = torch.Generator().manual_seed(0)
    reals = torch.randn(64, 3, 4, 4, generator=draw)
    assert diversity(reals, reals) == 1
    torch.testing.assert_close(diversity(0.5 * reals + 3, reals), torch.tensor(0.5))
    # The same images for every sample, however contrasty each is.
    assert diversity(reals[:1].expand(64, -1, -1, -1), reals) == 0
