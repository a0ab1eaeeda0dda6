"""The command that measures plans: what it measures, what it leaves out, what it writes."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgan_kernels.aot.shapes import NETWORKS, Block, Network
from fastgan_kernels.norm_silu_conv import table as conv_table
from fastgan_kernels.norm_silu_conv.plans import DIRECTIONS, LIBRARY, Plan, Shape
from fastgan_kernels.norm_silu_conv.table import Entry
from fastgan_kernels.tune import __main__ as tune
from fastgan_kernels.tune import child as child_process
from fastgan_kernels.tune.child import Child, Failed, Hung
from fastgan_kernels.tune.jobs import Case, Job, jobs, queue
from fastgan_kernels.tune.worker import INDUCTOR, Timing

from benchmarks.cases import norm_convolutions

ROOT = Path(__file__).resolve().parents[2]
TINY = Shape(16, 24, 4, 4, 3)
SLOW, FAST = Plan("fused", 16, 16, 16, 4, 2), Plan("fused", 32, 16, 16, 4, 2, tanh=True)
HANGS, CRASHES, RAISES = (Plan("behind", 16, 16, 16, 4, stages) for stages in (2, 3, 4))
ALL = (SLOW, HANGS, CRASHES, RAISES, FAST)
US = {LIBRARY: 10.0, INDUCTOR: 12.0, SLOW: 20.0, FAST: 8.0}


def behave(case: Case, candidate: Plan | str) -> Timing:
    """In the child: a measurement that ends in every way it may."""
    if candidate == HANGS:
        time.sleep(600)
    if candidate == CRASHES:
        os._exit(7)
    if candidate == RAISES:
        raise RuntimeError("out of resource: shared memory\nand a second line")
    return Timing(US[candidate], US[LIBRARY])


def raises(case: Case, candidate: Plan | str) -> Timing:
    """The same without a process."""
    if candidate in (HANGS, CRASHES, RAISES):
        raise Failed("it failed")
    return behave(case, candidate)


def job(direction: str = "forward", shape: Shape = TINY, **options: Any) -> Job:
    found = Job(shape, "fp16", direction, 1, ("",), "Tiny", 0.5)  # type: ignore[arg-type]
    return replace(found, **options)


def entry(job: Job, us: float = 8.0) -> Entry:
    return Entry(*job.key, job.batch, FAST, us, 10.0)


# What is measured


@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.name)
def test_every_convolution_behind_a_norm_is_measured(network: Network) -> None:
    """The benchmark's table of them is written apart."""
    expected = {
        (shape.cin, shape.cout, shape.size, shape.embedding)
        for shape, _ in norm_convolutions(network)
    }
    work = jobs([network], ["bf16"])
    for direction in DIRECTIONS:
        found = [case for j in work if j.direction == direction for case in j.cases]
        assert {(c.shape.cin, c.shape.cout, c.shape.height, c.embedding) for c in found} == expected
        assert len(found) == len(expected)


def test_a_shape_of_several_networks_is_one_entry() -> None:
    work = jobs(NETWORKS, ["bf16", "fp16"])
    assert len({j.key for j in work}) == len(work) == 2 * 2 * 36
    shared = [j for j in work if j.shape == Shape(256, 256, 32, 32, 3)]
    assert len(shared) == 4
    assert all(set(j.embeddings) == {"", "pre_shift"} and j.batch == 64 for j in shared)
    assert [j.network for j in shared] == ["CIFAR-10"] * 4


def test_the_largest_share_comes_first_behind_what_the_table_lacks() -> None:
    """In units of 64 to 64 channels at 8 x 8: half a one and one; two of which one, behind a
    resampling, is not measured; and the 1 x 1 one behind an attention, a ninth."""
    blocks = (Block(32, 64, 8), Block(64, 64, 16, "down", heads=1))
    network = Network("Two", 16, False, (1, 1), 64, 4, blocks)
    work = jobs([network], ["bf16"])
    first, second = (Shape(cin, 64, 8, 8, 3) for cin in (32, 64))
    shares = {j.shape: j.share for j in work}
    total = 0.5 + 1 + 1 + 1 + 1 / 9
    assert shares == pytest.approx({first: 0.5 / total, second: 2 / total})
    assert [(j.shape, j.direction) for j in queue(work, [])] == [
        (shape, direction) for shape in (second, first) for direction in DIRECTIONS
    ]
    known = [j.key for j in work if j.shape == second]
    assert [j.shape for j in queue(work, known)] == [first, first, second, second]


