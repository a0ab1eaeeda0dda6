"""A measurement by the interpreter: what is compared before it counts, and how it is timed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgan_kernels.norm_silu_conv import table as conv_table
from fastgan_kernels.norm_silu_conv.launch import norm_silu_conv_backward, norm_silu_conv_forward
from fastgan_kernels.norm_silu_conv.plans import (
    DIRECTIONS,
    LIBRARY,
    Direction,
    Plan,
    Shape,
    candidates,
)
from fastgan_kernels.tune import __main__ as tune
from fastgan_kernels.tune import worker
from fastgan_kernels.tune.jobs import Case, Job
from fastgan_kernels.tune.timing import medians
from fastgan_kernels.tune.worker import INDUCTOR, disagreement, measure

TINY = Shape(16, 24, 4, 4, 3)
SLOW = Plan("fused", 16, 16, 16, 4, 2)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a measurement sets in its process is put back; none is of an earlier test."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    worker._bench.cache_clear()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_plan_agrees_with_the_library(direction: Direction) -> None:
    case = Case(TINY, "fp16", direction, 1, "pre_shift")
    plans = list(candidates((9, 0), torch.float16, direction, TINY))
    assert len(plans) > 2
    for plan in (LIBRARY, *plans):
        timing = measure(case, plan)
        assert timing.us > 0 and timing.library_us > 0


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("embedding", ["", "pre_shift", "scale shift"])
def test_the_definition_agrees_with_the_library(direction: Direction, embedding: str) -> None:
    """Compiled without fusion, which rounds after every operation."""
    case = Case(TINY, "fp16", direction, 2, embedding)
    assert measure(case, INDUCTOR).us > 0


def spoiled(case: Case, spoil: Callable[[Any, int], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """What the kernel returns goes through `spoil`, with the number of calls so far."""
    names = {"forward": norm_silu_conv_forward, "backward": norm_silu_conv_backward}
    calls = []

    def broken(*arguments: Any, **options: Any) -> Any:
        result = names[case.direction](*arguments, **options)
        if arguments[-1] != SLOW:
            return result
        calls.append(None)
        return spoil(result, len(calls))

    monkeypatch.setattr(worker, f"norm_silu_conv_{case.direction}", broken)


def off_by(share: float, v: torch.Tensor) -> None:
    """One value by a share of the largest."""
    v[(0,) * v.ndim] += share * v.abs().max()


def test_a_wrong_y_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(TINY, "fp16", "forward", 2, "pre_shift")

    def spoil(result: Any, calls: int) -> Any:
        off_by(0.01, result[0])
        return result

    spoiled(case, spoil, monkeypatch)
    with pytest.raises(ValueError, match=r"y is off by .* of its largest value, more"):
        measure(case, SLOW)


def test_a_result_that_is_right_only_the_first_time_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    case = Case(TINY, "fp16", "forward", 2, "")

    def spoil(result: Any, calls: int) -> Any:
        if calls > 1:
            off_by(0.01, result[0])
        return result

    spoiled(case, spoil, monkeypatch)
    with pytest.raises(ValueError, match="y is off by"):
        measure(case, SLOW)


@pytest.mark.parametrize("name", ["x", "affine", "scale", "shift"])
def test_a_wrong_gradient_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(TINY, "fp16", "backward", 2, "scale shift")

    def spoil(result: Any, calls: int) -> Any:
        off_by(0.01, getattr(result, name))
        return result

    spoiled(case, spoil, monkeypatch)
    with pytest.raises(ValueError, match=f"{name} is off by"):
        measure(case, SLOW)


def test_what_a_kernel_leaves_unwritten_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would else be the library's result, in memory that was just given back."""
    case = Case(TINY, "fp16", "forward", 2, "")

    def spoil(result: Any, calls: int) -> Any:
        y, *rest = result
        unwritten = torch.empty(1)
        return (unwritten.expand(y.shape), *rest) if unwritten.isnan() else result

    spoiled(case, spoil, monkeypatch)
    with pytest.raises(ValueError, match="y is off by nan"):
        measure(case, SLOW)


