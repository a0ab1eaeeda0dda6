"""How group_norm_silu cuts samples into slabs, and batches into what the caches hold."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from fastgan_kernels import runtime
from fastgan_kernels.aot.shapes import NETWORKS, Norm
from fastgan_kernels.norm_silu import device as norm_silu_device
from fastgan_kernels.norm_silu import group_norm_silu
from fastgan_kernels.norm_silu.device import group_norm_silu_backward, group_norm_silu_forward
from fastgan_kernels.norm_silu.tiles import Chip, Plan, chunks, plan
from oracle import results
from test_norm_silu import make
from torch import Tensor

L1_BYTES = 192 * 1024
CHIPS = {"A100": Chip(108, 40 * 2**20), "H100, H200": Chip(132, 50 * 2**20)}
# Launches of norms (channels, pixels a side) that take several, at a batch of 32 in 16 bits.
CHUNKED = {
    ("A100", False): {(576, 64): 4},
    ("A100", True): {(192, 64): 3, (384, 64): 6, (576, 64): 8, (960, 32): 4},
    ("H100, H200", False): {(576, 64): 3},
    ("H100, H200", True): {(576, 64): 7, (960, 32): 3},
}
# In float32 two slabs of 12 channels, swept twice; on SMALL, which holds five of them (two with
# their dy), in chunks.
SWEPT = (3, 24, 23, 23, 4)
SMALL = Chip(100, 5 * 12 * 23 * 23 * 4)
FORWARD, BACKWARD = [(2, 1), (2, 2)], [(2, 1)] * 3


def published(itemsize: int, backward: bool) -> Iterator[tuple[int, Norm, Plan]]:
    """Every norm with its batch and how it is cut."""
    for network in NETWORKS:
        for norm in network.norms():
            shape = (norm.size**2, norm.channels, norm.groups, itemsize)
            yield network.batch, norm, plan(*shape, backward=backward)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("backward", [True, False])
def test_plan_reads_aligned_rows(itemsize: int, backward: bool) -> None:
    for channels in (128, 192, 256, 384, 512, 576, 768, 960, 1152, 1344, 1536):
        for size in (8, 16, 32, 64):
            p = plan(size * size, channels, 32, itemsize, backward=backward)
            assert channels % p.slab == 0 and p.slab % (channels // 32) == 0
            assert p.slab * itemsize % 16 == 0
            if itemsize == 2 and channels in (128, 256, 512) and size <= 32:
                assert p.resident


@pytest.mark.parametrize("backward", [True, False])
def test_up_to_1024_pixels_are_read_once_or_swept_from_a_cache(backward: bool) -> None:
    """One program runs on a multiprocessor (tests/kernels/test_aot.py), beside what it sweeps."""
    swept = {
        (norm.channels, norm.size): p.slab * norm.size**2 * 2 * (1 + backward)
        for _, norm, p in published(2, backward)
        if norm.size <= 32 and not p.resident
    }
    if not backward:
        assert swept.keys() == {(576, 32), (960, 32), (960, 16), (1344, 16)}
    beyond = {norm for norm, read in swept.items() if read > L1_BYTES}
    assert beyond == ({(576, 32), (960, 32)} if backward else {(960, 32)})


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("backward", [True, False])
def test_what_is_read_twice_fits_into_a_cache(chip: str, itemsize: int, backward: bool) -> None:
    """The slabs of all programs that run at a time, of every norm, fit into the second level."""
    l2_bytes, several = CHIPS[chip].l2_bytes, {}
    for batch, norm, p in published(itemsize, backward):
        slabs = norm.channels // p.slab
        found = chunks(batch, slabs, p, CHIPS[chip])
        swept = p.slab * norm.size**2 * itemsize * (1 + backward)
        largest = max(chunk.stop - chunk.start for chunk in found)
        running = min(CHIPS[chip].processors, slabs * largest)
        assert p.resident or running * swept <= l2_bytes
        if len(found) > 1:
            assert CHIPS[chip].processors * swept > l2_bytes
            several[norm.channels, norm.size] = len(found)
    if itemsize == 2:
        assert several == CHUNKED[chip, backward]


def test_chunks_cover_the_batch_in_about_equal_parts() -> None:
    swept = Plan(24, 256, False, 16, swept_bytes=1000)
    for samples, slabs, l2_bytes, sizes in (
        (32, 8, 106_000, [10, 11, 11]),
        (32, 8, 107_999, [10, 11, 11]),
        (32, 8, 108_000, [32]),
        (13, 8, 106_000, [13]),
        (14, 8, 106_000, [7, 7]),
        (3, 8, 7_000, [1, 1, 1]),
        (2, 8, 10, [1, 1]),
    ):
        found = chunks(samples, slabs, swept, Chip(108, l2_bytes))
        assert [chunk.stop - chunk.start for chunk in found] == sizes
        covered = [n for chunk in found for n in range(chunk.start, chunk.stop)]
        assert covered == list(range(samples))
    assert chunks(9, 8, Plan(24, 256, True, 16), Chip(108, 1)) == [slice(0, 9)]


@pytest.mark.parametrize(("samples", "sizes"), [(65_535, [65_535]), (65_536, [32_768] * 2)])
def test_more_samples_than_a_grid_holds(samples: int, sizes: list[int]) -> None:
    x = torch.empty(samples, 16, 2, 2, device="meta").to(memory_format=torch.channels_last)
    with runtime.recording() as launches:
        group_norm_silu_forward(x, 2, None, None, 1e-5, None, None, None, True)
    assert [len(launch.args[0]) for launch in launches] == sizes


def test_figures_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it is no CUDA device, as when recording, an A100's."""
    figures = SimpleNamespace(multi_processor_count=7, L2_cache_size=8)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: figures)
    assert norm_silu_device.chip(torch.device("cuda", 99)) == Chip(7, 8)
    for other in ("cpu", "meta"):
        assert norm_silu_device.chip(torch.device(other)) == CHIPS["A100"]


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """What is launched on the small chip."""
    found: list[tuple[int, ...]] = []

    def spy(kernel: object, grid: tuple[int, ...], *args: object, **options: object) -> None:
        found.append(grid)
        runtime.launch(kernel, grid, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(norm_silu_device, "launch", spy)
    monkeypatch.setattr(norm_silu_device, "chip", lambda device: SMALL)
    return found


def test_chunks_give_the_bits_of_one_launch(
    grids: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """scale and shift are halves of one affine map's rows; one row of pre_shift for all samples."""
    n, c, h, w, groups = SWEPT
    wide = make((n, 2 * c, h, w, groups), embedding="scale")
    inputs = make(SWEPT, embedding="pre_shift") | {"x": wide["x"][:, c:], "rows": wide["scale"]}
    inputs["pre_shift"] = inputs["pre_shift"][:1]

    def function(rows: Tensor, **arguments: Tensor) -> Tensor:
        scale, shift = rows.chunk(2, dim=1)
        return group_norm_silu(num_groups=groups, scale=scale, shift=shift, **arguments)

    chunked = results(function, inputs)
    assert grids == FORWARD + BACKWARD
    monkeypatch.setattr(norm_silu_device, "chip", lambda device: CHIPS["A100"])
    whole = results(function, inputs)
    assert grids[-2:] == [(2, 3), (2, 3)]
    assert all(torch.equal(chunked[name], whole[name]) for name in whole)


def test_chunks_take_their_part_of_the_residual(
    grids: list[tuple[int, ...]], monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    """As the frozen block calls it, which adds the skip's gradient in the same pass."""
    inputs = make(SWEPT)
    x, groups = inputs.pop("x"), SWEPT[-1]
    dy, residual = (make(SWEPT, mean=mean)["x"] for mean in (0.1, 0.2))
    _, statistics = group_norm_silu_forward(x, groups, eps=1e-5, act=True, **inputs)
    everything = frozenset({"x", "affine", "pre_shift", "scale", "shift"})

    def gradients(**options: object) -> dict[str, Tensor]:
        found = group_norm_silu_backward(
            dy, x, statistics, groups, act=True, wanted=everything, **inputs, **options
        )
        return vars(found)

    added = {"residual": residual, "residual_scale": 0.5}
    chunked = gradients(**added)
    assert grids == FORWARD + BACKWARD
    monkeypatch.setattr(norm_silu_device, "chip", lambda device: CHIPS["A100"])
    whole, without = gradients(**added), gradients()
    assert all(torch.equal(chunked[name], whole[name]) for name in everything)
    assert torch.allclose(chunked["x"], without["x"] + 0.5 * residual, atol=1e-5)
