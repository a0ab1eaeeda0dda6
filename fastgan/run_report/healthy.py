"""Which curves a page shows, and what a healthy run's look like."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastgan.config import DiscriminatorKind, LossKind
from fastgan.discriminator.base import Discriminator
from fastgan.run_report.statistics import MEMORY, METRIC, MFU, SKIPPED, SPEED
from fastgan.training.health import LEAST_DIVERSITY, MAX_SKIPPED, SURE


@dataclass(frozen=True)
class Chart:
    """One panel: `keys` of the statistics, a sentence, dotted lines (value, what it means)."""

    title: str
    keys: tuple[str, ...]
    says: str
    lines: tuple[tuple[float, str], ...] = ()
    log: bool = False
    limits: tuple[float, float] | None = None
    from_zero: bool = False

    @property
    def measured(self) -> bool:
        """Whether its points are snapshots, few and far between."""
        return self.keys[0].startswith(METRIC)


def undecided(config: dict[str, Any]) -> tuple[float, float] | None:
    """(Loss/G, Loss/D) of a discriminator whose logits are all 0; None where it is not known.

    A loss is a mean over logits, summed over B feature networks (training/losses.py). The
    non-saturating one has softplus(0) = ln 2 per term, the hinge loss -0 for G and 1 per term for
    D; G has one term, D two.
    """
    branches, kind = _branches(config.get("discriminator")), _get(config.get("loss"), "kind")
    if branches is None or kind not in [each.value for each in LossKind]:
        return None
    if kind == LossKind.hinge.value:
        return 0.0, 2.0 * branches
    return branches * math.log(2), 2 * branches * math.log(2)


def charts(config: dict[str, Any], metrics: Sequence[str]) -> list[Chart]:
    """All panels of a page, fine-tuning's and pre-training's; those without data are left out."""
    measured = [
        Chart(
            metric.removeprefix(METRIC),
            (metric,),
            "Lower is better: it falls, then levels off. One that rises again for several "
            "snapshots says that the best checkpoint is behind.",
        )
        for metric in metrics
    ]
    return [*measured, _losses(config), *_DISCRIMINATOR, *_ANY]


def _losses(config: dict[str, Any]) -> Chart:
    keys, calm = ("Loss/G", "Loss/D"), undecided(config)
    says = "Loss/D going to its lowest while Loss/G climbs says that D wins and G learns little."
    if calm is None:
        return Chart("Losses", keys, says)
    g, d = calm
    return Chart(
        "Losses",
        keys,
        f"An undecided discriminator gives Loss/G {g:.2f} and Loss/D {d:.2f} (dotted): healthy is "
        f"near that, G somewhat above and D somewhat below. {says}",
        ((g, "G undecided"), (d, "D undecided")),
    )


_DISCRIMINATOR = (
    Chart(
        "Mean sign of D's logits",
        ("Loss/sign_real", "Loss/sign_fake"),
        "0 is undecided; real somewhat above and fake somewhat below is healthy. Beyond "
        f"{SURE:g} and {-SURE:g} (dotted) D makes no mistakes that G could learn from, and the log "
        "warns.",
        ((0.0, "undecided"), (SURE, "sure"), (-SURE, "sure")),
        limits=(-1.05, 1.05),
    ),
    Chart(
        "Diversity",
        ("Loss/diversity",),
        "How much the fakes of a batch differ, relative to the reals: near 1 is healthy. Below "
        f"{LEAST_DIVERSITY:g} (dotted) G may be collapsing, and the log warns.",
        ((1.0, "as reals"), (LEAST_DIVERSITY, "collapsing")),
    ),
    Chart(
        "R1",
        ("Loss/R1",),
        "The weighted gradient penalty, logarithmic. It has no right value: growing slowly beside "
        "steady losses is healthy, a jump by orders of magnitude is not.",
        log=True,
    ),
)
_ANY = (
    Chart(
        "Denoising loss",
        ("Loss/denoising",),
        "EDM's loss falls fast, then slowly, and is noisy; its level depends on the resolution and "
        "the data. Healthy is falling without jumps.",
    ),
    Chart(
        "Updates left out",
        (SKIPPED,),
        "Updates per tick that were not finite: 0 is healthy. A few at the start are usual with "
        f"fp16; {MAX_SKIPPED} iterations in a row end the run.",
        from_zero=True,
    ),
    Chart(
        "Images per second",
        (SPEED,),
        "Without evaluation and saving: level is healthy. Dips are data that come too slowly, or "
        "other work on the machine.",
        from_zero=True,
    ),
    Chart(
        "MFU",
        (MFU,),
        "Share of the GPUs' peak bfloat16 rate that the iteration's own products take: level is "
        "healthy.",
        from_zero=True,
    ),
    Chart(
        "Peak GPU memory, GiB",
        (MEMORY,),
        "The highest allocation since the start: level after the first ticks is healthy.",
        from_zero=True,
    ),
)


def _branches(discriminator: Any) -> int | None:
    """B, the number of feature networks over which the loss is summed."""
    kind = _get(discriminator, "kind")
    if kind == DiscriminatorKind.diffusion.value:
        # Its heads, that on the pixels too, answer as one network.
        return Discriminator.branches
    backbones = _get(discriminator, "backbones")
    if kind == DiscriminatorKind.projected.value and isinstance(backbones, list) and backbones:
        return len(backbones)
    return None


def _get(group: Any, key: str) -> Any:
    return group.get(key) if isinstance(group, dict) else None
