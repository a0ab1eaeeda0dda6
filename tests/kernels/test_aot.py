"""Compiling ahead of time: what the compiler made of kernels, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from fastgan_kernels.aot import builds as aot_builds
from fastgan_kernels.aot.__main__ import Row, problems
from fastgan_kernels.aot.builds import builds
from fastgan_kernels.aot.shapes import NETWORKS, Norm

ROOT = Path(__file__).resolve().parents[2]
GOOD = Row(
    kernel="norm_silu.forward",
    arch="sm_80",
    shape=[64, 256, 32, 32],
    dtype="bf16",
    registers=64,
    spill_bytes=0,
    shared_bytes=2048,
    tensor_core=None,
    seconds=0.3,
    wide_loads=True,
    occupancy=0.5,
    main_loop=None,
)


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: here the kernels are the interpreter's."""
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "fastgan_kernels.aot", *arguments],
        capture_output=True,
        text=True,
        env=without | environment,
        cwd=ROOT,
    )


def test_every_kernel_of_every_network_is_built() -> None:
    found = builds([torch.bfloat16])
    assert {build.label for build in found} == {
        "add",
        "norm_silu.forward",
        "norm_silu.two_tile_forward",
        "norm_silu.backward",
        "resample",
        "resize_normalize.forward",
        "resize_normalize.adjoint",
    }
    assert len({build.key for build in found}) == len(found)
    # One program serves several shapes; none of the kinds of groups is left out.
    groups = {dict(b.constants)["GROUP"] for b in found if b.label == "norm_silu.backward"}
    expected = {norm.channels // norm.groups for net in NETWORKS for norm in net.norms()}
    assert groups == expected and {6, 18, 36, 42} <= groups


def test_chunks_of_a_batch_are_one_program() -> None:
    """576 channels of 64 x 64: four launches forward, eight backward."""
    norm = Norm(576, 64, True, "scale shift")
    found = aot_builds._of_norm(aot_builds._image(32, 576, 64, torch.bfloat16), norm)
    keys = [aot_builds.specialised(started, "bf16").key for started in found]
    assert sorted(Counter(keys).values()) == [4, 8]


def test_arguments_are_specialised_as_triton_does() -> None:
    build = next(b for b in builds([torch.float16]) if b.label == "add")
    types, constants = dict(build.types), dict(build.constants)
    assert types["a_ptr"] == "*fp16" and types["bias_ptr"] == "*fp32"
    assert types["channels"] == "i32" and "channels" in build.divisible
    assert types["gain"] == "fp32" and types["BLOCK"] == "constexpr"
    assert constants["BLOCK"] == 4096


def test_a_subset_compiles_and_is_good(tmp_path: Path) -> None:
    """From an empty cache; `make aot` compiles everything."""
    done = command(
        "--json", "--check", "--kernel", "resize", "--dtype", "bf16", TRITON_CACHE_DIR=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90"}
    assert {row["kernel"] for row in rows} == {
        "resize_normalize.forward",
        "resize_normalize.adjoint",
    }
    for row in rows:
        assert row.keys() == {field.name for field in fields(Row)}
        assert 16 <= row["registers"] <= 255 and row["seconds"] > 0


def test_norms_at_their_largest_compile_without_spills() -> None:
    """Those that hold most: one read of 32 x 32 as one and as two tiles, sweeps, wide slabs."""
    wanted = {(256, 32), (384, 32), (192, 64), (1344, 16)}
    chosen = [
        build
        for build in builds([torch.bfloat16])
        if build.label.startswith("norm_silu") and (build.shape[1], build.shape[2]) in wanted
    ]
    assert len(chosen) >= 6
    program = (
        "import json, sys; from dataclasses import asdict; import torch\n"
        "from kernels import aot, aot_builds\n"
        "every, keys = aot_builds.builds([torch.bfloat16]), sys.argv[1:]\n"
        "jobs = [(b, 'sm_90') for b in every if repr(b.key) in keys]\n"
        "print(json.dumps([asdict(aot.compile_build(job)) for job in jobs]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *(repr(build.key) for build in chosen)],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    rows = [Row(**row) for row in json.loads(done.stdout)]
    assert len(rows) == len(chosen) and problems(rows) == []
    warps = {build.key: build.num_warps for build in chosen}
    for row, count in zip(rows, warps.values(), strict=True):
        if row.shape[2] == 64:  # swept: alone on its multiprocessor of 65,536 registers
            assert 2 * row.registers * 32 * count > 65536


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ({"spill_bytes": 8}, "8 bytes of registers spilled"),
        ({"shared_bytes": 170_000}, "170000 bytes of shared memory"),
        ({"wide_loads": False}, "no 16-byte loads"),
    ],
)
def test_planted_defects_are_found(defect: dict, message: str) -> None:
    assert problems([GOOD]) == []
    (line,) = problems([GOOD, replace(GOOD, **defect)])
    assert message in line and "norm_silu.forward for sm_80, bf16 [64, 256, 32, 32]" in line
    convolution = replace(GOOD, kernel="norm_silu_conv.convolution", arch="sm_90")
    (line,) = problems([convolution])
    assert "None in place of wgmma instructions" in line
    assert problems([replace(convolution, tensor_core="wgmma")]) == []
    assert problems([replace(convolution, dtype="fp32")]) == []
    larger = replace(GOOD, arch="sm_90", shared_bytes=170_000)
    assert problems([larger]) == []


def test_the_interpreter_cannot_compile() -> None:
    done = command(TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


NASTY = """
import sys
sys.path.insert(0, "tests/kernels")
import torch
from kernels import aot, aot_builds, runtime
from fastgan_kernels.norm_silu.device import group_norm_silu_backward, group_norm_silu_forward
from test_norm_silu import SHAPES

done = set()
for n, c, h, w, groups in SHAPES.values():
    x = torch.empty(n, c, h, w, device="meta").to(memory_format=torch.channels_last)
    row, statistics = torch.empty(n, c, device="meta"), torch.empty(2, n, groups, device="meta")
    given = (None, None, row, row, row, True)
    every = frozenset({"x", "affine", "pre_shift", "scale", "shift"})
    with runtime.recording() as launches:
        group_norm_silu_forward(x, groups, None, None, 1e-5, row, row, None, False)
        group_norm_silu_backward(x, x, statistics, groups, *given, every)
        group_norm_silu_backward(x, x, statistics, groups, *given, frozenset({"affine"}))
    for launch in launches:
        build = aot_builds.specialised(aot_builds.Started((n, c, h, w), launch), "fp32")
        if build.key not in done:
            done.add(build.key)
            aot.compile_build((build, "sm_90"))
print(len(done))
"""


def test_the_compiler_takes_what_the_interpreter_took() -> None:
    """One pixel, one channel, one group: arguments of 1 become constants, which few kernels see."""
    done = subprocess.run(
        [sys.executable, "-c", NASTY],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 40


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--jobs", "0"), "error: --jobs is 0, 1 or more would do"),
        (("--arch", "sm_70"), "error: argument --arch: invalid choice: 'sm_70'"),
        (("--check", "--kernel", "nosuch"), "error: no kernel's name contains 'nosuch'"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(arguments: tuple[str, ...], message: str) -> None:
    done = command(*arguments)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1
