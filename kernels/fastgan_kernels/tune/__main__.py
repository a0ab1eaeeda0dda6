"""Measures every plan of norm_silu_conv on this GPU: python -m fastgan_kernels.tune

At every 3 x 3 convolution of the published networks that stands behind a norm with SiLU, forward
and backward: the library's plan (cuDNN behind group_norm_silu), Inductor, and all plans that may
run here. The fastest go to the table that dispatch reads, with what the library took (also where it
is faster). The file is written after every shape; shapes that it lacks come first, of those the
ones with the largest share of a network's arithmetic: the same command, given again, goes on.
"""

import json
import shlex
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from pathlib import Path
from typing import Any

import torch

from fastgan_kernels import dispatch, runtime
from fastgan_kernels.aot.__main__ import Parser
from fastgan_kernels.aot.shapes import NETWORKS
from fastgan_kernels.norm_silu_conv import table as conv_table
from fastgan_kernels.norm_silu_conv.plans import LIBRARY, Architecture, Direction, Plan, candidates
from fastgan_kernels.norm_silu_conv.table import Entry
from fastgan_kernels.tune.child import Child, Failed, Hung
from fastgan_kernels.tune.jobs import Case, Job, jobs, queue
from fastgan_kernels.tune.timing import ROUNDS
from fastgan_kernels.tune.worker import DTYPES, INDUCTOR, Candidate, Timing, measure

# Inductor compiles for long, and the library's first call loads cuDNN.
TRUSTED_SECONDS = 300.0
Measure = Callable[[Case, Candidate], Timing]
"""Raises Failed where the candidate cannot be measured, Hung where it does not end."""


@dataclass(frozen=True)
class Result:
    """Microseconds of a job's cases together; without an entry where no Triton plan ran."""

    job: Job
    library_us: float
    inductor_us: float | None
    entry: Entry | None


class TimeUp(Exception):
    """The minutes have passed."""


class Once:
    """Measures, and does not wait a second time for a plan that hung, at whatever shape.

    TimeUp where `begin` says that nothing more is begun.
    """

    def __init__(self, measure: Measure, begin: Callable[[], bool]) -> None:
        self.measure, self.begin = measure, begin
        self.hung: set[tuple[Candidate, Direction]] = set()

    def __call__(self, case: Case, candidate: Candidate) -> Timing:
        if not self.begin():
            raise TimeUp
        if (candidate, case.direction) in self.hung:
            raise Failed("hung before, at another shape")
        try:
            return self.measure(case, candidate)
        except Hung:
            if candidate not in (LIBRARY, INDUCTOR):
                self.hung.add((candidate, case.direction))
            raise


def tune(
    work: Sequence[Job],
    plans: Callable[[Job], Iterable[Plan]],
    measure: Measure,
    record: Callable[[Result], None],
    *,
    inductor: bool = True,
    minutes: float = inf,
    clock: Callable[[], float] = time.monotonic,
) -> None:
    """Measures job after job, and hands each result to `record`, until `minutes` have passed, also
    in the middle of a job."""
    start = clock()
    once = Once(measure, lambda: (clock() - start) / 60 < minutes)
    for done, job in enumerate(work):
        passed = (clock() - start) / 60
        if passed >= minutes:
            _say(f"{len(work) - done} of {len(work)} not begun: {minutes:g} minutes have passed")
            return
        if done:
            left = min(passed / done * (len(work) - done), minutes - passed)
            _say(f"{done} of {len(work)} done, about {left:.0f} minutes left")
        try:
            result = _measured(job, plans(job), once, inductor)
        except TimeUp:
            _say(f"{len(work) - done} of {len(work)} not ended: {minutes:g} minutes have passed")
            return
        if result is not None:
            record(result)
            _say(f"{job}: {_outcome(result)}")


def _measured(job: Job, plans: Iterable[Plan], measure: Measure, inductor: bool) -> Result | None:
    """The job's result, None where even the library has none; a line for each candidate."""
    library = _total(job, LIBRARY, measure)
    if library is None:
        return None
    timings = {plan: _total(job, plan, measure) for plan in plans}
    found = {plan: timing.us for plan, timing in timings.items() if timing is not None}
    compiled = _total(job, INDUCTOR, measure) if inductor else None
    inductor_us = None if compiled is None else compiled.us
    for plan in sorted(found, key=found.__getitem__):
        # Once more: the smallest of several medians is too small.
        again = _total(job, plan, measure)
        if again is not None:
            us, library_us = round(again.us, 2), round(again.library_us, 2)
            entry = Entry(*job.key, job.batch, plan, us, library_us)
            return Result(job, library_us, inductor_us, entry)
    return Result(job, library.us, inductor_us, None)


def _total(job: Job, candidate: Candidate, measure: Measure) -> Timing | None:
    """Of all the job's cases; None, and a line that says why, where one of them fails."""
    try:
        found = [measure(case, candidate) for case in job.cases]
    except Failed as why:
        _say(f"left out: {candidate}, {job}, {why}")
        return None
    total = Timing(sum(each.us for each in found), sum(each.library_us for each in found))
    _say(f"  {candidate}: {total.us:.1f} us, library / this {total.library_us / total.us:.3f}")
    return total


def _outcome(result: Result) -> str:
    if result.entry is None:
        return "no plan of Triton's ran"
    entry, won = result.entry, "wins" if result.entry.wins else "loses"
    return f"{entry.plan} {won}, {entry.us:.1f} us against {entry.library_us:.1f}"


