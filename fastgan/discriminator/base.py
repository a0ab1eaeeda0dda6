"""What every discriminator offers to the training step and to checkpoints."""

from collections.abc import Iterator, Mapping
from typing import Self

import torch
from torch import Tensor, nn

from fastgan.common.errors import UserError


class Discriminator(nn.Module):
    """Trained `heads` on frozen features.

    Calling it on images [N, C, H, W] in [-1, 1] (and one-hot labels [N, label_dim]) returns a list
    of logits [N, patches] in the heads' own dtype; the loss averages within an entry and sums over
    entries. `generator` makes the draws of DiffAugment; None leaves images alone (R1 does).
    """

    heads: nn.ModuleList
    # Policies of DiffAugment; without any, every view of an image is the image.
    augment: tuple[str, ...] = ()
    # How many feature networks answer.
    branches = 1
    # Names of the submodules whose tensors come from files of their own, not from checkpoints.
    loaded_elsewhere: tuple[str, ...]
    provenance: list[dict[str, str]]

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        views = self.views(images, generator)
        return [self.judge(i, self.features(i, x, labels), labels) for i, x in enumerate(views)]

    def views(self, images: Tensor, generator: torch.Generator | None) -> list[Tensor]:
        """What each branch looks at: the images, augmented for each of them apart."""
        raise NotImplementedError

    def features(self, index: int, view: Tensor, labels: Tensor | None) -> list[Tensor]:
        """What one feature network shows its heads: nothing in it trains or is random."""
        raise NotImplementedError

    def judge(self, index: int, features: list[Tensor], labels: Tensor | None) -> Tensor:
        """The logits [N, patches] of one feature network's heads."""
        raise NotImplementedError

    def compute_in(self, features: torch.dtype | None, heads: torch.dtype | None) -> None:
        """What the frozen features and the heads compute in from now on; None: as parameters are.

        Parameters, the statistics of BatchNorm and the logits stay as they are.
        """
        raise NotImplementedError

    def store_frozen(self) -> None:
        """Keeps weights that no checkpoint holds in the dtype that they compute in, for good."""
        raise NotImplementedError

    def fold(self) -> int:
        """Before training: makes BatchNorms of the pre-trained features parts of convolutions.

        The function and what a checkpoint holds stay the same. Returns how many there were.
        Call it before `store_frozen`.
        """
        return 0

    def trainable_parameters(self) -> Iterator[nn.Parameter]:
        """The heads' parameters: what an optimiser gets."""
        return self.heads.parameters()

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Switches the heads only: nothing frozen can be thawed by toggling between G and D."""
        self.heads.requires_grad_(requires_grad)
        return self

    def save_state(self) -> dict[str, Tensor]:
        """What a checkpoint holds: heads with their running statistics, and the random mixing."""
        elsewhere = tuple(f"{prefix}." for prefix in self.loaded_elsewhere)
        return {k: v for k, v in self.state_dict().items() if not k.startswith(elsewhere)}

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
