"""The command that measures plans: what it compares and times, what it leaves out and writes."""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgan_kernels import tune as trials
from fastgan_kernels.aot.shapes import NETWORKS, Block, Network
from fastgan_kernels.norm_silu_conv import plans as conv_table
from fastgan_kernels.norm_silu_conv.plans import (
    DIRECTIONS,
    Direction,
    Entry,
    Plan,
    Shape,
    candidates,
)
from fastgan_kernels.tune import Case, Child, Rotation, Timing, compare, trial
from fastgan_kernels.tune import __main__ as tune

TINY = Shape(16, 24, 4, 4, 3)
SLOW, FAST = Plan("fused", 16, 16, 16, 4, 2), Plan("fused", 32, 16, 16, 4, 2, tanh=True)
HANGS, CRASHES = (Plan("behind", 16, 16, 16, 4, stages) for stages in (2, 3))


def case(direction: Direction = "forward", embedding: str = "", shape: Shape = TINY) -> Case:
    return Case(shape, "fp16", direction, 1, embedding)


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a trial sets in its process is put back; none is of an earlier test."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    trials._library.cache_clear()


# A trial, by the interpreter


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("embedding", ["", "pre_shift", "scale shift"])
def test_plans_agree_with_the_library(direction: Direction, embedding: str) -> None:
    plan = next(candidates((9, 0), torch.float16, direction, TINY))
    timing = trial(case(direction, embedding), plan)
    assert timing.us > 0 and timing.library_us > 0


def spoil_last(values: dict[str, torch.Tensor], name: str, calls: int) -> None:
    """One value by a hundredth of the largest."""
    values[name][(0,) * values[name].ndim] += 0.01 * values[name].abs().max()


def unwritten(values: dict[str, torch.Tensor], name: str, calls: int) -> None:
    """It would else be the library's result, in memory that was just given back."""
    nothing = torch.empty(1)
    if nothing.isnan():
        values[name] = nothing.expand(values[name].shape)


def second_time(values: dict[str, torch.Tensor], name: str, calls: int) -> None:
    if calls > 1:
        spoil_last(values, name, calls)


