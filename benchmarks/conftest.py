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

from fastgan_kernels import dispatch

from benchmarks import measure, op
from benchmarks.cases import Case

FAILED = pytest.StashKey[list[dict[str, str]]]()
CHIP = pytest.StashKey[measure.Chip]()
NO_SPEEDS = "CPU: these are no speeds"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--launch",
        choices=measure.LAUNCHES,
        default="graph",
        help="how a GPU's calls start: replayed as a CUDA graph, or one by one from Python",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[FAILED] = []
    # PyTorch otherwise refuses to run a compiled backward a second time on the same forward.
    torch._functorch.config.donated_buffer = False
    torch.backends.cudnn.benchmark = True


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    if not measure.ON_GPU:
        session.config._benchmarksession.quiet = True  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
    if report.failed and params and isinstance(params.get("case"), Case):
        found = _identity(params["case"], params["candidate"], params["direction"])
        item.config.stash[FAILED].append(found)
    return report


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["chip"] = asdict(config.stash[CHIP])
    output_json["device"] = measure.DEVICE
    output_json["launch"] = config.getoption("launch")
    output_json["software"] = {
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if measure.ON_GPU else None,
        "python": sys.version.split()[0],
    }
    output_json["failed"] = config.stash[FAILED]
    for benchmark in output_json["benchmarks"]:
        # Objects, which JSON cannot hold; extra_info names them.
        del benchmark["params"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not measure.ON_GPU:
        terminalreporter.write_line(NO_SPEEDS)


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _identity(case: Case, candidate: str, direction: str) -> dict[str, str]:
    return {
        "op": case.op,
        "network": case.network.name,
        "shape": case.label,
        "candidate": candidate,
        "direction": direction,
    }


@pytest.fixture(scope="session")
def chip(pytestconfig: pytest.Config) -> measure.Chip:
    with measure.one_stream():
        found = measure.measure_chip()
    pytestconfig.stash[CHIP] = found
    return found


@pytest.fixture
def bench(
    benchmark: Any, chip: measure.Chip, pytestconfig: pytest.Config
) -> Callable[[op.Op, Case, str, str], None]:
    """Fails before anything is timed where the candidate is not accurate."""
    dispatch.use("triton")

    def run(what: op.Op, case: Case, candidate: str, direction: str) -> None:
        benchmark.group = f"{case.op} {case} {direction}"
        with measure.one_stream():
            function = op.accurate(what, case, candidate)
            inputs, dy = op.make(what, case), op.truth(what, case)[2]
            kept, peak = measure.kept_and_peak(function, inputs, dy) or (None, None)
            count = measure.copies(inputs["x"].nbytes + dy.nbytes, chip.l2_bytes)
            calls = op.calls(function, inputs, dy, direction, count)
            rotation = measure.Rotation(calls, pytestconfig.getoption("launch"))
            benchmark.extra_info.update(
                _identity(case, candidate, direction),
                **{"count": case.count, "channels": case.channels, "pixels": case.pixels},
                **{"batch": case.batch, "device": measure.DEVICE, "inputs": count},
                **{"kept_bytes": kept, "peak_bytes": peak},
                floor_seconds=chip.floor(what.parts(case, direction)),
            )
            benchmark.pedantic(
                rotation, rounds=measure.ROUNDS, iterations=rotation.iterations(), warmup_rounds=1
            )

    return run
