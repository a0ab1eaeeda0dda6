"""Small classifiers as feature networks: CIFAR ResNet-56 ("FD-R56") and the demo's for digits.

ResNet-56 (He et al. 2015, section 4.2): 3 stages x 9 blocks of 16, 32, 64 channels at 32, 16, 8
pixels; where a stage narrows, the shortcut is option A: every second pixel, missing channels as
zeros, no parameters. Features: the 64 channels averaged over the last 8x8 pixels, before the
classifier. The digits' own classifier has two convolutions and is trained in seconds.
"""

import os
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastgan.common.errors import UserError
from fastgan.common.files import require_file
from fastgan.common.noise import seeded
from fastgan.data.dataset import Digits
from fastgan.evaluation.features import Device, FromFile, to_rgb
from fastgan.evaluation.frechet import Where

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)
CLASSES = 10  # of the digits
_MAX_BYTES = 1 << 24  # ResNet-56 takes 3.4 MB
Network = TypeVar("Network", bound=nn.Module)


class BasicBlock(nn.Module):
    """relu(bn2(conv2(relu(bn1(conv1 x)))) + shortcut(x)), [N, C, H, W]."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.padding = (channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        # Zeros on both sides of the old channels, as the published weights were trained with.
        return F.relu(h + F.pad(shortcut, (0, 0, 0, 0, self.padding, self.padding)))


class CifarResNet(nn.Module):
    """ResNet-(6 blocks + 2) for 32x32 RGB, normalised images: 56 layers with 9 blocks a stage."""

    def __init__(self, blocks: int = 9, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks, stride=1)
        self.layer2 = _stage(16, 32, blocks, stride=2)
        self.layer3 = _stage(32, 64, blocks, stride=2)
        self.linear = nn.Linear(64, classes)

    def features(self, x: Tensor) -> Tensor:
        """Pooled features [N, 64] of normalised images [N, 3, 32, 32]."""
        x = F.relu(self.bn1(self.conv1(x)))
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Class logits [N, classes]."""
        return self.linear(self.features(x))


class ResNet56Features(FromFile):
    """64 pooled features of 32x32 images. UserError: weights that do not fit ResNet-56."""

    name = "R56"
    dim = 64
    resize = "none (32x32 images)"

    def __init__(self, weights: Where, device: Device) -> None:
        path = require_file(weights, "the ResNet-56 weights (.safetensors)")
        super().__init__(path, device)
        right = "right are the weights of a CIFAR-10 ResNet-56 (conv1, layer1.0.conv1 ... linear)"
        self._net = _loaded(CifarResNet, path, "ResNet-56", right).to(self.device)
        self._mean = torch.tensor(_MEAN, device=self.device)[:, None, None]
        self._std = torch.tensor(_STD, device=self.device)[:, None, None]

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 1 or 3, 32, 32] -> [N, 64]."""
        if tuple(images.shape[2:]) != (32, 32):
            raise UserError(
                f"images of {images.shape[2]}x{images.shape[3]}, given to the extractor resnet56, "
                "right is 32x32: choose another extractor for other sizes"
            )
        x = to_rgb(images).to(self.device).float() / 255
        return self._net.features((x - self._mean) / self._std)


def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))


def _loaded(network: type[Network], path: Where, name: str, right: str) -> Network:
    """The network with the weights in `path`, float32, in eval mode; UserError for other files."""
    with torch.device("meta"):  # so that no random number is drawn
        net = network()
    try:
        if os.path.getsize(path) > _MAX_BYTES:
            raise ValueError(f"larger than {_MAX_BYTES} bytes")
        # BatchNorm's counters, which published files leave out, are filled in by PyTorch.
        net.load_state_dict({k: v.float() for k, v in load_file(path).items()}, assign=True)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise UserError(f"no {name} ({error}), file {path}, {right}") from error
    return net.eval().requires_grad_(False)


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


def load_classifier(path: Where) -> DigitClassifier:
    """Reads what `save_classifier` wrote; UserError for anything else."""
    right = "a file of make pretrain-demo expected"
    return _loaded(DigitClassifier, path, "digit classifier", right)


class ClassifierFeatures(FromFile):
    """The 32 features of the digit classifier in `weights`."""

    name = "classifier"
    dim = DigitClassifier.dim
    resize = "none"

    def __init__(self, weights: Where, device: Device) -> None:
        path = require_file(weights, "the classifier's weights (.safetensors)")
        super().__init__(path, device)
        self._net = load_classifier(path).to(self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 [N, 1, 16, 16] -> [N, 32]."""
        return self._net(images.to(self.device))