@pytest.mark.parametrize(
    ("direction", "name", "fault", "message"),
    [
        ("forward", "y", spoil_last, "y is off by .* of its largest value, more than"),
        ("forward", "y", second_time, "y is off by .* of its largest value, more than"),
        ("forward", "y", unwritten, "y is off by nan"),
        ("backward", "x", spoil_last, "x is off by"),
        ("backward", "affine", spoil_last, "affine is off by"),
        ("backward", "scale", spoil_last, "scale is off by"),
    ],
)
def test_a_wrong_result_is_refused(
    direction: Direction,
    name: str,
    fault: Callable[..., None],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = getattr(trials, f"norm_silu_conv_{direction}")
    calls: list[None] = []

    def broken(*arguments: Any) -> Any:
        result = original(*arguments)
        if arguments[-1] != SLOW:
            return result
        calls.append(None)
        values = {"y": result[0]} if direction == "forward" else vars(result)
        fault(values, name, len(calls))
        return (values["y"], *result[1:]) if direction == "forward" else result

    monkeypatch.setattr(trials, f"norm_silu_conv_{direction}", broken)
    with pytest.raises(ValueError, match=message):
        trial(case(direction, "scale shift"), SLOW)


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
    compare({"y": kernel.bfloat16()}, {"y": library.bfloat16()}, "bf16")

    def wrong(change: Callable[[torch.Tensor], Any]) -> str:
        spoiled = kernel.clone()
        change(spoiled)
        with pytest.raises(ValueError, match="y is off by") as error:
            compare({"y": spoiled}, {"y": library.bfloat16()}, "bf16")
        return str(error.value)

    assert "largest value" in wrong(lambda y: y[7, 7].add_(5 * eps * kernel.abs().max()))
    assert "root mean square" in wrong(lambda y: y.mul_(1 + 2.5 * eps))
    assert "nan" in wrong(lambda y: y[0, 0].fill_(float("nan")))
    # A padding of silu(b) where it should be 0, at a few of the pixels.
    wrong(lambda y: y[:4].add_(0.15 * weight[:768].sum(0)))


def test_medians_are_of_one_call_each(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "ROUNDS", 3)
    monkeypatch.setattr(trials, "UNCOUNTED_ROUNDS", 1)

    class Rounds(Rotation):
        """A rotation whose turns take the seconds that it is given."""

        def __init__(self, seconds: list[float], calls: int) -> None:
            self.taken, self.calls = iter(seconds), [print] * calls

        def seconds(self, turns: int) -> float:
            return turns * next(self.taken)

    slow, fast = Rounds([99, 9, 99, 1, 8, 2], 4), Rounds([9, 1e-4, 9, 3e-6, 1e-6, 2e-6], 2)
    assert trials.medians([slow, fast]) == pytest.approx([0.5e6, 1.0])


# What a plan may do


def behave(case: Case, plan: Plan) -> Timing:
    """In the child: a trial that ends in every way it may."""
    if plan == HANGS:
        time.sleep(600)
    if plan == CRASHES:
        os._exit(7)
    return Timing(8.0, 10.0)


def test_what_hangs_or_crashes_is_left_out_and_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A second shape does not wait for what hung at the first; a process serves many calls."""
    work, found = [case(), case(shape=replace(TINY, cin=32))], []
    plans = {work[0]: (CRASHES, FAST, HANGS), work[1]: (HANGS, FAST)}
    child = Child(behave)

    def limited(case: Case, plan: Plan, timeout: float) -> Timing:
        return child(case, plan, timeout=1.0 if plan == HANGS else timeout)

    tune.tune(work, plans.__getitem__, limited, found.append)
    process = child._process
    child.close()
    assert not process.is_alive()
    assert found == [Entry(*each.key, 1, FAST, us=8.0, library_us=10.0) for each in work]
    said = capsys.readouterr().err.splitlines()
    assert [line.split(", ", 2) for line in said if line.startswith("left out")] == [
        [f"left out: {plan}", str(at), why]
        for plan, at, why in (
            (CRASHES, work[0], "crashed: exit status 7"),
            (HANGS, work[0], "hung: no answer in 1 s"),
            (HANGS, work[1], "hung before, at another shape"),
        )
    ]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("first\nsecond", "ValueError: first"),
        ("at 3:4:\n  x = y\n  ^\nunsupported", "ValueError: at 3:4: ... unsupported"),
        ("", "ValueError: "),
    ],
)
def test_a_reason_is_one_line_and_the_process_ends(message: str, expected: str) -> None:
    def fails(case: Case) -> None:
        raise ValueError(message)

    ours, theirs = Pipe()
    ours.send((case(),))
    trials._serve(theirs, fails)
    assert ours.recv() == (None, expected)


def test_the_fastest_is_measured_once_more() -> None:
    """What looked fast by chance is recorded as it is."""
    times = {SLOW: [9.0], FAST: [4.0, 11.0]}
    entry = tune.fastest(case(), (SLOW, FAST), lambda _, plan: Timing(times[plan].pop(0), 10.0))
    assert entry == Entry(*case().key, 1, FAST, us=11.0, library_us=10.0)


def test_minutes_stop_between_two_trials(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A case has three, of a minute each."""
    now, found = [0.0], []
    monkeypatch.setattr(tune.time, "monotonic", lambda: now[0])

    def child(case: Case, plan: Plan, timeout: float) -> Timing:
        now[0] += 60
        return Timing(9.0, 10.0)

    work = [case(shape=replace(TINY, cin=cin)) for cin in (8, 16, 32, 64)]
    tune.tune(work, lambda _: (SLOW, FAST), child, found.append, minutes=7)
    assert [entry.shape for entry in found] == [each.shape for each in work[:2]]
    assert now[0] == 7 * 60
    assert "2 of 4 not ended: 7 minutes have passed" in capsys.readouterr().err


# What is measured and written


def test_every_convolution_behind_a_norm_is_measured_the_largest_share_first() -> None:
    """All but the 1 x 1 ones, and the first ones of blocks that resample behind the norm."""
    for network in NETWORKS:
        wanted = {convolution for convolution in network.convolutions() if convolution[3] == 3}
        resampled = {(b.cin, b.cout, b.out_size, 3) for b in network.blocks if b.resample}
        others = {(b.cin, b.cout, b.out_size, 3) for b in network.blocks if not b.resample}
        wanted -= {first for first in resampled - others if first[0] != first[1]}
        found = [c.shape for c in tune.cases([network], ["bf16"])]
        assert {(s.cin, s.cout, s.height, s.kernel) for s in found} == wanted
    every = tune.cases(NETWORKS, ["bf16", "fp16"])
    assert len({c.key for c in every}) == len(every) == 2 * 2 * 36
    shared = [c for c in every if c.shape == Shape(256, 256, 32, 32, 3)]
    assert [(c.embedding, c.batch) for c in shared] == [("pre_shift", 64)] * 4
    # In units of 64 to 64 channels at 8 x 8: half a one and one; two of which one, behind a
    # resampling, is not measured.
    blocks = (Block(32, 64, 8), Block(64, 64, 16, "down"))
    two = tune.cases([Network("Two", 16, False, (1, 1), 64, 4, blocks)], ["bf16"])
    assert [(c.shape.cin, c.direction) for c in two] == [
        (cin, direction) for cin in (64, 32) for direction in DIRECTIONS
    ]
    assert [c.embedding for c in two] == ["pre_shift"] * 2 + [""] * 2


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[pytest.MonkeyPatch]:
    """The command on a GPU that is not there, and its table."""
    monkeypatch.setattr(tune, "_architecture", lambda: (9, 0))
    monkeypatch.setattr(conv_table, "FOLDER", tmp_path / "tuned")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(Child, "__call__", lambda *_, timeout: Timing(9.0, 10.0))
    monkeypatch.setattr("sys.argv", ["tune", "--dtype", "fp16"])
    yield monkeypatch


def test_the_command_goes_on(
    command: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after three cases; what was measured stays as it was."""
    record, written = conv_table.write, []

    def killed(file: Path, header: dict, entries: Any) -> None:
        record(file, header, entries)
        written.append(file)
        if len(written) == 3:
            raise KeyboardInterrupt

    command.setattr(conv_table, "write", killed)
    assert tune.main() == 130
    first = conv_table.read(conv_table.path((9, 0)))
    assert len(first) == 3
    command.setattr(Child, "__call__", lambda *_, timeout: Timing(11.0, 10.0))
    assert tune.main() == 0
    found = conv_table.read(conv_table.path((9, 0)))
    assert set(found) == {c.key for c in tune.cases(NETWORKS, ["fp16"])}
    assert {key: found[key] for key in first} == first
    assert sum(entry.wins for entry in found.values()) == 3
    assert "loses, 11.0 us against 10.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"machine": "NVIDIA A100", "entries": [%s]}', "error: measured on NVIDIA A100, "),
        ("{", "error: not a table of plans"),
    ],
)
def test_a_table_that_will_not_do_is_refused_before_measuring(
    content: str, message: str, command: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = conv_table.path((9, 0))
    file.parent.mkdir()
    conv_table.write(file, {}, [tune.Entry(*case().key, 1, FAST, 8.0, 10.0)])
    row = file.read_text().partition("[")[2].rpartition("]")[0]
    file.write_text(content.replace("%s", row))
    assert tune.main() == 1
    said = capsys.readouterr().err
    assert said.startswith(message) and len(said.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--dtype", "fp8"]])
def test_a_wrong_argument_is_one_line(
    arguments: list[str], command: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command.setattr("sys.argv", ["tune", *arguments])
    with pytest.raises(SystemExit) as end:
        tune.main()
    said = capsys.readouterr().err
    assert end.value.code == 1 and len(said.splitlines()) == 1
    assert said.startswith("error: ") and arguments[0] in said and arguments[1] in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"torch.cuda.is_available": lambda: False}, "no CUDA device is here, an A100"),
        ({"fastgan_kernels.runtime.HAS_TRITON": False}, "triton is not installed"),
        ({"fastgan_kernels.runtime.INTERPRETED": True}, "TRITON_INTERPRET=1 is set"),
        ({"fastgan_kernels.runtime.INTERPRETED": False}, "never tried on sm_75, sm_80 or sm_90"),
    ],
)
def test_a_machine_that_will_not_do(
    changes: dict[str, Any],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["tune"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    unknown = "the kernels were never tried on sm_75"
    monkeypatch.setattr(tune.dispatch, "unknown_architecture", lambda _: unknown)
    for name, value in changes.items():
        monkeypatch.setattr(name, value)
    assert tune.main() == 1
    said = capsys.readouterr().err
    assert said.startswith("error: nothing to measure on, ") and message in said
    assert len(said.splitlines()) == 1
