"""The kernel benchmarks run, and refuse to time what is wrong."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from fastgan_kernels import dispatch
from fastgan_kernels.aot.shapes import NETWORKS

from benchmarks import cases, measure
from benchmarks.gpu_report.parts import OPS
from tests.processes import ROOT


@pytest.mark.parametrize("op", cases.TABLES)
def test_every_published_shape_has_a_case(op: str) -> None:
    found = cases.published(op)
    assert max(Counter(map(str, found)).values()) == 1
    assert {case.network.name for case in found} == {network.name for network in NETWORKS}
    expected = {
        "frozen_unet_block": sum(b.count for n in NETWORKS for b in n.blocks),
        "group_norm_silu": sum(sum(n.norms().values()) for n in NETWORKS),
        "frozen_conv2d": sum(sum(n.convolutions().values()) for n in NETWORKS),
    }
    assert sum(case.count for case in found) == expected.get(op, sum(c.count for c in found))
    tiny = cases.tiny(found)
    assert len(tiny) < len(found) or op == "resize_normalize"
    assert all(case.pixels <= 16 and case.batch == 1 for case in tiny)
    published, tried = (
        {(c.network.name, c.shape.embedding, c.shape.resample, c.shape.act) for c in each}
        for each in (found, tiny)
    )
    assert published == tried


def test_floors_count_what_the_ops_must_move_and_compute() -> None:
    """Without a GPU tensors are float32: 4 bytes where the documents say 2."""
    assert {op.name for op in OPS.values()} == cases.TABLES.keys()
    size = 4 if measure.DEVICE == "cpu" else 2

    def floor(op: str, name: str, direction: str) -> tuple[float, float]:
        (case,) = [each for each in cases.published(OPS[op].name) if str(each) == name]
        moved, flop = OPS[op].floor(case, direction)
        return moved / size, flop

    elements, pixels = 64 * 256 * 1024, 64 * 1024
    norm = ("norm_silu", "CIFAR-10-C256-32px-pre_shift")
    assert floor(*norm, "forward") == (2 * elements, 0)
    assert floor(*norm, "backward") == (3 * elements, 0)
    taps = 128 * 256 * 9
    conv = floor("frozen_conv", "CIFAR-10-128to256-32px", "backward")
    assert conv == (pixels * (128 + 256) + taps, 2 * pixels * taps)
    assert floor("resample", "FFHQ-64-C256-32px-up", "forward")[0] == 32 * 256 * 1024 * 5
    wider = ("frozen_block", "CIFAR-10-128to256-32px")
    assert floor(*wider, "forward") == (1.5 * elements, 18 * pixels * (128 + 256) * 256)
    assert floor(*wider, "backward") == (2 * elements, 18 * pixels * (128 + 256) * 256)


def test_inputs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    if measure.ON_GPU:
        pytest.skip("a graph replays no Python")
    monkeypatch.setattr(measure, "ROUNDS", 2)
    seen: list[int] = []
    found = measure.per_call([partial(seen.append, i) for i in range(3)])
    assert seen == [0, 1, 2] * 3 and len(found) == 2, "a warm-up and two rounds"


def test_what_is_wrong_has_no_time() -> None:
    """Ours of resample2x is 2% off where our kernels run; everything else is right."""
    op = OPS["resample"]

    def ours(*words: Any, **named: Any) -> Any:
        return (1.02 if dispatch._configured == "triton" else 1) * right(*words, **named)

    right = op.ours
    object.__setattr__(op, "ours", ours)
    before = dispatch._configured
    try:
        rows = list(cases.rows(op, ["ImageNet", "-up-"]))
    finally:
        object.__setattr__(op, "ours", right)
        dispatch.use(before)
    assert [row["candidate"] for row in rows] == ["library"] * 2 + ["compile"] * 2 + ["ours"]
    assert "seconds" not in rows[-1] and rows[-1]["failed"].startswith("AssertionError")
    for row in rows[:-1]:
        assert math.isfinite(row["seconds"]["median"]) and row["floor_seconds"] > 0
        assert row["direction"] in cases.DIRECTIONS and row["network"] == "ImageNet-64"


WRONG = """
from benchmarks import test_resample
from fastgan_kernels import dispatch
right = test_resample.OP.ours
def ours(*words, **named):
    return (1.02 if dispatch._configured == "triton" else 1) * right(*words, **named)
object.__setattr__(test_resample.OP, "ours", ours)
"""


@pytest.mark.slow
def test_pytest_benchmark_times_what_is_right_only(tmp_path: Path) -> None:
    """Once as it is, once with ours 2% off, in processes of their own."""
    (tmp_path / "spoil.py").write_text(WRONG)
    found = {}
    for spoilt in (False, True):
        file = tmp_path / f"{spoilt}.json"
        command = [sys.executable, "-m", "pytest", "benchmarks/test_resample.py", "-q", "-k"]
        command += ["ImageNet and up and ours", f"--benchmark-json={file}"]
        command += [f"-pno:{plugin}" for plugin in ("xdist", "cacheprovider")]
        command += ["-pspoil"] * spoilt
        path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", tmp_path)))
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        done = subprocess.run(
            command, cwd=ROOT, env={**environment, "PYTHONPATH": path}, capture_output=True
        )
        timed = json.loads(file.read_text())["benchmarks"] if file.is_file() else []
        found[spoilt] = done.returncode, len(timed)
    assert found == {False: (0, 2), True: (1, 0)}