# What a candidate may do


def test_what_hangs_crashes_or_raises_is_left_out_and_the_rest_goes_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second shape does not wait for what hung at the first."""
    monkeypatch.setattr(child_process, "LEAVE_SECONDS", 1.0)
    work, found = [job(), job(shape=replace(TINY, cin=32))], []
    plans = {work[0].key: ALL, work[1].key: (HANGS, SLOW)}
    with Child(behave) as child:
        start = time.monotonic()
        tune.tune(work, lambda j: plans[j.key], partial(tune._in, child, 2.0), found.append)
        child(work[0].cases[0], SLOW, timeout=60)
        process = child._process
    assert not process.is_alive() and time.monotonic() - start < 100
    assert [r.entry for r in found] == [
        entry(work[0]),
        Entry(*work[1].key, 1, SLOW, us=20.0, library_us=10.0),
    ]
    assert [r.inductor_us for r in found] == [12.0, 12.0]
    said = capsys.readouterr().err.splitlines()
    left_out = [line for line in said if line.startswith("left out")]
    assert [line.split(", ", 2)[0] for line in left_out] == [
        f"left out: {plan}" for plan in (HANGS, CRASHES, RAISES, HANGS)
    ]
    reasons = [line.split(", ", 2)[2] for line in left_out]
    assert reasons == [
        "hung: no answer in 2 s",
        "crashed: exit status 7",
        "RuntimeError: out of resource: shared memory",
        "hung before, at another shape",
    ]


def test_a_machine_on_which_no_process_starts_ends_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(child_process, "START_SECONDS", 0.0)
    with Child(behave) as child:
        with pytest.raises(ValueError, match=r"new process hung.*the same command would go on"):
            child(job().cases[0], SLOW, timeout=60)
        assert child._process is None


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("first\nsecond", "ValueError: first"),
        ("at 3:4:\n  x = y\n  ^\nunsupported", "ValueError: at 3:4: ... unsupported"),
        ("", "ValueError: "),
    ],
)
def test_a_reason_is_one_line(message: str, expected: str) -> None:
    assert child_process._one_line(ValueError(message)) == expected


def test_only_what_is_tried_has_the_short_limit() -> None:
    limits = []

    def ask(case: Case, candidate: Plan | str, *, timeout: float) -> Timing:
        limits.append(timeout)
        raise Hung("")

    once = tune.Once(partial(tune._in, ask, 5.0), lambda: True)  # type: ignore[arg-type]
    for candidate in (LIBRARY, INDUCTOR, SLOW, LIBRARY, INDUCTOR, SLOW):
        with pytest.raises(Failed):
            once(job().cases[0], candidate)
    assert limits == [300.0, 300.0, 5.0, 300.0, 300.0]


# What is chosen and written


def test_the_sum_of_a_shapes_cases_decides() -> None:
    """SLOW is faster at the first convolution, FAST at both together."""
    us = {(SLOW, ""): 1.0, (FAST, ""): 2.0, (SLOW, "pre_shift"): 9.0, (FAST, "pre_shift"): 7.0}

    def measure(case: Case, candidate: Plan | str) -> Timing:
        return Timing(us.get((candidate, case.embedding), 5.0), 5.5)

    found: list[tune.Result] = []
    both = job(embeddings=("", "pre_shift"))
    tune.tune([both], lambda _: (SLOW, FAST), measure, found.append, inductor=False)
    assert [(r.entry.plan, r.entry.us, r.entry.library_us) for r in found if r.entry] == [
        (FAST, 9.0, 11.0)
    ]
    assert found[0].inductor_us is None


def test_the_fastest_is_measured_once_more() -> None:
    """What looked fast by chance is recorded as it is; what then fails is not taken."""
    times = {SLOW: [9.0, 9.5], FAST: [4.0, 11.0], RAISES: [3.0]}

    def measure(case: Case, candidate: Plan | str) -> Timing:
        left = times.get(candidate, [10.0])  # type: ignore[call-overload]
        if not left:
            raise Failed("another result")
        return Timing(left.pop(0), 10.0)

    found: list[tune.Result] = []
    tune.tune([job()], lambda _: (SLOW, FAST, RAISES), measure, found.append, inductor=False)
    assert [r.entry for r in found] == [entry(job(), us=11.0)]


def test_a_plan_that_fails_one_case_is_out(capsys: pytest.CaptureFixture[str]) -> None:
    def measure(case: Case, candidate: Plan | str) -> Timing:
        if candidate == FAST and case.embedding:
            raise Failed("it failed")
        return behave(case, candidate)

    found: list[tune.Result] = []
    tune.tune([job(embeddings=("", "scale shift"))], lambda _: (FAST, SLOW), measure, found.append)
    assert found[0].entry is not None and found[0].entry.plan == SLOW
    assert f"left out: {FAST}, 16 to 24 4x4 fp16 forward, it failed" in capsys.readouterr().err


def test_minutes_stop_between_two_measurements(capsys: pytest.CaptureFixture[str]) -> None:
    """A shape has five: the library, two plans, Inductor, the best again; a minute each."""
    now = [0.0]

    def measure(case: Case, candidate: Plan | str) -> Timing:
        now[0] += 60
        return Timing(9.0, 10.0)

    work = [job(shape=replace(TINY, cin=cin)) for cin in (8, 16, 32, 64)]
    found: list[tune.Result] = []
    plans = (SLOW, FAST)
    tune.tune(work, lambda _: plans, measure, found.append, minutes=12, clock=lambda: now[0])
    assert [r.job for r in found] == work[:2] and now[0] == 12 * 60
    said = capsys.readouterr().err
    assert "1 of 4 done" in said and "2 of 4 not ended: 12 minutes have passed" in said


def test_a_library_that_fails_leaves_the_shape_out() -> None:
    def measure(case: Case, candidate: Plan | str) -> Timing:
        raise Failed("out of memory")

    found: list[tune.Result] = []
    tune.tune([job()], lambda _: ALL, measure, found.append)
    assert found == []


HEADER = {"machine": "NVIDIA H200", "n": 20}


def test_what_is_measured_replaces_its_key_and_no_other(tmp_path: Path) -> None:
    file = tmp_path / "sm_90.json"
    kept, replaced, gone = (job(shape=replace(TINY, cin=cin)) for cin in (8, 16, 32))
    conv_table.write(file, HEADER, map(entry, (kept, replaced, gone)))
    table = tune.Table(file, HEADER | {"n": 30})
    table.record(tune.Result(replaced, 10.0, None, entry(replaced, us=5.0)))
    assert set(conv_table.read(file)) == {kept.key, replaced.key, gone.key}
    table.record(tune.Result(gone, 10.0, None, None))
    assert conv_table.read(file) == {kept.key: entry(kept), replaced.key: entry(replaced, us=5.0)}
    assert '"n": 30' in file.read_text()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.json", '{"machine": "NVIDIA A100", "entries": []}', r"measured on NVIDIA A100, .*t\.j"),
        ("t.json", "{", "not a table of plans"),
        ("no/t.json", None, "no folder .*no, for --out"),
    ],
)
def test_a_file_that_will_not_do_is_refused_before_measuring(
    name: str, content: str | None, message: str, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        tune.Table(tmp_path / name, HEADER)


def test_the_table_shows_losses_like_wins() -> None:
    order = [job(shape=replace(TINY, cin=cin)) for cin in (8, 16, 32)]
    results = [
        tune.Result(order[2], 10.0, 12.0, entry(order[2], us=12.5)),
        tune.Result(order[0], 10.0, None, entry(order[0])),
        tune.Result(order[1], 10.0, 12.0, None),
    ]
    head, *rows = (line.split() for line in tune.table(results, order).splitlines())
    assert head[0] == "network" and head[-1] == "plan"
    assert [row[1] for row in rows] == ["8", "16", "32"]
    # 2 x 9 x 8 x 24 x 16 FLOP in 8 us are 0.007 TFLOP/s.
    assert rows[0][7:] == [*["1", "10.0", "-", "8.0", "1.250", "wins", "0"], *str(FAST).split()]
    assert rows[1][7:] == [*["1", "10.0", "12.0", "-", "-", "-", "-", "none", "ran"]]
    assert rows[2][7:13] == ["1", "10.0", "12.0", "12.5", "0.800", "loses"]


class InProcess:
    """In the place of Child."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, *arguments: Any, timeout: float) -> Any:
        return self.function(*arguments)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The command on a GPU that is not there."""
    monkeypatch.setattr(tune, "_architecture", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H200")
    monkeypatch.setattr(tune, "Child", InProcess)
    monkeypatch.setattr(tune, "measure", lambda case, candidate: Timing(9.0, 10.0))
    return monkeypatch


def test_the_command(
    command: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "sm_90.json"
    arguments = ["--network", "CIFAR-10", "--dtype", "fp16", "--out", str(file), "--no-inductor"]
    command.setattr(sys, "argv", ["tune", *arguments])
    assert tune.main() == 0
    out = capsys.readouterr().out.splitlines()
    work = jobs(NETWORKS[:1], ["fp16"])
    assert set(conv_table.read(file)) == {j.key for j in work} and len(out) == 2 + len(work)
    assert "machine: NVIDIA H200" in out[0] and str(tmp_path) not in out[0] + file.read_text()
    assert "--network CIFAR-10 --timeout 60 --no-inductor" in out[0]


def test_what_was_measured_is_shown_when_nothing_more_can_be(
    command: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []

    def measure(case: Case, candidate: Plan | str) -> Timing:
        calls.append(case)
        if len({(c.shape, c.direction) for c in calls}) > 3:
            raise ValueError("nothing can be measured any more")
        return Timing(11.0, 10.0)

    command.setattr(tune, "measure", measure)
    command.setattr(sys, "argv", ["tune", "--out", str(tmp_path / "t.json")])
    assert tune.main() == 1
    found = capsys.readouterr()
    assert found.err.endswith("error: nothing can be measured any more\n")
    assert found.out.count("loses") == 3 == len(conv_table.read(tmp_path / "t.json"))


def test_without_a_gpu_one_line_and_nothing_written(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    done = subprocess.run(
        [sys.executable, "-m", "fastgan_kernels.tune", "--out", str(file)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (1, "", 1)
    assert done.stderr.startswith("error: nothing to measure on, no CUDA device is here, an A100")
    assert not file.exists()


@pytest.mark.parametrize("arguments", [["--minutes", "0"], ["--timeout", "-1"], ["--dtype", "fp8"]])
def test_a_wrong_argument_is_one_line(
    arguments: list[str], command: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command.setattr(sys, "argv", ["tune", *arguments])
    with pytest.raises(SystemExit) as end:
        tune.main()
    said = capsys.readouterr().err
    assert end.value.code == 1 and len(said.splitlines()) == 1
    assert said.startswith("error: ") and arguments[0] in said and arguments[1] in said


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fastgan_kernels.runtime.HAS_TRITON": False}, "triton is not installed"),
        ({"fastgan_kernels.runtime.INTERPRETED": True}, "TRITON_INTERPRET=1 is set"),
        (
            {"fastgan_kernels.runtime.INTERPRETED": False},
            "never tried on sm_75, sm_80 or sm_90 would do",
        ),
    ],
)
def test_a_gpu_that_will_not_do(
    changes: dict[str, bool], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        tune.dispatch, "unknown_architecture", lambda _: "the kernels were never tried on sm_75"
    )
    for name, value in changes.items():
        monkeypatch.setattr(name, value)
    with pytest.raises(ValueError, match=message):
        tune._architecture()
