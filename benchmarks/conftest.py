"""What pytest-benchmark measures: every candidate of a file's OP at every published shape."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

# Before the kernels are imported: without a GPU they run in Triton's interpreter. The environment
# would win over the choice that is made here.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("FASTGAN_KERNELS", None)

from benchmarks import cases, measure


def pytest_configure() -> None:
    cases.prepare()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`bench` of a test is one candidate at one shape in one direction of its module's OP."""
    op = metafunc.module.OP
    runs = [
        pytest.param((op, case, candidate, direction), id=f"{case}-{candidate}-{direction}")
        for case in cases.measurable(op)
        for candidate in op.candidates
        for direction in cases.DIRECTIONS
    ]
    metafunc.parametrize("bench", runs, indirect=True)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not measure.ON_GPU:
        terminalreporter.write_line("without a GPU: tiny shapes, these are no speeds")


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any) -> Callable[[], None]:
    """Fails before anything is timed where the candidate is not accurate.

    A round's iterations are of all inputs in turn: `calls` in extra_info says how many those are.
    """
    op, case, candidate, direction = request.param

    def run() -> None:
        with measure.one_stream():
            function = cases.accurate(op, case, candidate, cases.truth(op, case))
            calls = cases.calls(function, cases.make(op, case), direction)
            replay, turns = measure.warmed_up(calls)
            benchmark.group = f"{case.op} {case} {direction}"
            benchmark.extra_info |= {"candidate": candidate, "calls": len(calls)}
            benchmark._timer = measure.seconds  # synchronises
            benchmark.pedantic(replay, rounds=measure.ROUNDS, iterations=turns)

    return run
