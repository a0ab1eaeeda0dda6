"""The plan, in the order in which a machine's time is best spent, and its shorter cases:
environment, rates, parity, kernels."""

import subprocess
from collections import Counter
from collections.abc import Iterable
from functools import partial
from importlib.util import find_spec
from statistics import median

import pytest
import torch
from fastgan_kernels.aot.shapes import NETWORKS
from torch.nn import functional as F

from benchmarks import (
    test_frozen_block,
    test_frozen_conv,
    test_norm_silu,
    test_norm_silu_conv,
    test_resample,
    test_resize_normalize,
)
from benchmarks.cases import rows
from benchmarks.gpu_report.cifar10 import STAGES, cifar10
from benchmarks.gpu_report.run import ROOT, Case, Place
from benchmarks.gpu_report.steps import ablation, steps
from benchmarks.gpu_report.table import kernel_table
from benchmarks.measure import (
    DEVICE,
    DTYPE,
    ON_GPU,
    Call,
    Content,
    copies,
    copy_bandwidth,
    per_call,
    product_rate,
)
from fastgan.common.errors import UserError

# By the names of their files, here and in tests/kernels.
OPS = {
    "norm_silu": test_norm_silu.OP,
    "frozen_block": test_frozen_block.OP,
    "norm_silu_conv": test_norm_silu_conv.OP,
    "frozen_conv": test_frozen_conv.OP,
    "resample": test_resample.OP,
    "resize_normalize": test_resize_normalize.OP,
}
# Of a GPU machine in all; the plan's first cases fit, the others want another one.
LOAN_SECONDS = 15 * 60
# Expected of a network's benchmark.
SECONDS = {
    "norm_silu": 110,
    "frozen_block": 140,
    "norm_silu_conv": 150,
    "frozen_conv": 80,
    "resample": 30,
    "resize_normalize": 20,
}
# Of `nvidia-smi --query-gpu`.
QUERY = ("driver_version", "clocks.sm", "clocks.mem", "power.limit", "temperature.gpu")


def plan() -> list[Case]:
    """Every case with the seconds that it should take on an H200: expectations, no measurements."""
    names = [network.name.partition("-")[0] for network in reversed(NETWORKS)]
    kernels = [
        Case(f"kernels/{op}-{network}", SECONDS[op], benchmark) for op in OPS for network in names
    ]
    first = ("kernels/norm_silu-ImageNet", "kernels/frozen_block-ImageNet")
    return [
        Case("environment/machine", 5, environment),
        Case("parity/kernels", 90, parity),
        Case("rates/chip", 55, rates),
        Case("steps/cifar10_uncond_d2o_f", 140, steps),
        *(case for case in kernels if case.name in first),
        Case("steps/imagenet64_d2o_f", 130, steps),
        Case("steps/ffhq64_d2o_f", 90, steps),
        Case("ablation/cifar10_uncond_d2o_f", 110, ablation),
        *(Case(f"cifar10/{name}", expected, cifar10) for name, expected in STAGES.items()),
        *(case for case in kernels if case.name not in first),
        Case("ablation/imagenet64_d2o_f", 400, ablation),
    ]


def select(cases: list[Case], wanted: Iterable[str]) -> list[Case]:
    """The cases whose names begin with one of PART, PART/CASE, all if there are none. UserError: a
    name that fits nothing."""
    found: list[Case] = []
    for name in wanted:
        mine = [c for c in cases if c.name == name or c.name.startswith((f"{name}/", f"{name}-"))]
        if not mine:
            parts = ", ".join(dict.fromkeys(case.part for case in cases))
            raise UserError(f"no part {name}, --part, one of {parts} or a case of --plan would do")
        found += mine
    return [case for case in cases if case in found or not found]


def printed(cases: Iterable[Case]) -> str:
    """What runs in which order, with its seconds and those of all until then."""
    lines, total = ["case, seconds expected on an H200, in all"], 0.0
    for case in cases:
        if total <= LOAN_SECONDS < total + case.seconds:
            lines.append(f"-- {LOAN_SECONDS // 60} minutes of a GPU end here --")
        total += case.seconds
        lines.append(f"{case.name:40} {case.seconds:5.0f} {total:6.0f}")
    return "\n".join(lines)


