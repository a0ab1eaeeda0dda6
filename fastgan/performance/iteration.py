"""One iteration of the GAN fine-tune in counts: how often each layer runs, and in which direction.

Per image, as fastgan/training/step.py does it (G and D: forward FLOP; dx, dw: gradients to inputs
and weights, each as many FLOP as forward, attention's dx twice as many):

    G step   G + D + dx of D + dx and dw of G, dw only where a parameter trains
    D step   G, unless fakes are shared, + 2 (D + dw of the heads + dx inside the heads), without
             the frozen part of D for shared fakes that are not augmented
    R1       (D + dx of D + dx of the frozen part + heads again + 2 dw and dx of the heads) / 16

R1's second backward differentiates dx for the heads' parameters. dx is linear in the gradient, so
that its derivative passes the frozen part once more, as expensive as dx, and the heads once, with a
dw beside it; the heads' BatchNorm makes dx depend on the activations too, which leads back through
the heads' own forward pass: another dx and dw. (The last convolution has no BatchNorm behind it and
is counted as if it had.) No gradient is computed for what no trained parameter stands in front of.

What is computed again to save memory is not counted: blocks with generator.checkpoint, and shared
fakes in G's step where a batch takes several rounds.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastgan import config as cfg
from fastgan.checkpoint.network_file import load_network_file
from fastgan.common.noise import seeded
from fastgan.discriminator.base import Discriminator
from fastgan.discriminator.diffusion_features import DiffusionDiscriminator
from fastgan.discriminator.projected import build_projected
from fastgan.launch.checks import existing
from fastgan.models import Precond, network_from_config
from fastgan.models.freeze import freeze
from fastgan.models.sampling import few_step
from fastgan.performance.counts import Layer, layers_of

Part = Literal["generator", "backbone", "mixing", "heads"]
META = torch.device("meta")
# Where no dataset says otherwise; fastgan.performance.live_step measures with the same.
_IMAGES = {"img_resolution": 32, "img_channels": 3}


@dataclass(frozen=True)
class Networks:
    """Generator and discriminator on the meta device, frozen as the experiment says."""

    generator: Precond
    discriminator: Discriminator
    steps: int = 1
    mid_sigma: float | None = None

    def generator_layers(self) -> list[Layer]:
        """Of one fake, all its network evaluations."""
        z, labels = self._images(), self._labels()
        return layers_of(
            self.generator,
            lambda: few_step(self.generator, z, labels, steps=self.steps, mid_sigma=self.mid_sigma),
        )

    def discriminator_layers(self, *, image_grad: bool) -> list[Layer]:
        """Of one image; `image_grad`: whether its gradient is wanted (G step and R1)."""
        images, labels = self._images().requires_grad_(image_grad), self._labels()
        return layers_of(self.discriminator, lambda: self.discriminator(images, labels))

    def _images(self) -> Tensor:
        unet = self.generator.model
        size = unet.img_resolution
        return torch.empty(1, unet.img_channels, size, size, device=META)

    def _labels(self) -> Tensor | None:
        classes = self.generator.label_dim
        return torch.empty(1, classes, device=META) if classes else None


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters."""

    generator: int
    trained: int
    """Of the generator's."""
    frozen_discriminator: int
    heads: int

    @property
    def allreduce_bytes(self) -> int:
        """Float32 gradients that every GPU hands over in an iteration (R1: `heads` once more)."""
        return 4 * (self.trained + self.heads)


@dataclass(frozen=True)
class Work:
    """How often a layer runs per image in an iteration, R1 as its share of one."""

    part: Part
    layer: Layer
    forward: float
    input_grad: float
    weight_grad: float

    @property
    def flop(self) -> float:
        forward_like = self.forward + self.weight_grad
        return forward_like * self.layer.flop + self.input_grad * self.layer.input_grad_flop


@dataclass(frozen=True)
class Iteration:
    """An experiment's iteration; layers are of one forward pass."""

    generator: tuple[Layer, ...]
    discriminator: tuple[Layer, ...]
    work: tuple[Work, ...]
    parameters: Parameters
    has_r1: bool

    @property
    def flop(self) -> float:
        """Per image."""
        return sum(work.flop for work in self.work)


def part_of(name: str) -> Part:
    """Which part of a discriminator a layer belongs to, by its submodule's name."""
    if name.startswith("heads."):
        return "heads"
    return "mixing" if name.startswith("projections.") or ".reassembly." in name else "backbone"


def iteration_flop(config: cfg.TrainConfig, architecture: Mapping[str, Any] | None = None) -> float:
    """FLOP per image of an iteration of `config`, on its own schedule, R1 in its share.

    `architecture`: the generator's, where it is known (launch.build.Model has it); otherwise
    init.path's or init.network. Counted once per process. UserError where no network can be built.
    """
    return count_iteration(config, architecture).flop


