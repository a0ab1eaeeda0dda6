"""One iteration of the GAN fine-tune in counts, read off the networks of a configuration.

Networks run on the meta device, which has shapes and no numbers, and products are counted by
PyTorch's formulas (torch.utils.flop_counter: 2 FLOP per weight and position). FlopCounterMode gives
sums by module; a budget needs every call, its traffic and the gradients that it wants, so that
`Layers` is a mode over the same formulas. Not counted: arithmetic that is no product (norms,
resizing, losses), and spectral norm's power iterations, which do not grow with the batch.

How often each layer runs, per image, as fastgan/training/step.py does it (G and D: forward FLOP;
dx, dw: gradients to inputs and weights, each as many FLOP as forward, attention's dx twice):

    G step   G + D + dx of D + dx and dw of G, dw only where a parameter trains
    D step   G, unless fakes are shared, + 2 (D + dw of the heads + dx inside the heads), without
             the frozen part of D for shared fakes that are not augmented
    R1       (D + dx of D + dx of the frozen part + heads again + 2 dw and dx of the heads) / 16

R1's second backward differentiates dx for the heads' parameters. dx is linear in the gradient, so
that its derivative passes the frozen part once more, as expensive as dx, and the heads once, with a
dw beside it; the heads' BatchNorm makes dx depend on the activations too, which leads back through
the heads' own forward pass: another dx and dw. (The last convolution has no BatchNorm behind it and
is counted as if it had.) What is computed again to save memory is not counted: blocks with
generator.checkpoint, and shared fakes in G's step where a batch takes several rounds.
"""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from fastgan_kernels.dispatch import twice_differentiable
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastgan import config as cfg
from fastgan.common.noise import seeded
from fastgan.discriminator.base import Discriminator
from fastgan.discriminator.diffusion_features import DiffusionDiscriminator
from fastgan.launch import build
from fastgan.models import Precond, network_from_config
from fastgan.models.freeze import freeze
from fastgan.models.sampling import few_step
from fastgan.performance.live_step import NoiseImages, architecture_of

Kind = Literal["product", "attention", "norm"]
Part = Literal["generator", "features", "heads"]
META = torch.device("meta")
_ATEN = torch.ops.aten
# Where each norm has its weight among its arguments.
_NORMS = {_ATEN.native_group_norm: 1, _ATEN.native_layer_norm: 2, _ATEN.native_batch_norm: 1}


@dataclass(frozen=True)
class Layer:
    """One call of a layer for one image; traffic in elements, as if nothing were fused into it but
    what stands beside it here (SiLU, bias, an eval BatchNorm)."""

    kind: Kind
    flop: int = 0
    """Forward. A gradient to the weight costs the same."""
    moved: int = 0
    """Read and written forward, without weights."""
    moved_back: int = 0
    """Read and written for the gradient to the input, or to the weight."""
    weights: int = 0
    """Read once by a pass over a whole batch."""
    trains: bool = False
    """Whether its weight wants a gradient."""
    input_grad: bool = False
    """Whether what it read wants a gradient."""

    @property
    def input_grad_flop(self) -> int:
        return self.flop * (2 if self.kind == "attention" else 1)


class Layers(TorchDispatchMode):
    """Notes in `found` the layers that run inside, on one image and the meta device.

    `ours`: they are our UNets', which fuse attention and hold a resampling filter in registers. Ops
    of kernels/ are seen as their plain definitions only (twice_differentiable).
    """

    def __init__(self, *, ours: bool = False) -> None:
        super().__init__()
        self.found: list[Layer] = []
        self._ours = ours
        self._half: tuple[int, int] | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        op = func.overloadpacket
        if op in _NORMS:
            self._norm(op, args)
        elif op in flop_registry:
            count = flop_registry[op](*args, **(kwargs or {}), out_val=y)
            (self._attention if op is _ATEN.bmm else self._product)(op, args, y, count)
        return y

    def _norm(self, op: Any, args: tuple[Any, ...]) -> None:
        """Reads x, writes y; back, reads x and dy, writes dx. A batch's statistics are a second
        reading; with those of training it is part of a neighbour."""
        x, weight, of_batch = args[0], args[_NORMS[op]], op is _ATEN.native_batch_norm
        if of_batch and not args[5]:
            return
        moved, back = (3, 5) if of_batch else (2, 3)
        trains = weight is not None and weight.requires_grad
        n = x.numel()
        layer = Layer("norm", 0, moved * n, back * n, trains=trains, input_grad=x.requires_grad)
        self.found.append(layer)

    def _product(self, op: Any, args: tuple[Any, ...], y: Tensor, count: int) -> None:
        """x times a weight that is used at each of some positions."""
        x, weight = args[1:3] if op is _ATEN.addmm else args[:2]
        filtered = self._ours and op is _ATEN.convolution and args[8] > 1
        weights, moved = 0 if filtered else weight.numel(), x.numel() + y.numel()
        gradients = weight.requires_grad, x.requires_grad
        self.found.append(Layer("product", count, moved, moved, weights, *gradients))

    def _attention(self, op: Any, args: tuple[Any, ...], y: Tensor, count: int) -> None:
        """Two products, q k^T = P and P v. Unless fused, P is written, read and written by a
        softmax, and read again."""
        read = args[0].numel() + args[1].numel()
        if self._half is None:
            self._half = read, y.numel()
            return
        (sides, scores), self._half = self._half, None
        sides += read - scores + y.numel()
        extra = 0 if self._ours else 4 * scores
        wanted = any(x.requires_grad for x in args)
        self.found.append(
            Layer("attention", 2 * count, sides + extra, 2 * sides + extra, input_grad=wanted)
        )


