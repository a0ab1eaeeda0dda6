"""The plan, in the order in which a machine's time is best spent, and its shorter cases:
environment, rates, parity, kernels."""

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from xml.etree import ElementTree

import torch
from fastgan_kernels.aot.shapes import NETWORKS
from torch.nn import functional as F

from benchmarks.cases import DIRECTIONS
from benchmarks.gpu_report.cifar10 import STAGES, cifar10
from benchmarks.gpu_report.run import ROOT, Case, Place
from benchmarks.gpu_report.steps import ablation, steps
from benchmarks.gpu_report.table import speeds
from benchmarks.measure import (
    DEVICE,
    DTYPE,
    ON_GPU,
    Call,
    Content,
    copies,
    copy_bandwidth,
    package_version,
    per_call,
    product_rate,
    samples,
)
from fastgan.common.errors import UserError

# Of a GPU machine in all; the plan's first cases fit, the others want another one.
LOAN_SECONDS = 15 * 60
# As in benchmarks/test_OP.py and tests/kernels/test_OP.py, with expected seconds of the benchmark
# per network.
OPS = {
    "norm_silu": 110,
    "frozen_block": 140,
    "norm_silu_conv": 150,
    "frozen_conv": 80,
    "resample": 30,
    "resize_normalize": 20,
}
SHORT_NAMES = [network.name.partition("-")[0] for network in reversed(NETWORKS)]
PACKAGES = ("numpy", "torchvision", "timm", "safetensors", "hydra-core", "omegaconf", "pytest")
# Of `nvidia-smi --query-gpu`.
QUERY = (
    *("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem"),
    *("power.limit", "temperature.gpu", "ecc.mode.current", "mig.mode.current"),
)