def count_iteration(
    config: cfg.TrainConfig, architecture: Mapping[str, Any] | None = None
) -> Iteration:
    """What an iteration of `config` does; arguments and errors as for `iteration_flop`."""
    architecture = _architecture(config) if architecture is None else architecture
    schedule = (config.generator, config.freeze, config.share_fakes, config.loss.r1_interval)
    key = repr((architecture, config.discriminator, schedule))
    if key not in _counted:
        networks = meta_networks(config, architecture)
        _counted[key] = _iteration(networks, config.share_fakes, config.loss.r1_interval)
    return _counted[key]


_counted: dict[str, Iteration] = {}


def meta_networks(config: cfg.TrainConfig, architecture: Mapping[str, Any]) -> Networks:
    """The networks of `config` around a generator of `architecture`, without any weights."""
    # The constructors draw from the global generator, although there is nothing to draw for.
    with META, seeded(0):
        generator = _network(architecture)
        discriminator = _discriminator(config.discriminator, generator)
    freeze(generator.train(), config.freeze.level)
    steps, mid_sigma = config.generator.steps, config.generator.mid_sigma
    return Networks(generator, discriminator.train(), steps, mid_sigma)


def _discriminator(d: cfg.DiscriminatorConfig, generator: Precond) -> Discriminator:
    """As fastgan.launch.build makes it, with random weights instead of files."""
    label_dim = generator.label_dim
    if d.kind is cfg.DiscriminatorKind.projected:
        weights = dict.fromkeys(d.backbones, "random")
        return build_projected(list(d.backbones), weights, label_dim=label_dim, augment=d.augment)
    encoder, unet = generator, generator.model
    if d.network is not None:
        encoder = _network(_described(d.network, "discriminator.network"))
    shape = (unet.img_channels, unet.img_resolution, unet.img_resolution)
    return DiffusionDiscriminator(
        encoder, shape, width=d.width, label_dim=label_dim, augment=tuple(d.augment)
    )


def _network(architecture: Mapping[str, Any]) -> Precond:
    fixed = {"precond": "D2OPrecond", "dropout": 0.0}
    return network_from_config({**_IMAGES, **architecture, **fixed})


def _architecture(config: cfg.TrainConfig) -> Mapping[str, Any]:
    if config.init.path is not None:
        return _described(config.init.path, "init.path")
    return config.init.network


def _described(path: str, key: str) -> Mapping[str, Any]:
    return load_network_file(existing(path, key)).config


def _iteration(networks: Networks, share_fakes: bool, r1_interval: int) -> Iteration:
    generator = networks.generator_layers()
    seen_by_g = networks.discriminator_layers(image_grad=True)
    seen_by_d = networks.discriminator_layers(image_grad=False)
    r1 = 1 / r1_interval if r1_interval else 0.0
    encoded_again = not (share_fakes and not networks.discriminator.augment)
    work = [_generator_work(layer, share_fakes) for layer in generator]
    pairs = zip(seen_by_g, seen_by_d, strict=True)
    work += [_discriminator_work(*pair, r1, encoded_again) for pair in pairs]
    parameters = _parameters(networks)
    return Iteration(tuple(generator), tuple(seen_by_g), tuple(work), parameters, r1 > 0)


def _generator_work(layer: Layer, share_fakes: bool) -> Work:
    forward = 1 if share_fakes else 2
    return Work("generator", layer, forward, layer.input_grad, layer.trains)


def _discriminator_work(attacked: Layer, trained: Layer, r1: float, encoded_again: bool) -> Work:
    """`attacked`: with a gradient down to the image; `trained`: without. See the formula above."""
    part = part_of(attacked.name)
    forward, input_grad = 1.0, float(attacked.input_grad)  # G step
    forward, input_grad = forward + 2, input_grad + 2 * trained.input_grad  # D step
    weight_grad = 2.0 * trained.trains
    if part == "heads":
        forward += 2 * r1
        input_grad += r1 * (attacked.input_grad + trained.input_grad)
        weight_grad += 2 * r1 * trained.trains
    else:
        forward += r1 - (not encoded_again)
        input_grad += 2 * r1 * attacked.input_grad
    return Work(part, attacked, forward, input_grad, weight_grad)


def _parameters(networks: Networks) -> Parameters:
    g, d = networks.generator, networks.discriminator
    heads = _count(d.trainable_parameters())
    return Parameters(
        generator=_count(g.parameters()),
        trained=_count(p for p in g.parameters() if p.requires_grad),
        frozen_discriminator=_count(d.parameters()) - heads,
        heads=heads,
    )


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(p.numel() for p in parameters)
