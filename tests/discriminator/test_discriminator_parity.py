"""Projection and heads against arrays of the original implementation, float64."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan.common.errors import UserError
from tools.parity import check_discriminator

GOLDEN = Path(__file__).parents[1] / "golden"
TOY = GOLDEN / "projected_discriminator_toy.npz"
COND = GOLDEN / "projected_discriminator_cond.npz"
TOLERANCE = 1e-9


def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def close(ours: torch.Tensor, golden: torch.Tensor) -> bool:
    # Round-off of gradients that are zero in theory needs the absolute part.
    scale = max(float(golden.abs().max()), 1e-6)
    return ours.shape == golden.shape and float((ours - golden).abs().max()) <= TOLERANCE * scale


@pytest.mark.parametrize("path", [TOY, COND], ids=["toy", "cond"])
def test_every_golden_array_is_reproduced(path):
    found = check_discriminator(load(path))
    bad = [key for key, (ours, golden, _) in found.items() if not close(ours, golden)]
    assert bad == []


@pytest.mark.parametrize("path", [TOY, COND], ids=["toy", "cond"])
def test_no_result_in_the_file_is_left_uncompared(path):
    arrays = load(path)
    inputs = ("proj/in", "proj/state/", "disc/state/", "disc/x", "disc/labels", "disc/embed_rows")
    expected = {key for key in arrays if not key.startswith(inputs)}
    found = check_discriminator(arrays)
    assert found.keys() == expected
    kinds = {key: kind for key, (_, _, kind) in found.items()}
    assert kinds["disc/logits"] == "output"
    assert kinds["disc/r1_grad/main.0.main.0.weight_orig"] == "gradient"


@pytest.mark.parametrize(
    ("path", "changed", "affected"),
    [
        (TOY, "proj/state/layer3_csm.out_conv.weight", "proj/out0"),
        (TOY, "disc/state/main.0.main.1.weight", "disc/r1_penalty_wrt_x"),
        (
            TOY,
            "disc/state/main.0.main.1.running_mean",
            "disc/state_after/main.0.main.1.running_mean",
        ),
        (COND, "disc/embed_rows_3_7_0", "disc/logits"),
        (COND, "disc/state/embed_proj.bias", "disc/loss_ns_fake"),
    ],
)
def test_a_changed_tensor_shows(path, changed, affected):
    arrays = load(path)
    arrays[changed] = arrays[changed] + 1e-3 * np.random.default_rng(0).normal(
        size=arrays[changed].shape
    )
    ours, golden, _ = check_discriminator(arrays)[affected]
    assert not close(ours, golden)


def test_depth_and_widths_are_inferred():
    """A deeper head of other widths loads; no golden values, so only shapes are checked."""
    rng = np.random.default_rng(0)
    arrays = {"disc/x": rng.normal(size=(2, 3, 32, 32))}
    channels = [3, 5, 6, 7]
    for i, (a, b) in enumerate(pairwise(channels)):
        main = f"disc/state/main.{i}.main"
        arrays[f"{main}.0.weight_orig"] = rng.normal(size=(b, a, 4, 4))
        arrays[f"{main}.0.weight_u"] = rng.normal(size=b)
        arrays[f"{main}.0.weight_v"] = rng.normal(size=a * 16)
        for name in ("0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"):
            arrays[f"{main}.{name}"] = rng.normal(size=b)
        arrays[f"{main}.1.num_batches_tracked"] = np.int64(0)
    arrays["disc/state/main.3.weight_orig"] = rng.normal(size=(1, 7, 4, 4))
    arrays["disc/state/main.3.weight_u"] = rng.normal(size=1)
    arrays["disc/state/main.3.weight_v"] = rng.normal(size=7 * 16)
    arrays["disc/logits"] = np.zeros((2, 1, 1, 1))
    assert check_discriminator(arrays)["disc/logits"][0].shape == (2, 1, 1, 1)


@pytest.mark.parametrize(
    "missing", ["proj/state/layer0_ccm.weight", "proj/out2", "disc/state/main.1.weight_orig"]
)
def test_a_missing_array_is_a_user_error(missing):
    arrays = load(TOY)
    del arrays[missing]
    with pytest.raises(UserError, match="parity file"):
        check_discriminator(arrays)


def test_the_global_generator_is_untouched():
    before = torch.get_rng_state()
    check_discriminator(load(TOY))
    assert torch.equal(before, torch.get_rng_state())
