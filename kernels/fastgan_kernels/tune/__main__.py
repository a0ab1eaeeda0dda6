"""Measures the plans of norm_silu_conv on this GPU: python -m fastgan_kernels.tune

At every 3 x 3 convolution of the published networks that stands behind a norm with SiLU, forward
and backward: all plans that may run here, each beside the library's (cuDNN behind group_norm_silu).
The fastest go to the table that dispatch reads, with what the library took (also where it is
faster). The file is written after every shape, the largest shares of the networks' arithmetic
first, and what it holds is not measured again: the same command goes on.
"""

import json
import sys
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from math import inf
from typing import Any

import torch

from fastgan_kernels import dispatch, runtime
from fastgan_kernels.aot.__main__ import Parser
from fastgan_kernels.aot.shapes import NETWORKS, Network
from fastgan_kernels.norm_silu_conv import plans as table
from fastgan_kernels.norm_silu_conv.plans import (
    DIRECTIONS,
    Architecture,
    Direction,
    Entry,
    Plan,
    Shape,
    candidates,
)
from fastgan_kernels.tune import DTYPES, Case, Child, Failed, Hung, Timing, trial

# With the process's start, a plan's compilation and the library's first call, which loads cuDNN.
TRIAL_SECONDS = 180.0


def cases(networks: Iterable[Network], dtypes: Iterable[str]) -> list[Case]:
    """The largest share of a network's multiplications first; a shape that several have once.

    A block's first convolution is not behind its norm where it resamples in between. What is both
    a first and a second one is measured as a second one.
    """
    share: Counter[Shape] = Counter()
    how: dict[Shape, tuple[int, str]] = {}
    for network in networks:
        total = sum(i * o * s**2 * k**2 * n for (i, o, s, k), n in network.convolutions().items())
        for block in network.blocks:
            first = Shape(block.cin, block.cout, block.out_size, block.out_size, 3)
            second = replace(first, cin=block.cout)
            for shape, embedding in [(second, network.embedding), (first, "")]:
                if embedding or not block.resample:
                    work = 9 * shape.cin * shape.cout * shape.pixels * block.count
                    share[shape] += work / total  # type: ignore[assignment]
                    batch, known = how.get(shape, (0, ""))
                    how[shape] = max(batch, network.batch), known or embedding
    return [
        Case(shape, dtype, direction, *how[shape])
        for dtype in dtypes
        for shape, _ in share.most_common()
        for direction in DIRECTIONS
    ]


def fastest(case: Case, plans: Iterable[Plan], measure: Callable[[Case, Plan], Timing]) -> Entry:
    """The fastest plan. Failed where none runs; a line for each that does not."""
    found: dict[Plan, float] = {}
    for plan in plans:
        try:
            found[plan] = measure(case, plan).us
        except Failed as why:
            say(f"left out: {plan}, {case}, {why}")
    if not found:
        raise Failed("no plan ran")
    plan = min(found, key=found.__getitem__)
    # Once more, as the smallest of several medians is too small.
    us, library_us = (round(value, 2) for value in measure(case, plan))
    return Entry(*case.key, case.batch, plan, us, library_us)


def tune(
    todo: Sequence[Case],
    plans: Callable[[Case], Iterable[Plan]],
    child: Callable[..., Timing],
    record: Callable[[Entry], None],
    minutes: float = inf,
) -> None:
    """Hands the entry of case after case to `record`, until `minutes` have passed, also in the
    middle of a case; what hung once is not waited for at another shape."""
    end = time.monotonic() + 60 * minutes
    hung: set[tuple[Plan, Direction]] = set()

    def measure(case: Case, plan: Plan) -> Timing:
        if time.monotonic() >= end:
            raise TimeoutError
        if (plan, case.direction) in hung:
            raise Failed("hung before, at another shape")
        try:
            return child(case, plan, timeout=TRIAL_SECONDS)
        except Hung:
            hung.add((plan, case.direction))
            raise

    for done, case in enumerate(todo):
        try:
            entry = fastest(case, plans(case), measure)
        except Failed as why:
            say(f"left out: {case}, {why}")
        except TimeoutError:
            say(f"{len(todo) - done} of {len(todo)} not ended: {minutes:g} minutes have passed")
            return
        else:
            record(entry)
            won = "wins" if entry.wins else "loses"
            say(f"{case}: {entry.plan} {won}, {entry.us:.1f} us against {entry.library_us:.1f}")


def measured(options: Namespace, architecture: Architecture) -> None:
    """Adds to the table of this GPU. ValueError where it is of another machine or no table."""
    file, header = table.path(architecture), _header()
    entries = table.read(file)
    machine = json.loads(file.read_text()).get("machine") if entries else header["machine"]
    if machine != header["machine"]:
        raise ValueError(f"measured on {machine}, {file}, none or one of this machine would do")
    file.parent.mkdir(parents=True, exist_ok=True)

    def plans(case: Case) -> Iterable[Plan]:
        return candidates(architecture, DTYPES[case.dtype], case.direction, case.shape)

    def record(entry: Entry) -> None:
        entries[entry.key] = entry
        table.write(file, header, entries.values())

    todo = [case for case in cases(NETWORKS, options.dtype) if case.key not in entries]
    child = Child(trial)
    try:
        tune(todo, plans, child, record, options.minutes)
    finally:
        child.close()


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


def _header() -> dict[str, Any]:
    """Of what machine the table is and how it was made."""
    import triton

    return {
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "unit": "microseconds a call, medians of rounds in turn with the library",
    }


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = Parser(prog="python -m fastgan_kernels.tune", description=__doc__)
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "fp16"), default=["bf16"])
    parser.add_argument("--minutes", type=float, default=inf, help="begin nothing after these")
    options = parser.parse_args()
    if not options.minutes > 0:
        parser.error(f"--minutes is {options.minutes}, more than 0 would do")
    try:
        measured(options, _architecture())
    except (ValueError, OSError) as error:
        say(f"error: {error}")
        return 1
    except KeyboardInterrupt:
        say("stopped: the same command goes on")
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
