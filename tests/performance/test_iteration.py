"""Our counts against PyTorch's own counter, with networks and whole iterations, R1 included."""

from typing import Any

import pytest
import torch
from fastgan_kernels import dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, flop_registry

from fastgan import config as cfg
from fastgan.models.unet_block import UNetBlock
from fastgan.performance.iteration import (
    Layers,
    count_iteration,
    flop,
    iteration_flop,
    meta_networks,
)
from fastgan.performance.live_step import (
    architecture_of,
    live_step,
    measured_config,
    tiny_overrides,
)

CPU, META = torch.device("cpu"), torch.device("meta")
# G: GFLOP forward (convolutions, attention), M elements through norms, M parameters that train.
# D: GFLOP forward of what is frozen (backbones, reassembly, mixing) and of the heads.
PUBLISHED = {
    "cifar10_uncond": ((42.4, 0.3, 9.1, 56.40 * 0.1560), (30.7 + 1.8 + 0.7 + 0.3, 9.1 + 2.3)),
    "ffhq64": ((84.5, 0.3, 24.0, 62.76 * 0.1616), (35.3 + 1.5 + 0.7 + 0.3, 2.3 + 2.3)),
    "imagenet64": ((206.9, 12.4, 35.1, 295.9 * 0.2123), (35.3 + 1.5 + 0.7 + 0.3, 4.7)),
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


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("dataset", ["ffhq64", *map(slow, ["cifar10_uncond", "imagenet64"])])
def test_published_networks_have_the_published_counts(dataset: str) -> None:
    found = count_iteration(measured_config(f"{dataset}_d2o_f", []))
    counts, parts = PUBLISHED[dataset]
    layers = found.layers("generator")
    norms = sum(layer.moved // 2 for layer in layers if layer.kind == "norm")
    of_g = [flop(layers, "product") / 1e9, flop(layers, "attention") / 1e9, norms / 1e6]
    assert [*of_g, found.trained / 1e6] == pytest.approx(counts, abs=0.06)
    assert found.allreduce_bytes == 4 * (found.trained + found.heads)
    of_d = [flop(found.layers(part)) / 1e9 for part in ("features", "heads")]
    assert of_d == pytest.approx(parts, abs=0.15)


def small(experiment: str, *overrides: str) -> cfg.TrainConfig:
    return measured_config(experiment, [*tiny_overrides(experiment), "device=cpu", *overrides])


@pytest.mark.parametrize(
    ("experiment", "extra"),
    [
        ("demo", ["share_fakes=false"]),
        ("demo", ["share_fakes=true", "freeze.level=3"]),
        slow("cifar10_cond_d2o_f", ["share_fakes=true"]),
        slow("imagenet64_d2o", ["generator.steps=2"]),
        slow("cifar10_uncond_d2o_f", []),
    ],
)
def test_an_iteration_equals_the_counter_of_pytorch(experiment: str, extra: list[str]) -> None:
    config = small(experiment, "loss.r1_interval=0", *extra)
    live = live_step(config, CPU)
    with FlopCounterMode(display=False) as counter:
        live.run(1)
    per_image = counter.get_total_flops() / config.batch
    assert iteration_flop(config) == pytest.approx(per_image, rel=1e-3)


@pytest.mark.parametrize("backbone", ["mobilenetv2_050", slow("deit_tiny_distilled_patch16_224")])
def test_r1_is_what_its_derivatives_need(backbone: str) -> None:
    chosen = f"discriminator.backbones=[{backbone}]"
    config = small("cifar10_uncond_d2o_f", chosen)
    live, without = live_step(config, CPU), small("cifar10_uncond_d2o_f", chosen)
    without.loss.r1_interval = 0
    reals, labels = live.draw(16)
    with Counter() as counter:
        live.step._penalise_gradient(reals, labels)
    ours = config.loss.r1_interval * (iteration_flop(config) - iteration_flop(without))
    assert ours == pytest.approx(counter.flop / config.batch, rel=0.02)


def test_an_iteration_is_counted_once_for_what_it_depends_on() -> None:
    config = small("demo")
    counted = count_iteration(config)
    config.batch, config.precision = 64, cfg.Precision.bf16
    assert count_iteration(config) is counted
    config.freeze.level = 0
    thawed = count_iteration(config)
    # One more pass of G, for weight gradients of what was frozen.
    once = flop(counted.layers("generator"))
    assert 0.5 * once < thawed.flop - counted.flop < once
    assert thawed.trained > counted.trained


def test_counting_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor do kernels that need a GPU stop it."""
    monkeypatch.setenv(dispatch.VARIABLE, "triton")
    config = small("demo", "discriminator.width=8")
    state, chosen = torch.get_rng_state(), dispatch._twice
    assert count_iteration(config).flop > 0
    assert torch.equal(torch.get_rng_state(), state) and dispatch._twice == chosen
    with dispatch.twice_differentiable():
        networks = meta_networks(config, architecture_of(config))
    assert all(p.is_meta for network in networks for p in network.parameters())


def test_traffic_of_a_block() -> None:
    """Elements read and written, by hand: 32 -> 64 channels at 4 x 4, downsampled from 8 x 8."""
    with META:
        block = UNetBlock(32, 64, 16, down=True, resample_filter=(1, 3, 3, 1), attention=True)
        x, emb = torch.empty(1, 32, 8, 8), torch.empty(1, 16)
    block.conv0.requires_grad_(False)
    with dispatch.twice_differentiable(), Layers(ours=True) as found:
        block(x, emb)
    affine, norm0, inside, along, conv0, norm1, conv1, skip, *_, attention, _ = found.found
    assert (affine.flop, affine.trains, affine.input_grad) == (2 * 16 * 128, True, False)
    assert (norm0.moved, norm0.moved_back) == (2 * 32 * 64, 3 * 32 * 64)
    assert norm0.trains and not norm0.input_grad and norm1.input_grad
    for resampled in (inside, along):
        assert (resampled.flop, resampled.moved) == (2 * 16 * 32 * 16, 32 * (64 + 16))
        assert not resampled.weights and not resampled.trains
    assert inside.input_grad and not along.input_grad
    assert (conv0.moved, conv0.weights) == ((32 + 64) * 16, 9 * 32 * 64)
    assert (conv0.trains, conv1.trains, conv0.input_grad) == (False, True, True)
    assert (skip.weights, skip.input_grad) == (32 * 64, False)
    assert (attention.moved, attention.flop) == (4 * 64 * 16, 2 * 2 * 64 * 16 * 16)
    assert attention.input_grad_flop == 2 * attention.flop
    with dispatch.twice_differentiable(), Layers() as unfused:
        block(x, emb)
    # Its P [16, 16] is written, read and written by a softmax, and read.
    assert unfused.found[-2].moved == 4 * 64 * 16 + 4 * 16 * 16


def test_norms_of_a_batch_and_folded_ones() -> None:
    norm, x = torch.nn.BatchNorm2d(4, device=META), torch.empty(1, 4, 2, 2, device=META)
    with Layers() as found:
        norm(x)
        norm.eval()(x)
    assert [(x.moved, x.moved_back, x.trains) for x in found.found] == [(3 * 16, 5 * 16, True)]
