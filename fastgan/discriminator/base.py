"""What every discriminator offers to the training step and to checkpoints."""

from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from fastgan.errors import UserError


class Discriminator(nn.Module):
    """Trained `heads` on frozen features.

    Calling it on images [N, C, H, W] in [-1, 1] (and one-hot labels [N, label_dim]) returns a list
    of logits [N, patches] in the parameters' dtype; the loss averages within an entry and sums over
    entries. `generator` makes the draws of DiffAugment; None leaves images alone (R1 does).
    """

    heads: nn.ModuleList
    # Names of the submodules whose tensors come from files of their own, not from checkpoints.
    loaded_elsewhere: tuple[str, ...]
    provenance: list[dict[str, str]]

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        raise NotImplementedError

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The heads' parameters: what an optimiser gets."""
        return self.heads.parameters()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Switches the heads only: nothing frozen can be thawed by toggling between G and D."""
        self.heads.requires_grad_(requires_grad)
        return self

    def save_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: heads with their running statistics, and the random mixing."""
        return {k: v for k, v in self.state_dict().items() if self._is_saved(k)}

    def load_save_state(self, state: Mapping[str, Tensor]) -> None:
        """Restores `save_state`'s tensors; UserError when names or shapes differ."""
        own = self.save_state()
        wrong = sorted(own.keys() ^ state.keys())
        wrong += [k for k in own.keys() & state.keys() if own[k].shape != state[k].shape]
        if wrong:
            raise UserError(
                f"discriminator state does not fit, at {wrong[0]} ({len(wrong)} tensors differ), "
                "the same backbones, label_dim and widths as when it was saved expected"
            )
        self.load_state_dict(dict(state), strict=False)

    def _is_saved(self, name: str) -> bool:
        return not name.startswith(tuple(f"{prefix}." for prefix in self.loaded_elsewhere))