def environment(place: Place) -> Content:
    """Driver, clocks (read, never set) and commit, which a number's reader may ask about; device
    and versions are in every result."""
    facts = {"commit": _output("git", "rev-parse", "HEAD")}
    if ON_GPU:
        text = _output("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader")
        facts |= dict(zip(QUERY, text.split(", "), strict=False))
    return {"table": {what: {"value": value or None} for what, value in facts.items()}}


def _output(*command: str) -> str:
    """What a command prints; nothing where it does not exist or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


class Outcomes:
    """A plugin of pytest: how many tests passed, failed and were skipped, and why each failure."""

    def __init__(self) -> None:
        self.counts, self.failed = Counter(passed=0, failed=0, skipped=0), list[str]()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(crash.message if crash else report.longrepr).partition("\n")[0]
            self.failed.append(f"{report.nodeid}: {why}")
        if report.when == "call" or not report.passed:
            self.counts[report.outcome] += 1


def parity(place: Place) -> Content:
    """tests/kernels on this device, in eight processes if pytest-xdist is there (tiny: some of
    one file). UserError: nothing was run."""
    found, names = Outcomes(), ["every_op", *([] if place.tiny else OPS)]
    words = [str(ROOT / f"tests/kernels/test_{name}.py") for name in names]
    words += ["-k", "opcheck and resize"] if place.tiny else []
    words += ["-n", "8"] if find_spec("xdist") and not place.tiny else []
    status = pytest.main([*words, "-v", "-p", "no:cacheprovider"], plugins=[found])
    if status not in (0, 1):
        raise UserError(f"pytest ended with {status}, {place.name}, 0 or 1 was expected")
    return {"table": {"tests": dict(found.counts)}, "failed": found.failed}


def benchmark(place: Place) -> Content:
    """An op for one network: a row per candidate, shape and direction."""
    op, _, network = place.result.stem.rpartition("-")
    content: Content = {"rows": [], "failed": [], "table": {}}
    for row in rows(OPS[op], [f"-{network}-"]):
        if "failed" in row:
            content["failed"].append(" ".join(map(str, row.values())))
        else:
            content["rows"].append(row)
        content["table"] = kernel_table(content["rows"])
        place.note(content)
    return content


def rates(place: Place) -> Content:
    """What the chip copies (bytes read plus written per second) and multiplies (FLOP per second),
    and what share of the latter the 3x3 convolutions of all networks' passes reach in bf16, each as
    often as a pass has it; dgrad also as a forward convolution with the flipped weight."""
    torch.backends.cudnn.benchmark = True
    found = {"copy_bandwidth": copy_bandwidth(), "matmul_rate": product_rate()}
    found["float32_rate"] = product_rate(torch.float32)
    content: Content = {name: each["median"] for name, each in found.items()}
    content["samples"], content["table"] = found, {name: {"rate": content[name]} for name in found}
    place.note(content)
    flop, spent = 0, Counter[str]()
    for network in NETWORKS:
        shapes = {s: n for s, n in network.convolutions().items() if s[3] == 3}
        for (cin, cout, size, _), count in list(shapes.items())[: 1 if place.tiny else None]:
            images, cin, cout = (1, 8, 8) if place.tiny else (network.batch, cin, cout)
            flop += count * 18 * cin * cout * images * size**2
            for direction, calls in _convolution(images, cin, cout, size).items():
                spent[direction] += count * median(per_call(calls))  # type: ignore[assignment]
    shares = {f"conv_{k}_efficiency": flop / t / content["matmul_rate"] for k, t in spent.items()}
    content["table"] |= {name: {"share": share} for name, share in shares.items()}
    return content | shares


def _convolution(images: int, cin: int, cout: int, size: int) -> dict[str, list[Call]]:
    """Calls on inputs that take turns; the weight is shared, as in training."""

    def normal(*shape: int) -> torch.Tensor:
        value = torch.randn(shape, device=DEVICE).to(DTYPE)
        return value.to(memory_format=torch.channels_last)

    weight = normal(cout, cin, 3, 3)
    flipped = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
    count = copies(images * size**2 * (cin + cout) * DTYPE.itemsize)
    xs, dys = [[normal(images, c, size, size) for _ in range(count)] for c in (cin, cout)]
    return {
        "forward": [partial(F.conv2d, x, weight, padding=1) for x in xs],
        "dgrad": [partial(F.conv_transpose2d, dy, weight, padding=1) for dy in dys],
        "dgrad_flipped": [partial(F.conv2d, dy, flipped, padding=1) for dy in dys],
    }
