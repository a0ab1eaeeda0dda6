"""The benchmarks run, refuse wrong results, and the record of targets says what was measured."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from fastgan_kernels.aot.shapes import NETWORKS

from benchmarks import cases, measure, summarise, targets
from benchmarks.results import Row, load, table
from fastgan.common.errors import UserError, run_command
from tests.measured_record import check_record

ROOT = Path(__file__).resolve().parent.parent
KEYS = ["id", "metric", "target", "unit", "status", "value", "machine", "command"]
KEYS += ["result_file", "date"]
OPS = tuple(cases.TABLES)
Seconds = Callable[[cases.Case, str, str], float]


def usual(case: cases.Case, candidate: str, direction: str) -> float:
    """Ours takes twice the floor (1e-6), torch.compile three, eager eight times."""
    return {"ours": 2e-6, "compile": 3e-6, "eager": 8e-6}[candidate]


def document(
    seconds: Seconds = usual, ops: tuple[str, ...] = OPS, kept: int = 30, **changes: Any
) -> dict:
    """What a complete run on an H200 would write; `kept`: bytes that ours keeps of 60."""
    benchmarks = []
    for op in ops:
        for case in cases.published(op):
            for direction in cases.DIRECTIONS:
                for candidate in cases.REQUIRED:
                    info: dict[str, Any] = {"op": op, "network": case.network.name}
                    info |= {"shape": case.label}
                    info |= {"direction": direction, "candidate": candidate, "count": case.count}
                    info |= {"channels": case.channels, "pixels": case.pixels}
                    info |= {"kept_bytes": kept if candidate == "ours" else 60}
                    info |= {"floor_seconds": 1e-6}
                    stats: dict[str, Any] = {
                        "median": seconds(case, candidate, direction),
                        "rounds": 20,
                    }
                    benchmarks.append({"extra_info": info, "stats": stats})
    return {
        "benchmarks": benchmarks,
        "chip": {"name": "NVIDIA H200"},
        "commit_info": {},
        "datetime": "2030-01-02T03:04:05+00:00",
        "device": "cuda",
        "failed": [],
        "launch": "graph",
        "software": {"torch": "2.11"},
        "machine_info": {"node": "somebody's"},
    } | changes


def saved(path: Path, content: dict | list) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.fixture
def record(tmp_path: Path) -> Path:
    """A root whose record a test may change; every row open."""
    (tmp_path / "benchmarks").mkdir()
    blank = dict.fromkeys(("value", "machine", "result_file", "date"))
    rows = [row | blank | {"status": "open"} for row in summarise.read_targets(ROOT)]
    saved(tmp_path / "benchmarks/targets.json", rows)
    shutil.copy(ROOT / "benchmarks/README.md", tmp_path / "benchmarks/README.md")
    return tmp_path


def test_every_target_is_a_row() -> None:
    rows = summarise.read_targets(ROOT)
    assert all(list(row) == KEYS for row in rows)
    assert len({row["id"] for row in rows}) == len(rows)
    assert {row["id"] for row in rows} >= targets.METRICS.keys()
    for row in rows:
        assert re.search(r", at (least|most)$", row["metric"]) and row["unit"]
        assert type(row["target"]) in (int, float) and row["target"] > 0
    check_record(ROOT)
    wanted = {row["id"]: row["target"] for row in rows}
    assert wanted["group_norm_silu_forward_bandwidth"] == 0.8
    assert wanted["group_norm_silu_one_pass_vs_eager"] == 3
    assert wanted["frozen_unet_block_kept_memory"] == 0.6


def test_commands_name_what_exists() -> None:
    for row in summarise.read_targets(ROOT):
        for command in row["command"].split(" && "):
            words = command.split()
            assert words[0] == "python"
            if "-m" in words:
                assert find_spec(words[words.index("-m") + 1])
            assert all((ROOT / word).is_file() for word in words if word.endswith(".py"))


def test_the_readme_shows_the_record() -> None:
    text = (ROOT / "benchmarks/README.md").read_text()
    assert summarise.target_table(summarise.read_targets(ROOT)) in text


@pytest.mark.parametrize("op", OPS)
def test_every_published_shape_has_a_case(op: str) -> None:
    found = cases.published(op)
    names = Counter((case.network.name, case.label) for case in found)
    assert max(names.values()) == 1
    assert {name for name, _ in names} == {network.name for network in NETWORKS}
    if op == "frozen_unet_block":
        blocks = sum(b.count for network in NETWORKS for b in network.blocks)
        assert sum(case.count for case in found) == blocks
    if op == "group_norm_silu":
        norms = sum(sum(network.norms().values()) for network in NETWORKS)
        assert sum(case.count for case in found) == norms
    kinds = [(case.network.name, cases._kind(case)) for case in found]
    tiny = cases.tiny(found)
    assert len(tiny) == len(set(kinds)) and all(c.pixels <= 16 and c.batch == 1 for c in tiny)


def test_a_floor_adds_up_the_slower_of_bytes_and_arithmetic() -> None:
    chip = measure.Chip("", copy_bandwidth=100, matmul_rate=1000, l2_bytes=0)
    assert chip.floor([(100, 10), (1, 3000), (50, 0)]) == pytest.approx(1 + 3 + 0.5)


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The Op of every benchmark file by its name."""
    monkeypatch.syspath_prepend(ROOT / "tests/kernels")
    files = (ROOT / "benchmarks").glob("test_*.py")
    found = [import_module(f"benchmarks.{path.stem}").OP for path in files]
    return {op.name: op for op in found}


