"""engine=compiled and engine=fast against the plain step: twenty iterations, R1 among them.

On the CPU; what a GPU records and replays is in test_fast.py.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fastgan.discriminator.projected import ProjectedDiscriminator
from fastgan.training.compiled import CompiledStep
from fastgan.training.fast import FastStep
from fastgan.training.step import PlainStep
from tests.training.toys import assert_same, everything, gan_step, one_hot, reals

ITERATIONS = 20  # with one R1 step


@pytest.fixture(autouse=True)
def own_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


class Traced(CompiledStep):
    """Compiled without code: what Dynamo and AOTAutograd make of the step."""

    backend = "aot_eager"

    def _compile(self, function: Any) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=self.backend)

    def _rehearse(self, images: Tensor, labels: Tensor | None) -> None:
        """As CompiledStep does, whose own copy would be compiled with code."""
        parts = copy.deepcopy((self.generator, self.average, self.discriminator))
        Traced(*parts, self.settings, self.world).run(images, labels, 0)


def largest_difference(a: PlainStep, b: PlainStep, label_dim: int, dtype: torch.dtype) -> float:
    """Of what both report, over ITERATIONS."""
    worst = 0.0
    for k in range(ITERATIONS):
        labels = one_hot(k, label_dim).to(dtype) if label_dim else None
        told, expected = (s.run(reals(k, dtype=dtype), labels, k).scalars for s in (a, b))
        assert told.keys() == expected.keys()
        worst = max(worst, *(abs(float(told[n] - expected[n])) for n in told))
    return worst


@pytest.mark.parametrize(
    ("kind", "dtype", "losses"),
    [
        (Traced, torch.float64, 1e-10),
        pytest.param(CompiledStep, torch.float64, 1e-10, marks=pytest.mark.slow),
        pytest.param(CompiledStep, torch.float32, 1e-4, marks=pytest.mark.slow),
        pytest.param(FastStep, torch.float64, 1e-10, marks=pytest.mark.slow),
    ],
)
@pytest.mark.timeout(900)
def test_equals_the_plain_step(kind: type[CompiledStep], dtype: torch.dtype, losses: float) -> None:
    counters.clear()
    plain, compiled = (
        gan_step(kind=each, dtype=dtype, label_dim=3, augment=("color",))
        for each in (PlainStep, kind)
    )
    frozen = {n: p.clone() for n, p in compiled.generator.named_parameters() if not p.requires_grad}
    assert largest_difference(plain, compiled, 3, dtype) < losses
    assert_same(everything(plain), everything(compiled), atol=1e-6 if dtype.itemsize == 8 else 1e-4)
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 6
    assert frozen and all(
        torch.equal(p, frozen[n])
        for n, p in compiled.generator.named_parameters()
        if not p.requires_grad
    )


class Levels(nn.Module):
    """Stands in for a backbone: four frozen maps of a small image, in whatever dtype it has."""

    channels = (2, 3, 4, 5)
    provenance: dict[str, str] = {}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.extractor = nn.Conv2d(1, 5, 3, padding=1)
        self.requires_grad_(False).eval()

    def forward(self, images: Tensor) -> list[Tensor]:
        x = self.extractor(images.to(self.extractor.weight.dtype))
        sizes = zip(self.channels, (32, 16, 8, 4), strict=True)
        return [nn.functional.interpolate(x[:, :c], (size, size)) for c, size in sizes]


def projected() -> ProjectedDiscriminator:
    torch.manual_seed(4)
    return ProjectedDiscriminator([Levels()]).double().train()


@pytest.mark.slow
@pytest.mark.timeout(300)
@torch._dynamo.config.patch(recompile_limit=8)
def test_two_backbones_and_two_layouts_stay_within_what_dynamo_keeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On a GPU reals and fakes are laid out differently; several processes rehearse on copies."""
    monkeypatch.setattr(Traced, "backend", "eager")
    torch.compiler.reset()
    counters.clear()
    torch.manual_seed(4)
    heads = ProjectedDiscriminator([Levels() for _ in range(2)]).double().train()
    step = gan_step(heads, kind=Traced)
    images = reals(0).to(memory_format=torch.channels_last)
    step._rehearse(images, None)
    step.run(images, None, 0)
    # G twice; features and logits of each branch for fakes in both phases and for reals.
    assert counters["stats"]["unique_graphs"] == 2 + 2 * (3 + 3)
    torch.compiler.reset()


def before_batch_norm(name: str) -> bool:
    """Biases that BatchNorm takes out again: their gradient is zero, Adam follows the noise."""
    return name.startswith("discriminator/heads") and name.endswith(".main.0.bias")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_heads_with_batch_norm_and_spectral_norm() -> None:
    steps = []
    for kind in (PlainStep, CompiledStep):
        steps.append(gan_step(projected(), kind=kind, share_fakes=True))
    plain, compiled = steps
    # Not 1e-10: what follows the noise moves the rounding of everything else.
    assert largest_difference(plain, compiled, 0, torch.float64) < 1e-8
    a, b = everything(plain), everything(compiled)
    noisy = {name for name in a if before_batch_norm(name)}
    assert len(noisy) == 4 + 3 + 2 + 1
    noisy |= {n for n in a if n.startswith("optimizer_d/") and n.split("/")[1].endswith("0.bias")}
    assert_same(
        {n: a[n] for n in a if n not in noisy}, {n: b[n] for n in b if n not in noisy}, atol=1e-6
    )