def plan() -> list[Case]:
    """Every case with the seconds that it should take on an H200: expectations, no measurements."""
    kernels = [
        Case(f"kernels/{op}-{network}", expected, benchmark)
        for op, expected in OPS.items()
        for network in SHORT_NAMES
    ]
    first = ("kernels/norm_silu-ImageNet", "kernels/frozen_block-ImageNet")
    return [
        Case("environment/machine", 5, environment),
        *(Case(f"parity/{file}", 70, parity, beside=True) for file in ("every_op", *OPS)),
        Case("rates/chip", 15, chip),
        Case("steps/cifar10_uncond_d2o_f", 140, steps, resumes=True),
        *(case for case in kernels if case.name in first),
        Case("steps/imagenet64_d2o_f", 130, steps, resumes=True),
        Case("steps/ffhq64_d2o_f", 90, steps, resumes=True),
        Case("ablation/cifar10_uncond_d2o_f", 110, ablation, resumes=True),
        Case("rates/convolutions", 40, convolutions),
        *(Case(f"cifar10/{name}", expected, cifar10, resumes=True) for name, expected in STAGES),
        *(case for case in kernels if case.name not in first),
        Case("ablation/imagenet64_d2o_f", 400, ablation, resumes=True),
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


def printed(cases: list[Case]) -> str:
    """What runs in which order, with its seconds and those of all until then."""
    lines, total = ["case, seconds expected on an H200, in all"], 0.0
    groups = groupby(cases, lambda case: case.part if case.beside else case.name)
    for group in (list(several) for _, several in groups):
        seconds = max(case.seconds for case in group)
        if total <= LOAN_SECONDS < total + seconds:
            lines.append(f"-- {LOAN_SECONDS // 60} minutes of a GPU end here --")
        total += seconds
        aside = " (side by side)" if len(group) > 1 else ""
        lines += [f"{case.name:40} {case.seconds:5.0f} {total:6.0f}{aside}" for case in group]
    return "\n".join(lines)


def environment(place: Place) -> Content:
    """Versions, device, memory, driver, clocks (read, never set) and commit: all that a number's
    reader may ask about the machine, without its name."""
    facts: Content = {name: package_version(name) for name in PACKAGES}
    facts["system"] = f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    facts["commit"] = _output("git", "rev-parse", "HEAD")
    facts["changed"] = bool(_output("git", "status", "--porcelain", "--untracked-files=no"))
    if ON_GPU:
        gpu = torch.cuda.get_device_properties(0)
        facts |= {"memory": gpu.total_memory, "l2": gpu.L2_cache_size}
        facts |= {"multiprocessors": gpu.multi_processor_count}
        text = _output("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader")
        facts |= dict(zip(QUERY, (text or "").split(", "), strict=False))
    return {"table": [{"what": what, "value": value} for what, value in facts.items()]}


def _output(*command: str) -> str | None:
    """What a command prints, None where it does not exist or fails."""
    if shutil.which(command[0]) is None:
        return None
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout.strip() if done.returncode == 0 else None


def parity(place: Place) -> Content:
    """A file of tests/kernels on this device (tiny: some of it): how many tests passed, failed and
    were skipped, and where and why each failure. UserError: nothing was run."""
    with tempfile.TemporaryDirectory() as folder:
        report, some = Path(folder, "junit.xml"), ("-k", "opcheck") if place.tiny else ()
        status = _pytest(
            f"tests/kernels/test_{place.result.stem}.py", f"--junitxml={report}", *some
        )
        if status not in (0, 1) or not report.is_file():
            raise UserError(f"pytest ended with {status}, {place.name}, 0 or 1 was expected")
        return read_junit(report.read_text())


def read_junit(text: str) -> Content:
    """Of the XML that pytest just wrote here."""
    counts, failures = Counter(passed=0, failed=0, skipped=0), []
    for case in ElementTree.fromstring(text).iter("testcase"):
        outcomes = {child.tag: child for child in case}
        wrong = outcomes.get("failure", outcomes.get("error"))
        if wrong is not None:
            line = (wrong.get("message") or wrong.text or "").strip().partition("\n")[0]
            failures.append(f"{case.get('name')}: {line}")
        passed = "skipped" if "skipped" in outcomes else "passed"
        counts[passed if wrong is None else "failed"] += 1
    return {"table": [dict(counts)], "failed": failures}


def _pytest(*words: str) -> int:
    command = [sys.executable, "-m", "pytest", *words, "-v", "-p", "no:cacheprovider"]
    # Where it finds xdist's variables, pytest-benchmark measures nothing.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    return subprocess.run(command, cwd=ROOT, env=alone).returncode


def benchmark(place: Place) -> Content:
    """benchmarks/test_OP.py for one network (tiny: some of it): a row per candidate, shape and
    direction. A test that fails is among `failed`, and has no time."""
    op, _, network = place.result.stem.rpartition("-")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "benchmark.json")
        words = [f"--benchmark-json={file}", "--benchmark-columns=median"]
        chosen = f"{network} and backward" if place.tiny else network
        status = _pytest(f"benchmarks/test_{op}.py", "-k", chosen, *words)
        if status not in (0, 1) or not file.is_file():
            raise UserError(f"pytest ended with {status}, {place.name}, a time was expected")
        document = json.loads(file.read_text())
    rows = [
        each["extra_info"] | {"seconds": samples(each["stats"]["data"])}
        for each in document["benchmarks"]
    ]
    failed = [" ".join(map(str, case.values())) for case in document["failed"]]
    lines = [
        {"direction": direction, "candidate": candidate, **speeds(rows, candidate, direction)}
        for direction in DIRECTIONS
        for candidate in dict.fromkeys(row["candidate"] for row in rows)
    ]
    return {"rates": document["rates"], "rows": rows, "failed": failed, "table": lines}


def chip(place: Place) -> Content:
    """What it copies (bytes read plus written per second) and multiplies (FLOP per second)."""
    found = {"copy_bandwidth": copy_bandwidth()}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        found[f"matmul_rate_{name}"] = product_rate(dtype)
    lines = [
        {"rate": name, "median": each["median"], "n": each["n"]} for name, each in found.items()
    ]
    return {"rates": found, "table": lines}


def convolutions(place: Place) -> Content:
    """What the 3x3 convolutions of a pass reach of the matrix rate measured in the same process,
    each as often as a pass has it; dgrad also as a forward convolution with the flipped weight."""
    torch.backends.cudnn.benchmark = True
    rate = product_rate()["median"]
    content: Content = {"matmul_rate": rate, "table": []}
    for network in NETWORKS:
        flop, spent = 0, dict.fromkeys(("forward", "dgrad", "dgrad_flipped"), 0.0)
        shapes = {s: n for s, n in network.convolutions().items() if s[3] == 3}
        for (cin, cout, size, _), count in list(shapes.items())[: 1 if place.tiny else None]:
            images, cin, cout = (1, 8, 8) if place.tiny else (network.batch, cin, cout)
            flop += count * 18 * cin * cout * images * size**2
            for direction, calls in _convolution(images, cin, cout, size).items():
                spent[direction] += count * median(per_call(calls))
        shares = {name: flop / seconds / rate for name, seconds in spent.items()}
        content["table"].append({"network": network.name, "flop": flop, **shares})
        place.note(content)
    return content


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
