"""Where the kernels run, how a case is measured, and what the JSON says about chip and failures."""

import os
import sys
from collections.abc import Callable, Generator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

# Before the kernels are imported: without a GPU they run in Triton's interpreter. The environment
# would win over the choice that is made here.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("FASTGAN_KERNELS", None)
# The tests' yardstick of accuracy is the benchmarks' too.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests/kernels"))

from benchmarks import cases, measure

FAILED = pytest.StashKey[list[dict[str, Any]]]()
CHIP = pytest.StashKey[measure.Chip]()
CLOCK = pytest.mark.benchmark(timer=measure.seconds, disable_gc=True)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAILED] = []
    # PyTorch otherwise refuses to run a compiled backward a second time on the same forward.
    torch._functorch.config.donated_buffer = False
    torch.backends.cudnn.benchmark = True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if not measure.ON_GPU:
        session.config._benchmarksession.quiet = True  # type: ignore[attr-defined]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`bench` of a test is one candidate at one shape in one direction of its module's OP."""
    op = metafunc.module.OP
    runs = [pytest.param((op, *run), id="-".join(map(str, run)), marks=CLOCK) for run in op.runs()]
    metafunc.parametrize("bench", runs, indirect=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.failed:
        _, *run = item.callspec.params["bench"]  # type: ignore[attr-defined]
        item.config.stash[FAILED].append(_facts(*run))
    return report


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json |= measure.header()
    output_json["rates"] = asdict(config.stash[CHIP])
    output_json["failed"] = config.stash[FAILED]
    for benchmark in output_json["benchmarks"]:
        # Objects, which JSON cannot hold; extra_info names them.
        del benchmark["params"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not measure.ON_GPU:
        terminalreporter.write_line("CPU: these are no speeds")


def _facts(case: cases.Case, candidate: str, direction: str) -> dict[str, Any]:
    """What a row of results is about."""
    found = {"op": case.op, "network": case.network.name, "shape": str(case.shape)}
    found |= {"candidate": candidate, "direction": direction}
    names = ("count", "channels", "pixels", "batch")
    return found | {name: getattr(case, name) for name in names}


@pytest.fixture(scope="session")
def chip(pytestconfig: pytest.Config) -> measure.Chip:
    pytestconfig.stash[CHIP] = measure.measure_chip()
    return pytestconfig.stash[CHIP]


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, chip: measure.Chip) -> Callable[[], None]:
    """Fails before anything is timed where the candidate is not accurate."""
    op, case, candidate, direction = request.param

    def run() -> None:
        with measure.one_stream():
            function = cases.accurate(op, case, candidate)
            inputs = cases.make(op, case)
            # x, which is there before, is counted too.
            kept = measure.kept_bytes(lambda: function(inputs), inputs["x"].nbytes)
            count = measure.copies(2 * inputs["x"].nbytes)
            rotation = measure.Rotation(cases.calls(function, inputs, direction, count))
            floor = chip.floor(op.parts(case, direction))
            benchmark.group = f"{case.op} {case} {direction}"
            benchmark.extra_info |= _facts(case, candidate, direction)
            benchmark.extra_info |= {"kept_bytes": kept, "floor_seconds": floor}
            benchmark.pedantic(
                rotation, rounds=measure.ROUNDS, iterations=rotation.iterations(), warmup_rounds=1
            )

    return run
