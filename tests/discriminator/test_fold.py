"""Folding BatchNorm into convolutions changes neither maps nor gradients, nor what is saved."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fastgan.discriminator.backbones import Backbone, fold_batch_norms, load_backbone
from fastgan.discriminator.projected import ProjectedDiscriminator, build_projected

SMALL = "test_efficientnet"
# Each network's BatchNorms, all of which follow a convolution.
NORMS = {SMALL: 12, "vgg16_bn": 13, "tf_efficientnet_lite0": 48, "mobilenetv2_100": 51}
NORMS["resnet18"] = 20
NAMES = [SMALL, *(pytest.param(n, marks=pytest.mark.slow) for n in NORMS if n != SMALL)]


def images(n: int = 2, size: int = 64) -> Tensor:
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def make_uneven(network: nn.Module) -> nn.Module:
    """Statistics and affine maps as training leaves them: neither 0 nor 1, of either sign."""
    generator = torch.Generator().manual_seed(0)
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            size = norm.num_features
            norm.running_mean.copy_(torch.randn(size, generator=generator) * 0.3)
            norm.running_var.copy_(torch.rand(size, generator=generator) + 0.2)
            with torch.no_grad():
                norm.weight.copy_(torch.rand(size, generator=generator) * 1.5 - 0.3)
                norm.bias.copy_(torch.randn(size, generator=generator) * 0.2)
    return network.eval()


def backbone(name: str) -> Backbone:
    loaded = load_backbone(name, "random")
    make_uneven(loaded)
    return loaded


def norms(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def maps_and_gradient(network: nn.Module, x: Tensor) -> list[Tensor]:
    """The outputs, and the input's gradient of their weighted sum of squares."""
    x = x.clone().requires_grad_()
    outputs = network(x)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    loss = sum((i + 1) * (y**2).mean() for i, y in enumerate(outputs))
    (gradient,) = torch.autograd.grad(loss, x)
    return [*(y.detach() for y in outputs), gradient]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference of any tensor, relative to its largest number."""
    assert all(e.isfinite().all() and e.abs().max() > 0 for e in expected)
    pairs = zip(found, expected, strict=True)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_folded_backbones_are_the_same_function(name: str, dtype: torch.dtype, most: float) -> None:
    """Reference: the network with its BatchNorms, in float64."""
    whole = smooth(backbone(name).extractor).to(dtype)
    folded = copy.deepcopy(whole)
    assert fold_batch_norms(folded, images(1).to(dtype)) == NORMS[name] == len(norms(whole))
    assert norms(folded) == []
    assert not any(p.requires_grad for p in folded.parameters())
    assert all(p.dtype == dtype for p in folded.parameters())
    found = [t.double() for t in maps_and_gradient(folded, images().to(dtype))]
    assert error(found, maps_and_gradient(whole.double(), images().double())) < most


def smooth(network: nn.Module) -> nn.Module:
    """The network without kinks: rounding decides which side of one a pixel is on, and gradients
    then differ by far more than rounding, folded or not."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.ReLU | nn.ReLU6):
            network.set_submodule(name, nn.SiLU())
        if isinstance(module, nn.MaxPool2d):
            network.set_submodule(name, nn.AvgPool2d(2))
    return network.eval()


def test_networks_without_batch_norm_stay() -> None:
    vit = load_backbone("test_vit", "random")
    before = copy.deepcopy(vit.state_dict())
    assert vit.fold() == 0
    assert all(torch.equal(before[k], v) for k, v in vit.state_dict().items())


def test_a_folded_backbone_compiles_in_one_graph_and_keeps_its_layout() -> None:
    network = backbone(SMALL).to(memory_format=torch.channels_last)
    expected = network(images(1))
    assert network.fold() == 12 and network.fold() == 0
    assert not any(m.training for m in network.modules())
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    compiled = torch.compile(network, fullgraph=True, backend="aot_eager")
    assert error(compiled(images(1)), expected) < 1e-5


class Toy(nn.Module):
    """Convolutions a, b, c and BatchNorms n, m, o, as `way` connects them."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.n, self.m, self.o = (nn.BatchNorm2d(3) for _ in range(3))
        if way in ("tied weight", "tied to an idle one"):
            self.b.weight = self.a.weight
        if way == "two names":
            self.again = self.n
        if way == "computed weight":
            nn.utils.parametrizations.weight_norm(self.a)
        if way == "own class":
            self.n = Doubling(3)
        if way == "batch statistics":
            self.n = nn.BatchNorm2d(3, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.way == "tied to an idle one" else self.a(x)
        match self.way:
            case "used elsewhere":
                return self.n(y) + y.tanh()
            case "two norms":
                return self.n(y) - 2 * self.m(y)
            case "not a convolution":
                return self.n(x) + self.m(y.relu()) + self.o(y + x)
            case "called twice":
                return self.n(y) + self.m(self.a(x.tanh()))
            case "norm called twice":
                return self.n(y) + self.n(self.b(x))
            case "tied weight":
                return self.n(y) + self.b(x)
            case "tied to an idle one":
                return self.n(self.b(x))
            case "two names":
                return self.again(y).relu()
            case "depends on data":
                return self.n(y) if y.sum() > 0 else self.m(y)
            case "a chain":
                return self.c(self.m(self.b(self.n(y).relu())))
        return self.n(y)


class Doubling(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


# How many of the BatchNorms can be proven to be foldable.
WAYS = {
    "straight": 1,
    "a chain": 2,
    "two names": 1,
    "used elsewhere": 0,
    "two norms": 0,
    "not a convolution": 0,
    "called twice": 0,
    "norm called twice": 0,
    "tied weight": 0,
    "tied to an idle one": 0,
    "computed weight": 0,
    "own class": 0,
    "batch statistics": 0,
    "depends on data": 0,
}


@pytest.mark.parametrize("way", WAYS)
def test_only_what_is_proven_is_folded(way: str) -> None:
    toy = Toy(way).double()
    for norm in norms(toy):
        if norm.running_mean is None:
            norm.track_running_stats = True
            norm.register_buffer("running_mean", torch.zeros(3))
            norm.register_buffer("running_var", torch.ones(3))
    make_uneven(toy)
    if way == "batch statistics":
        toy.n.running_mean = toy.n.running_var = None
    whole, x = copy.deepcopy(toy), images(size=8).double()
    assert fold_batch_norms(toy, x) == WAYS[way]
    assert len(norms(toy)) == len(norms(whole)) - WAYS[way]
    assert error(maps_and_gradient(toy, x), maps_and_gradient(whole, x)) < 1e-12


def discriminator(seed: int) -> ProjectedDiscriminator:
    built = build_projected([SMALL], {SMALL: "random"})
    for module in built.backbones:
        make_uneven(module)
    with torch.no_grad():
        for k, p in enumerate(built.heads.parameters()):
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + k)))
    return built.double()


def test_checkpoints_go_between_folded_and_unfolded_discriminators() -> None:
    whole, folded = discriminator(1), discriminator(2)
    x = images(1, 8).double()
    assert folded.fold() == 12
    for source, target in ((whole, folded), (folded, whole)):
        with torch.no_grad():
            next(source.heads.parameters()).add_(1.0)
        state = {k: v.clone() for k, v in source.save_state().items()}
        target.load_save_state(state)
        assert {k: v.shape for k, v in target.save_state().items()} == {
            k: v.shape for k, v in state.items()
        }
        assert all(torch.equal(v, state[k]) for k, v in target.save_state().items())
        assert error(target(x), source(x)) < 1e-9