def case(op: str, name: str) -> cases.Case:
    (found,) = [each for each in cases.published(op) if str(each) == name]
    return found


def test_floors_count_what_the_ops_must_move_and_compute(ops: dict[str, Any]) -> None:
    """Without a GPU tensors are float32: 4 bytes where the documents say 2."""
    assert ops.keys() == set(OPS)
    size = 4 if measure.DEVICE == "cpu" else 2

    def total(op: str, name: str, direction: str) -> tuple[float, float]:
        parts = ops[op].parts(case(op, name), direction)
        return sum(b for b, _ in parts) / size, sum(f for _, f in parts)

    norm = ("group_norm_silu", "CIFAR-10-C256-32px-pre_shift")
    elements = 64 * 256 * 1024
    assert total(*norm, "forward") == (2 * elements, 0)
    assert total(*norm, "backward") == (3 * elements, 0)
    conv = total("frozen_conv2d", "CIFAR-10-128to256-32px-3x3", "backward")
    pixels, taps = 64 * 1024, 128 * 256 * 9
    assert conv == (pixels * (128 + 256) + taps, 2 * pixels * taps)
    assert total("resample2x", "FFHQ-64-C256-32px-up", "forward")[0] == 32 * 256 * 1024 * 5
    # Two norms (read, write), the sum (two read, one written).
    plain = ("frozen_unet_block", "CIFAR-10-256to256-32px")
    assert total(*plain, "forward") == (7 * elements, 2 * 18 * pixels * 256**2)
    assert total(*plain, "backward") == (7 * elements, 2 * 18 * pixels * 256**2)
    # 128 -> 256 channels: half the elements in front, a 1 x 1 convolution (twice backward).
    wider = ("frozen_unet_block", "CIFAR-10-128to256-32px")
    projected = 2 * pixels * 128 * 256
    assert total(*wider, "forward") == ((1 + 5 + 1.5) * elements, 27 * projected + projected)
    assert total(*wider, "backward") == ((2 + 3 + 3 + 1) * elements, 27 * projected + 2 * projected)


def test_inputs_take_turns() -> None:
    seen: list[int] = []
    rotation = measure.Rotation([partial(seen.append, i) for i in range(3)], "stream")
    seen.clear()
    for _ in range(5):
        rotation()
    assert seen == [0, 1, 2, 0, 1]


def row(seconds: float, **changes: Any) -> Row:
    values: dict[str, Any] = {"op": "x", "network": "A", "shape": "s", "direction": "forward"}
    values |= {"candidate": "ours", "floor": 1.0, "rounds": 20, "count": 1, "channels": 64}
    return Row(**values | {"pixels": 64, "kept_bytes": None, "seconds": seconds} | changes)


