"""Signs that a run goes wrong: updates left out, a collapsing G, a D that is too sure."""

import torch
from torch import Tensor

# After this many iterations in a row with something left out the run has diverged.
MAX_SKIPPED = 10
# Exit status of a diverged run.
DIVERGED = 3
# Mean sign of D's logits, over a tick, beyond which D makes no mistakes that G could learn from.
SURE = 0.98
# Spread of the fakes of a batch, relative to the reals', below which G makes few different images.
LEAST_DIVERSITY = 0.5


class Diverged(Exception):
    """Too many iterations in a row had something not finite; commands exit with DIVERGED."""


class Skips:
    """Counts updates left out, on their device; the host asks once a tick."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._counts: dict[str, Tensor] = {}
        self._some, self._in_a_row, self._longest = torch.zeros(3, device=device).unbind()

    def add(self, skipped: dict[str, Tensor]) -> None:
        """`skipped`: for every update of an iteration 1 where it was left out, else 0."""
        self._some.zero_()
        for name, left_out in skipped.items():
            if name not in self._counts:
                self._counts[name] = torch.zeros((), device=self._device)
            self._counts[name].add_(left_out)
            torch.maximum(self._some, left_out, out=self._some)
        self._in_a_row.add_(1).mul_(self._some)
        torch.maximum(self._longest, self._in_a_row, out=self._longest)

    def take(self) -> dict[str, int]:
        """How many of each update were left out since it was asked last; no zeros."""
        counts = {name: int(total) for name, total in self._counts.items()}
        for total in self._counts.values():
            total.zero_()
        return {name: count for name, count in counts.items() if count}

    def longest(self) -> int:
        """The most iterations in a row with something left out, since the start."""
        return int(self._longest)


class Health:
    """Says once what looks wrong in a tick's means, and again only after it looked right."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def warnings(self, means: dict[str, float]) -> list[str]:
        """New warnings, a line each, with advice; `means` are by the statistics file's names."""
        found = {}
        real, fake = means.get("Loss/sign_real", 0.0), means.get("Loss/sign_fake", 0.0)
        if real > SURE and fake < -SURE:
            found["sure"] = (
                f"warning: D tells all images apart (mean signs {real:.2f} and {fake:.2f}), G gets "
                "little to learn from; a lower optim.lr_d, a higher loss.r1_gamma or more of "
                "discriminator.augment would help"
            )
        if means.get("Loss/diversity", 1.0) < LEAST_DIVERSITY:
            found["collapse"] = (
                f"warning: fakes of a batch differ {means['Loss/diversity']:.2f} times as much as "
                "reals, G may be collapsing; see the grids in samples/; a lower optim.lr_g, a "
                "higher freeze.level or an earlier checkpoint would help"
            )
        new = [line for kind, line in found.items() if kind not in self._said]
        self._said = set(found)
        return new
