"""The kernel benchmarks run, and refuse to time what is wrong."""

import json
import math
import os
import subprocess
import sys
from collections import Counter
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from fastgan_kernels.aot.shapes import NETWORKS

from benchmarks import cases, measure

ROOT = Path(__file__).resolve().parents[2]
OPS = tuple(cases.TABLES)


@pytest.mark.parametrize("op", OPS)
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
    kinds = {(c.network.name, c.shape.embedding, c.shape.resample, c.shape.act) for c in found}
    assert {
        (c.network.name, c.shape.embedding, c.shape.resample, c.shape.act) for c in tiny
    } == kinds


@pytest.fixture
def ops() -> dict[str, Any]:
    """The Op of every benchmark file by its name."""
    files = (ROOT / "benchmarks").glob("test_*.py")
    return {op.name: op for op in (import_module(f"benchmarks.{f.stem}").OP for f in files)}


def test_floors_count_what_the_ops_must_move_and_compute(ops: dict[str, Any]) -> None:
    """Without a GPU tensors are float32: 4 bytes where the documents say 2."""
    assert ops.keys() == set(OPS)
    size = 4 if measure.DEVICE == "cpu" else 2

    def total(op: str, name: str, direction: str) -> tuple[float, float]:
        (case,) = [each for each in cases.published(op) if str(each) == name]
        parts = ops[op].parts(case, direction)
        return sum(b for b, _ in parts) / size, sum(f for _, f in parts)

    elements, pixels = 64 * 256 * 1024, 64 * 1024
    norm = ("group_norm_silu", "CIFAR-10-C256-32px-pre_shift")
    assert total(*norm, "forward") == (2 * elements, 0)
    assert total(*norm, "backward") == (3 * elements, 0)
    taps = 128 * 256 * 9
    conv = total("frozen_conv2d", "CIFAR-10-128to256-32px", "backward")
    assert conv == (pixels * (128 + 256) + taps, 2 * pixels * taps)
    assert total("resample2x", "FFHQ-64-C256-32px-up", "forward")[0] == 32 * 256 * 1024 * 5
    wider = ("frozen_unet_block", "CIFAR-10-128to256-32px")
    assert total(*wider, "forward") == (1.5 * elements, 18 * pixels * (128 + 256) * 256)
    assert total(*wider, "backward") == (2 * elements, 18 * pixels * (128 + 256) * 256)
    chip = measure.Chip(copy_bandwidth=100, matmul_rate=1000)
    assert chip.floor([(100, 10), (1, 3000), (50, 0)]) == pytest.approx(1 + 3 + 0.5)


def test_inputs_take_turns() -> None:
    seen: list[int] = []
    rotation = measure.Rotation([partial(seen.append, i) for i in range(3)])
    if measure.ON_GPU:
        pytest.skip("a graph replays no Python")
    seen.clear()
    rotation.run(5)
    assert seen == [0, 1, 2, 0, 1] and rotation.iterations() == 3


RUN = """
import sys
import pytest


class Wrong:
    def pytest_collection_finish(self, session):
        from fastgan_kernels import dispatch

        op = sys.modules["benchmarks.test_resample"].OP
        right, wrong = op.ours, {"triton": 1.02}
        ours = lambda *a, **k: wrong.get(dispatch._configured, 1) * right(*a, **k)
        object.__setattr__(op, "ours", ours)


sys.exit(pytest.main(sys.argv[1:], plugins=[Wrong()]))
"""


def test_a_tiny_run_on_the_cpu(tmp_path: Path) -> None:
    """Ours of resample2x is made wrong, so that it must fail and have no time."""
    file = tmp_path / "run.json"
    wanted = "ImageNet and backward"
    files = ["benchmarks/test_resample.py", "benchmarks/test_frozen_conv.py"]
    command = [sys.executable, "-c", RUN, *files, "-k", wanted, f"--benchmark-json={file}"]
    # Inside a worker of pytest-xdist, pytest-benchmark measures nothing.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    content = json.loads(file.read_text())
    if content["dry_run"]:
        assert "CPU: these are no speeds" in done.stdout and "Median" not in done.stdout
    infos = [each["extra_info"] for each in content["benchmarks"]]
    timed = {(row["op"], row["candidate"]) for row in infos}
    failed = {(case["op"], case["candidate"]) for case in content["failed"]}
    assert ("resample2x", "ours") in failed - timed
    assert {("frozen_conv2d", name) for name in cases.REQUIRED} <= timed - failed
    assert all(math.isfinite(each["stats"]["median"]) for each in content["benchmarks"])
    assert all(row["floor_seconds"] > 0 for row in infos) and content["rates"]["matmul_rate"] > 0