def test_shares_are_weighted_and_the_lowest_network_counts() -> None:
    rows = [
        row(2.0, shape="often", count=3),
        row(10.0, shape="rare", floor=4.0),
        row(1.25, network="B"),
        row(9.0, candidate="compile"),
        row(9.0, direction="backward"),
    ]
    assert targets.network_share(rows, "forward") == pytest.approx((3 * 1 + 4) / (3 * 2 + 10))


def test_candidates_are_compared_at_the_same_shape_and_direction() -> None:
    rows = [row(2.0), row(3.0, candidate="compile"), row(8.0, direction="backward")]
    rows += [row(4.0, direction="backward", candidate="compile")]
    assert targets.ratios(rows, "compile") == [1.5, 0.5]
    assert targets.ratios(targets.both_ways(rows), "compile") == [0.7]
    sizes = [("s", "ours", 30), ("s", "compile", 60), ("t", "ours", 40), ("t", "compile", 50)]
    blocks = [row(1.0, shape=s, candidate=name, kept_bytes=size) for s, name, size in sizes]
    assert targets.kept(blocks) == 0.8
    assert targets.geometric_mean([2.0, 8.0]) == pytest.approx(4)
    lines = table(rows).splitlines()
    assert "| x | A s | forward | ours | 2000000.0 | 50% | 1.50 | - | 20 |" in lines


def slower_where_it_counts(case: cases.Case, candidate: str, direction: str) -> float:
    factor = 1.0
    if candidate == "ours":
        if case.op == "group_norm_silu" and str(case) == "FFHQ-64-C384-64px":
            factor = 2.0
        if case.op == "frozen_unet_block" and case.channels > 256:
            factor = 0.5
    return factor * usual(case, candidate, direction)


def test_targets_are_computed_recorded_and_shown(record: Path, tmp_path: Path) -> None:
    file = saved(tmp_path / "run.json", document(slower_where_it_counts, kept=45))
    summarise.update(load([file]), record)
    rows = {row["id"]: row for row in summarise.read_targets(record)}
    norms = {str(c): c.count for c in cases.published("group_norm_silu") if "FFHQ" in str(c)}
    forward = sum(norms.values()) / (2 * (sum(norms.values()) + norms["FFHQ-64-C384-64px"]))
    expected = {
        "group_norm_silu_forward_bandwidth": (forward, "missed"),
        "group_norm_silu_backward_bandwidth": (forward, "missed"),
        "group_norm_silu_one_pass_vs_compile": (1.5, "measured"),
        "group_norm_silu_one_pass_vs_eager": (4, "measured"),
        "group_norm_silu_elsewhere_vs_compile": (0.75, "missed"),
        "group_norm_silu_apexless_channels": (1, "measured"),
        "frozen_unet_block_narrow_vs_compile": (1.5, "measured"),
        "frozen_unet_block_vs_compile": (1.5, "measured"),
        "frozen_unet_block_kept_memory": (0.75, "missed"),
    }
    found = {name: (rows[name]["value"], rows[name]["status"]) for name in expected}
    for name, (value, status) in expected.items():
        assert found[name] == (pytest.approx(value), status), name
    check_record(record)
    folder = record / "benchmarks/results/h200-2030-01-02"
    assert {path.stem for path in folder.glob("*.json")} == set(OPS)
    assert "somebody" not in "".join(path.read_text() for path in folder.iterdir())
    readme = (record / "benchmarks/README.md").read_text()
    assert "| 0.75 | missed | NVIDIA H200, 2030-01-02 |" in readme
    assert summarise.NOTHING_YET not in readme and "## Running them" in readme


def test_apexless_channels_are_compared_with_adms_others(tmp_path: Path) -> None:
    def seconds(case: cases.Case, candidate: str, direction: str) -> float:
        slow = "ImageNet" in str(case) and case.channels in (192, 576, 1152)
        return (2 if slow else 1) * usual(case, candidate, direction)

    results = load([saved(tmp_path / "run.json", document(seconds, ("group_norm_silu",)))])
    assert summarise.values(results)["group_norm_silu_apexless_channels"] == pytest.approx(0.5)


