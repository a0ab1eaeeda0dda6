"""A small classifier of the embedded digits, whose features measure generated digits."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.data.digits import Digits
from fastgan.errors import UserError
from fastgan.seeding import seeded

CLASSES = 10
_MAX_BYTES = 1 << 20


class DigitClassifier(nn.Module):
    """Two stride-2 convolutions and two linear layers; features are the 32 hidden units."""

    dim = 32

    def __init__(self) -> None:
        super().__init__()
        self.conv0 = nn.Conv2d(1, 16, 3, stride=2, padding=1)
        self.conv1 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.hidden = nn.Linear(32 * 4 * 4, self.dim)
        self.out = nn.Linear(self.dim, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Features [N, 32] of uint8 images [N, 1, 16, 16]."""
        x = images.to(self.out.weight.dtype) / 127.5 - 1
        x = F.relu(self.conv1(F.relu(self.conv0(x))))
        return F.relu(self.hidden(x.flatten(1)))

    def logits(self, images: Tensor) -> Tensor:
        """Class logits [N, 10] of uint8 images [N, 1, 16, 16]."""
        return self.out(self(images))


def train_classifier(data: Digits, *, iterations: int = 1000, seed: int = 0) -> DigitClassifier:
    """Learns the classes of `data`, shifted by up to a pixel; a function of the arguments."""
    with seeded(seed):
        network = DigitClassifier()
    images, labels = torch.from_numpy(data.all_images), torch.from_numpy(data.labels)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    draws = torch.Generator().manual_seed(seed)
    for _ in range(iterations):
        chosen = torch.randint(len(images), (64,), generator=draws)
        dy, dx = torch.randint(-1, 2, (2,), generator=draws).tolist()
        shifted = images[chosen].roll((dy, dx), (2, 3))
        loss = F.cross_entropy(network.logits(shifted), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval().requires_grad_(False)


@torch.no_grad()
def accuracy(network: DigitClassifier, data: Digits) -> float:
    """Share of `data` whose class is the most likely one."""
    predicted = network.logits(torch.from_numpy(data.all_images)).argmax(1)
    return float((predicted == torch.from_numpy(data.labels)).float().mean())


def save_classifier(network: DigitClassifier, path: Path) -> None:
    """Writes the weights as safetensors."""
    save_file(network.state_dict(), path, metadata={"format": "fastgan-digit-classifier"})


def load_classifier(path: str | os.PathLike[str]) -> DigitClassifier:
    """Reads what `save_classifier` wrote; UserError for anything else."""
    file = Path(path)
    network = DigitClassifier()
    try:
        if file.stat().st_size > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        network.load_state_dict(load_file(file))
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"no digit classifier ({reason}), {file}, a file of make pretrain-demo expected"
        ) from error
    return network.eval().requires_grad_(False)
