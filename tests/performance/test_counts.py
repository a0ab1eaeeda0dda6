"""Our counts against PyTorch's own counter: forward passes exactly, whole iterations with R1."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fastgan_kernels import dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry

from fastgan import config as cfg
from fastgan.common.noise import seeded
from fastgan.models.build import PUBLISHED_NETWORKS
from fastgan.models.layers import cast_frozen
from fastgan.models.sampling import few_step
from fastgan.models.unet_block import UNetBlock
from fastgan.performance.counts import Layer, flop, layers_of, norm_elements
from fastgan.performance.iteration import (
    count_iteration,
    iteration_flop,
    meta_networks,
    part_of,
)
from fastgan.performance.live_step import live_step, measured_config, tiny_overrides

CPU, META = torch.device("cpu"), torch.device("meta")
# GFLOP forward (convolutions, attention), M elements through norms, M parameters, % frozen.
GENERATORS = {
    "cifar10_uncond": (42.4, 0.3, 9.1, 56.40, 84.40),
    "cifar10_cond": (42.4, 0.3, 9.1, 56.40, 84.40),
    "ffhq64": (84.5, 0.3, 24.0, 62.76, 83.84),
    "afhqv2_64": (84.5, 0.3, 24.0, 62.76, 83.84),
    "imagenet64": (206.8, 12.4, 35.1, 295.9, 78.77),
}
# GFLOP forward of an unconditional branch: backbone, reassembly and mixing, heads.
BRANCHES = {
    "vgg16_bn": (30.7, 1.8, 9.1),
    "tf_efficientnet_lite0": (0.7, 0.3, 2.3),
    "deit_base_distilled_patch16_224": (35.3, 1.5, 2.3),
}


def frozen_conv_flop(
    x: torch.Tensor, weight: torch.Tensor, bias: Any, *rest: Any, out_val: torch.Tensor
) -> int:
    return conv_flop_count(x.shape, weight.shape, out_val.shape, transposed=rest[3])


def frozen_conv_input_grad_flop(
    dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *rest: Any, out_val: torch.Tensor
) -> int:
    return conv_flop_count(dy.shape, weight.shape, x.shape, transposed=not rest[3])


# What is inside a custom op is not seen.
FORMULAS = flop_registry | {
    torch.ops.fastgan.frozen_conv: frozen_conv_flop,
    torch.ops.fastgan.frozen_conv_input_grad: frozen_conv_input_grad_flop,
}


class Counter(TorchDispatchMode):
    """PyTorch's formulas without FlopCounterMode's hooks for names, which R1's autograd breaks."""

    flop = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        result = func(*args, **(kwargs or {}))
        formula = FORMULAS.get(func._overloadpacket)
        if formula is not None:
            self.flop += formula(*args, **(kwargs or {}), out_val=result)
        return result