def flop(layers: Iterable[Layer], kind: Kind | None = None) -> int:
    """FLOP of one forward pass, of layers of one kind or of all."""
    return sum(layer.flop for layer in layers if kind in (None, layer.kind))


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
    """An experiment's iteration."""

    work: tuple[Work, ...]
    trained: int
    """Parameters of the generator that train."""
    heads: int
    """Those of the heads."""

    @property
    def flop(self) -> float:
        """Per image."""
        return sum(work.flop for work in self.work)

    @property
    def allreduce_bytes(self) -> int:
        """Float32 gradients that every GPU hands over in an iteration (R1: `heads` once more)."""
        return 4 * (self.trained + self.heads)

    def layers(self, *parts: Part) -> list[Layer]:
        """Of one forward pass."""
        return [work.layer for work in self.work if work.part in parts]


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
    if architecture is None:
        architecture = architecture_of(config)
    schedule = (config.generator, config.freeze, config.share_fakes, config.loss.r1_interval)
    key = repr((architecture, config.discriminator, schedule))
    if key not in _counted:
        with twice_differentiable():
            _counted[key] = _iteration(config, *meta_networks(config, architecture))
    return _counted[key]


_counted: dict[str, Iteration] = {}


def meta_networks(
    config: cfg.TrainConfig, architecture: Mapping[str, Any]
) -> tuple[Precond, Discriminator]:
    """Generator and discriminator of `config` as they train, without any weights."""
    without = replace(config.discriminator, class_embedding=None)
    without.weights = dict.fromkeys(without.backbones, "random")
    data = NoiseImages(architecture, 1)
    images = {"img_resolution": data.resolution, "img_channels": data.channels}
    fixed = {"precond": "D2OPrecond", "dropout": 0.0}
    # The constructors draw from the global generator, although there is nothing to draw for.
    with seeded(0):
        with META:
            generator = network_from_config({**images, **architecture, **fixed})
        # An encoder of the discriminator's own comes from a file, onto the CPU.
        with META if without.network is None else nullcontext():
            d = build.discriminator(replace(config, discriminator=without), generator, data)
    freeze(generator.train(), config.freeze.level)
    return generator, d.to(META).train()


def _iteration(config: cfg.TrainConfig, generator: Precond, d: Discriminator) -> Iteration:
    """Every layer of both networks with how often it runs; see the formula above."""
    g, classes, size = config.generator, generator.label_dim, generator.model.img_resolution
    images = torch.empty(1, generator.model.img_channels, size, size, device=META)
    labels = torch.empty(1, classes, device=META) if classes else None
    shared, interval = config.share_fakes, config.loss.r1_interval
    r1 = 1 / interval if interval else 0.0

    with Layers(ours=True) as found:
        few_step(generator, images, labels, steps=g.steps, mid_sigma=g.mid_sigma)
    work = [Work("generator", x, 1 if shared else 2, x.input_grad, x.trains) for x in found.found]
    # G's step, D's on fakes and reals, and R1, which passes what is frozen twice backward.
    encoded = 1 + 2 + r1 - (shared and not d.augment)
    for branch, view in enumerate(d.views(images.requires_grad_(), None)):
        with Layers(ours=isinstance(d, DiffusionDiscriminator)) as frozen:
            maps = d.features(branch, view, labels)
        with Layers() as attacked:  # with a gradient down to the image
            d.judge(branch, maps, labels)
        with Layers() as trained:
            d.judge(branch, [x.detach() for x in maps], labels)
        work += [Work("features", x, encoded, x.input_grad * (1 + 2 * r1), 0) for x in frozen.found]
        work += [
            Work(
                "heads",
                x,
                forward=1 + 2 + 2 * r1,
                input_grad=x.input_grad * (1 + r1) + y.input_grad * (2 + r1),
                weight_grad=x.trains * (2 + 2 * r1),
            )
            for x, y in zip(attacked.found, trained.found, strict=True)
        ]
    trains = sum(p.numel() for p in generator.parameters() if p.requires_grad)
    return Iteration(tuple(work), trains, sum(p.numel() for p in d.trainable_parameters()))