def table(results: Iterable[Result], order: Sequence[Job]) -> str:
    """A line for each result in the order of `order`, losses like wins; TFLOP/s are Triton's."""
    head = ("network", "shape", "batch", "library us", "inductor us", "triton us", "library/triton")
    rows = [(*head, "", "TFLOP/s", "plan")]
    position = {job.key: i for i, job in enumerate(order)}
    for r in sorted(results, key=lambda result: position[result.job.key]):
        inductor_us = "-" if r.inductor_us is None else f"{r.inductor_us:.1f}"
        row = (r.job.network, str(r.job), str(r.job.batch), f"{r.library_us:.1f}", inductor_us)
        found = ("-", "-", "-", "-", "none ran")
        if r.entry is not None:
            rate = sum(case.flop for case in r.job.cases) / r.entry.us / 1e6
            ratio = f"{r.entry.library_us / r.entry.us:.3f}"
            won = "wins" if r.entry.wins else "loses"
            found = (f"{r.entry.us:.1f}", ratio, won, f"{rate:.0f}", str(r.entry.plan))
        rows.append((*row, *found))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
    return "\n".join(lines)


class Table:
    """The file: what it held, with what is measured now in the place of the same keys."""

    def __init__(self, file: Path, header: dict[str, Any]) -> None:
        """ValueError where it is no table, or one of another machine, or cannot be written."""
        self.file, self.header, self.entries = file, header, conv_table.read(file)
        self.results: list[Result] = []
        if not file.parent.is_dir():
            raise ValueError(f"no folder {file.parent}, for --out {file}, an existing one would do")
        machine = json.loads(file.read_text()).get("machine") if file.is_file() else None
        if machine not in (None, header["machine"]):
            raise ValueError(
                f"measured on {machine}, {file}, on {header['machine']} another --out would do"
            )

    def record(self, result: Result) -> None:
        self.results.append(result)
        self.entries.pop(result.job.key, None)
        if result.entry is not None:
            self.entries[result.job.key] = result.entry
        conv_table.write(self.file, self.header, self.entries.values())


def _options() -> Namespace:
    parser = Parser(prog="python -m fastgan_kernels.tune", description=__doc__)
    names = [network.name for network in NETWORKS]
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp16"), default=["bf16"])
    parser.add_argument("--network", nargs="+", choices=names, default=names)
    parser.add_argument("--out", type=Path, metavar="FILE", help="in place of the package's table")
    parser.add_argument("--minutes", type=float, default=inf, help="begin nothing after these")
    parser.add_argument(
        "--timeout", type=float, default=60.0, help="seconds for a plan, its compilation included"
    )
    parser.add_argument("--no-inductor", action="store_true", help="it compiles for long")
    options = parser.parse_args()
    for name in ("minutes", "timeout"):
        if not getattr(options, name) > 0:
            parser.error(f"--{name} is {getattr(options, name)}, more than 0 would do")
    return options


def _architecture() -> Architecture:
    """This GPU's; ValueError where there is nothing to measure."""
    if not torch.cuda.is_available():
        why = "no CUDA device is here, an A100, H100 or H200"
    elif not runtime.HAS_TRITON:
        why = "triton is not installed, triton"
    elif runtime.INTERPRETED:
        why = "TRITON_INTERPRET=1 is set, to be without it"
    elif unknown := dispatch.unknown_architecture("cuda"):
        why = f"{unknown}, sm_80 or sm_90"
    else:
        return torch.cuda.get_device_capability()
    raise ValueError(f"nothing to measure on, {why} would do")


def _header(options: Namespace) -> dict[str, Any]:
    """Of what machine the table is and how it was made."""
    import triton

    command = ["python", "-m", "fastgan_kernels.tune", "--dtype", *options.dtype]
    command += ["--network", *options.network, "--timeout", f"{options.timeout:g}"]
    command += [] if options.minutes == inf else ["--minutes", f"{options.minutes:g}"]
    command += ["--no-inductor"] if options.no_inductor else []
    return {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "command": shlex.join(command),
        "n": ROUNDS,
        "unit": "microseconds, medians of n rounds; of both where a block has the shape twice",
    }


def _in(child: Child, timeout: float, case: Case, candidate: Candidate) -> Timing:
    trusted = candidate in (LIBRARY, INDUCTOR)
    return child(case, candidate, timeout=max(timeout, TRUSTED_SECONDS) if trusted else timeout)


def _plans(architecture: Architecture, job: Job) -> Iterable[Plan]:
    return candidates(architecture, DTYPES[job.dtype], job.direction, job.shape)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    options = _options()
    try:
        architecture = _architecture()
        if options.out is None:
            conv_table.FOLDER.mkdir(exist_ok=True)
        file = Table(options.out or conv_table.path(architecture), _header(options))
    except (ValueError, OSError) as error:
        return _fail(error)
    order = jobs([n for n in NETWORKS if n.name in options.network], options.dtype)
    ended: Exception | None = None
    with Child(measure) as child, suppress(KeyboardInterrupt):
        try:
            tune(
                queue(order, file.entries),
                partial(_plans, architecture),
                partial(_in, child, options.timeout),
                file.record,
                inductor=not options.no_inductor,
                minutes=options.minutes,
            )
        except (ValueError, OSError) as error:
            ended = error
    print(", ".join(f"{name}: {value}" for name, value in file.header.items()))
    print(table(file.results, order))
    return 0 if ended is None else _fail(ended)


def _fail(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    raise SystemExit(main())