def test_several_files_are_one_run_and_only_their_op_is_recorded(
    record: Path, tmp_path: Path
) -> None:
    whole = document(ops=("group_norm_silu",))
    files = []
    for network in NETWORKS:
        part = [b for b in whole["benchmarks"] if b["extra_info"]["network"] == network.name]
        files.append(saved(tmp_path / f"{network.name}.json", whole | {"benchmarks": part}))
    rows = summarise.update(load(files), record)
    assert {row["status"] for row in rows if "block" in row["id"]} == {"open"}
    assert all(row["value"] for row in rows if "norm" in row["id"])
    check_record(record)
    with pytest.raises(UserError, match="are absent"):
        summarise.update(load(files[:2]), record)
    with pytest.raises(UserError, match="measured twice"):
        load([files[0], files[0]])


FAILURE = dict(op="group_norm_silu", network="CIFAR-10", shape="C256-8px", direction="forward")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"device": "cpu"}, "measured on a CPU"),
        ({"chip": {"name": "NVIDIA A100-SXM4-80GB"}}, "measured on NVIDIA A100"),
        ({"launch": "stream"}, "Python's launches"),
        ({"failed": [FAILURE | {"candidate": "ours"}]}, "1 cases of group_norm_silu failed"),
        ({"benchmarks": document()["benchmarks"][1:]}, "1 of 372 cases of group_norm_silu"),
    ],
)
def test_what_is_no_measurement_is_refused(
    record: Path, tmp_path: Path, changes: dict, said: str
) -> None:
    before = {path: path.read_bytes() for path in (record / "benchmarks").rglob("*.*")}
    results = load([saved(tmp_path / "run.json", document(**changes))])
    with pytest.raises(UserError, match=re.escape(said)):
        summarise.update(results, record)
    after = {path: path.read_bytes() for path in (record / "benchmarks").rglob("*.*")}
    assert after == before


def test_a_failed_alternative_does_not_matter(record: Path, tmp_path: Path) -> None:
    content = document(failed=[FAILURE | {"candidate": "apex"}])
    assert summarise.update(load([saved(tmp_path / "run.json", content)]), record)


@pytest.mark.parametrize("content", ["", "{}", "[1]"])
def test_what_is_no_result_is_refused_in_one_line(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "run.json"
    file.write_text(content)
    monkeypatch.setattr("sys.argv", ["summarise", str(file), "--update"])
    with pytest.raises(SystemExit) as end:
        run_command(summarise.main)
    error = capsys.readouterr().err
    assert end.value.code == 1 and error.startswith("error: ") and len(error.splitlines()) == 1


RUN = """
import sys
import pytest


class Wrong:
    def pytest_collection_finish(self, session):
        op = sys.modules["benchmarks.test_resample"].OP
        right = op.candidates["ours"]
        op.candidates["ours"] = lambda case, t: 1.02 * right(case, t)


sys.exit(pytest.main(sys.argv[1:], plugins=[Wrong()]))
"""


def test_a_tiny_run_on_the_cpu(tmp_path: Path) -> None:
    """A network's ops; ours of resample2x is made wrong, so that it must fail and have no time."""
    file = tmp_path / "run.json"
    wanted = "ImageNet and backward and (ours or compile)"
    command = [sys.executable, "-c", RUN, "benchmarks", "-k", wanted, f"--benchmark-json={file}"]
    # Inside a worker of pytest-xdist, pytest-benchmark measures nothing.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=alone, capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "CPU: these are no speeds" in done.stdout and "Median" not in done.stdout
    content = json.loads(file.read_text())
    failed = {(case["op"], case["candidate"]) for case in content["failed"]}
    assert failed == {("resample2x", "ours")}
    results = load([file])
    timed = {(row.op, row.candidate) for row in results.rows}
    assert timed == {(op, name) for op in OPS for name in ("compile", "ours")} - failed
    assert not results.on_gpu
    assert all(math.isfinite(row.seconds) and row.floor > 0 for row in results.rows)