def of_torch(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter, dispatch.twice_differentiable():
        run()
    return counter.get_total_flops()


def published(dataset: str, *overrides: str) -> cfg.TrainConfig:
    return measured_config(f"{dataset}_d2o_f", list(overrides))


def part(layers: tuple[Layer, ...], branch: int, name: str) -> int:
    inside = (f"backbones.{branch}.", f"projections.{branch}.", f"heads.{branch}.")
    return flop(x for x in layers if x.name.startswith(inside) and part_of(x.name) == name)


@pytest.mark.parametrize("dataset", PUBLISHED_NETWORKS)
def test_published_forward_passes_equal_the_counter_of_pytorch(dataset: str) -> None:
    config = published(dataset)
    counted = count_iteration(config)
    networks = meta_networks(config, config.init.network)
    generator, discriminator = networks.generator, networks.discriminator
    size, classes = generator.model.img_resolution, generator.label_dim
    z = torch.empty(1, 3, size, size, device=META)
    labels = torch.empty(1, classes, device=META) if classes else None

    measured = of_torch(lambda: few_step(generator, z, labels))
    assert flop(counted.generator) == pytest.approx(measured, rel=1e-4)
    for branch, name in enumerate(config.discriminator.backbones):
        measured = of_torch(
            lambda b=branch: discriminator.judge(b, discriminator.features(b, z, labels), labels)
        )
        parts = [part(counted.discriminator, branch, p) for p in ("backbone", "mixing", "heads")]
        assert sum(parts) == pytest.approx(measured, rel=1e-4)
        if not classes:
            assert [p / 1e9 for p in parts] == pytest.approx(BRANCHES[name], abs=0.06)


@pytest.mark.parametrize("dataset", PUBLISHED_NETWORKS)
def test_published_networks_have_the_published_counts(dataset: str) -> None:
    counted = count_iteration(published(dataset))
    convolutions, attention, elements, parameters, frozen = GENERATORS[dataset]
    assert flop(counted.generator, "convolution") / 1e9 == pytest.approx(convolutions, abs=0.06)
    assert flop(counted.generator, "attention") / 1e9 == pytest.approx(attention, abs=0.06)
    assert norm_elements(counted.generator) / 1e6 == pytest.approx(elements, abs=0.06)
    p = counted.parameters
    assert p.generator / 1e6 == pytest.approx(parameters, abs=0.05)
    assert 100 * (1 - p.trained / p.generator) == pytest.approx(frozen, abs=0.01)
    assert p.allreduce_bytes == 4 * (p.trained + p.heads)


ITERATIONS = {
    "ncsn": ("cifar10_uncond_d2o_f", []),
    "all trained, conditional": ("imagenet64_d2o", []),
    "shared fakes": ("cifar10_cond_d2o_f", ["share_fakes=true"]),
    "two steps, more frozen": ("imagenet64_d2o_f", ["generator.steps=2", "freeze.level=3"]),
    "diffusion encoder": ("demo", []),
}


@pytest.mark.parametrize("name", ITERATIONS)
def test_an_iteration_equals_the_counter_of_pytorch(name: str) -> None:
    experiment, extra = ITERATIONS[name]
    config = small(experiment, "loss.r1_interval=0", *extra)
    live = live_step(config, CPU)
    with FlopCounterMode(display=False) as counter:
        live.run(1)
    per_image = counter.get_total_flops() / config.batch
    assert iteration_flop(config) == pytest.approx(per_image, rel=1e-3)


@pytest.mark.parametrize("backbone", ["mobilenetv2_050", "deit_tiny_distilled_patch16_224"])
def test_r1_is_what_its_derivatives_need(backbone: str) -> None:
    config = small("cifar10_uncond_d2o_f", f"discriminator.backbones=[{backbone}]")
    live, counted = live_step(config, CPU), count_iteration(config)
    reals, labels = live.draw(16)
    with Counter() as counter:
        live.step._accumulate_r1(reals, labels)
    without = small(
        "cifar10_uncond_d2o_f", f"discriminator.backbones=[{backbone}]", "loss.r1_interval=0"
    )
    ours = config.loss.r1_interval * (counted.flop - iteration_flop(without))
    assert ours == pytest.approx(counter.flop / config.batch, rel=0.02)


def small(experiment: str, *overrides: str) -> cfg.TrainConfig:
    return measured_config(experiment, [*tiny_overrides(experiment), "device=cpu", *overrides])


def test_an_iteration_is_counted_once_for_what_it_depends_on() -> None:
    config = small("cifar10_uncond_d2o_f")
    counted = count_iteration(config)
    config.batch, config.precision = 64, cfg.Precision.bf16
    assert count_iteration(config) is counted
    config.freeze.level = 0
    thawed = count_iteration(config)
    # One more pass of G, for weight gradients of what was frozen.
    extra = thawed.flop - counted.flop
    assert 0.5 * flop(counted.generator) < extra < flop(counted.generator)
    assert thawed.parameters.trained > counted.parameters.trained


def test_counting_leaves_no_trace() -> None:
    config = small("imagenet64_d2o_f", "seed=3")
    state, chosen = torch.get_rng_state(), dispatch._twice
    networks = meta_networks(config, config.init.network)
    networks.generator_layers()
    networks.discriminator_layers(image_grad=True)
    assert torch.equal(torch.get_rng_state(), state) and dispatch._twice == chosen
    hooks = [m for m in networks.generator.modules() if m._forward_hooks]
    assert not hooks and all(p.is_meta for p in networks.discriminator.parameters())


def test_kernels_that_need_a_gpu_do_not_stop_the_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    config = small("cifar10_uncond_d2o_f", "seed=4")
    networks = meta_networks(config, config.init.network)
    assert flop(networks.generator_layers()) > 0


def test_a_frozen_block_keeps_what_its_op_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the tensors that the fused op hands to autograd."""
    monkeypatch.setattr(dispatch, "_configured", "triton")
    monkeypatch.delenv(dispatch.VARIABLE, raising=False)
    with seeded(0):
        block = UNetBlock(32, 64, 16)
        x, emb = torch.randn(1, 32, 8, 8, requires_grad=True), torch.randn(1, 16)
    for convolution in (block.conv0, block.conv1):
        convolution.requires_grad_(False)
    cast_frozen(block, torch.float32)
    kept: dict[int, int] = {}

    def note(t: torch.Tensor) -> torch.Tensor:
        if t.ndim == 4 and t.shape[0] == 1 and t.shape[-1] == 8:
            kept[t.data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        block(x, emb)
    layers = layers_of(block, lambda: block(x, emb))
    assert sum(layer.kept for layer in layers if layer.kind != "linear") == sum(kept.values())


def test_traffic_of_a_block() -> None:
    """Elements read and written, by hand: 32 -> 64 channels at 4 x 4, downsampled from 8 x 8."""
    with META:
        block = UNetBlock(32, 64, 16, down=True, resample_filter=(1, 3, 3, 1), attention=True)
        x, emb = torch.empty(1, 32, 8, 8), torch.empty(1, 16)
    layers = {layer.name: layer for layer in layers_of(block, lambda: block(x, emb))}
    assert layers["norm0"].moved == 2 * 32 * 64 and layers["norm0"].moved_back == 3 * 32 * 64
    assert layers["conv0"].moved == (32 + 64) * 16 and layers["conv0"].weights == 9 * 32 * 64
    assert layers["conv0"].kept == 32 * 16 and layers["qkv"].kept == 64 * 16
    assert layers["resample"].moved == 32 * (64 + 16)
    assert layers["resample"].flop == 2 * 16 * 32 * 16
    assert layers["attention"].moved == 4 * 64 * 16
    assert layers["attention"].flop == 2 * 2 * 64 * 16 * 16
    assert layers["affine"].flop == 2 * 16 * 128