def rounded(v: torch.Tensor) -> torch.Tensor:
    return v.bfloat16().float()


def test_the_tolerance_holds_roundings_and_no_more() -> None:
    """The library's roundings (activations, convolution, bias, join) against a kernel's two, at the
    sums of a real convolution (256 channels)."""
    generator = torch.Generator().manual_seed(5)
    s, bias, residual = (
        torch.randn(size, generator=generator) for size in ((256, 2304), (64,), (256, 64))
    )
    s = torch.nn.functional.silu(s)
    weight = rounded(torch.randn(2304, 64, generator=generator) / 48)
    bias, residual = rounded(bias), rounded(residual)
    library = rounded(rounded(rounded(s) @ weight + bias) + residual)
    approximate = rounded(s * (1 + 2**-11 * torch.sin(50 * s)))
    kernel = approximate @ weight + bias + residual
    eps = torch.finfo(torch.bfloat16).eps
    good = {"y": kernel.bfloat16()}
    assert disagreement(good, {"y": library.bfloat16()}, eps) is None

    def wrong(change: Callable[[torch.Tensor], Any]) -> str:
        spoiled = kernel.clone()
        change(spoiled)
        return disagreement({"y": spoiled}, {"y": library.bfloat16()}, eps) or ""

    largest = kernel.abs().max()
    assert "largest value" in wrong(lambda y: y[7, 7].add_(5 * eps * largest))
    assert "root mean square" in wrong(lambda y: y.mul_(1 + 2.5 * eps))
    assert "nan" in wrong(lambda y: y[0, 0].fill_(float("nan")))
    # A padding of silu(b) where it should be 0, at a few of the pixels.
    assert "y is off" in wrong(lambda y: y[:4].add_(0.15 * weight[:768].sum(0)))


def test_a_case_is_what_a_block_asks_for() -> None:
    """Not the first one's bias, which a library would add by itself: the norm adds it."""
    plain, song, adm = (
        worker.inputs_of(Case(TINY, "fp16", "forward", 2, embedding))
        for embedding in ("", "pre_shift", "scale shift")
    )
    assert plain.bias is None and plain.residual is None
    assert all(i.bias is not None and i.residual is not None for i in (song, adm))
    given = [[v is not None for v in i.after.tensors] for i in (plain, song, adm)]
    assert given == [
        [True, True, False, False, False],
        [True, True, True, False, False],
        [True, True, False, True, True],
    ]
    assert plain.x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(plain.x, worker.inputs_of(Case(TINY, "fp16", "forward", 2, "")).x)


class Rounds:
    """A rotation whose turns take the seconds that it is given."""

    def __init__(self, seconds: list[float], calls: int) -> None:
        self.taken, self.calls = iter(seconds), [None] * calls

    def seconds(self, turns: int) -> float:
        return turns * next(self.taken)


def test_medians_are_of_one_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgan_kernels.tune.timing.ROUNDS", 3)
    monkeypatch.setattr("fastgan_kernels.tune.timing.UNCOUNTED_ROUNDS", 1)
    slow, fast = Rounds([99, 9, 99, 1, 8, 2], 4), Rounds([9, 1e-4, 9, 3e-6, 1e-6, 2e-6], 2)
    assert medians([slow, fast]) == pytest.approx([0.5e6, 1.0])  # type: ignore[list-item]


def test_the_whole_command_on_the_interpreter(tmp_path: Path) -> None:
    """Jobs to table: real kernels, a CPU's clock."""
    work = [
        Job(TINY, "fp16", direction, 1, ("", "pre_shift"), "Tiny", 0.5) for direction in DIRECTIONS
    ]
    table = tune.Table(tmp_path / "t.json", {"machine": "a CPU"})

    def plans(job: Job) -> list[Plan]:
        return list(tune._plans((8, 0), job))[:2]

    tune.tune(work, plans, measure, table.record, inductor=False)
    found = conv_table.read(tmp_path / "t.json")
    assert set(found) == {j.key for j in work}
    for j in work:
        assert found[j.key].plan in plans(j) and found[j.key].us > 0
    assert tune.table(table.results, work).count("fp16") == 2
