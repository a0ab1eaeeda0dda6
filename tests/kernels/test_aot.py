"""Compiling ahead of time: what is built, what the compiler made of it, what is a problem."""

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastgan_kernels.aot import __main__ as aot
from fastgan_kernels.aot import builds as aot_builds
from fastgan_kernels.aot.builds import Build, builds
from fastgan_kernels.aot.compiler import Loop, Row, main_loop, occupancy
from fastgan_kernels.aot.shapes import NETWORKS, Norm
from fastgan_kernels.norm_silu_conv.plans import DIRECTIONS, Shape, candidates

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

# What is built


def test_every_kernel_of_every_network_is_built() -> None:
    found = builds([torch.bfloat16])
    assert {build.label for build in found} == {
        "norm_silu_conv.add",
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
    found = aot_builds.of_norm(aot_builds.image(32, 576, 64, torch.bfloat16), norm)
    keys = [aot_builds.specialised(started, "bf16").key for started in found]
    assert sorted(Counter(keys).values()) == [4, 8]


def test_arguments_are_specialised_as_triton_does() -> None:
    build = next(b for b in builds([torch.float16]) if b.label == "norm_silu_conv.add")
    types, constants = dict(build.types), dict(build.constants)
    assert types["a_ptr"] == "*fp16" and types["bias_ptr"] == "*fp32"
    assert types["channels"] == "i32" and "channels" in build.divisible
    assert types["gain"] == "fp32" and types["BLOCK"] == "constexpr"
    assert constants["BLOCK"] == 4096


@pytest.mark.parametrize("architecture", [(8, 0), (9, 0)])
def test_every_published_convolution_and_every_plan_is_built(architecture: tuple[int, int]) -> None:
    """By the default everywhere, by each other plan once; 1 x 1 ones stand behind no SiLU."""
    started = list(aot_builds.convolutions(torch.float16, architecture, False))
    assert {each.shape for each in started} == {
        (net.batch, *convolution)
        for net in NETWORKS
        for convolution in net.convolutions()
        if convolution[3] == 3
    }
    arch = f"sm_{architecture[0]}{architecture[1]}"
    found = aot_builds.convolution_builds([torch.float16], arch)
    labels = {build.label for build in found}
    assert {"norm_silu_conv.convolution", "norm_silu_conv.convolution_input_grad"} < labels
    for direction in DIRECTIONS:
        whole = Shape(1024, 1024, 32, 32, 3)
        plans = {str(plan) for plan in candidates(architecture, torch.float16, direction, whole)}
        assert len(plans) >= 2 and plans <= {build.tile for build in found}


# What the compiler made of it: in a process of its own, as here the kernels are the interpreter's

PROGRAM = """
import json, sys
from dataclasses import asdict
import torch
from fastgan_kernels.aot.builds import builds, convolution_builds
from fastgan_kernels.aot.compiler import compile_build
keys, rows = set(sys.argv[2:]), []
every = builds([torch.bfloat16]) + convolution_builds([torch.bfloat16], sys.argv[1], every=True)
for build in every:
    if repr(build.key) in keys:
        row = asdict(compile_build((build, sys.argv[1])))
        rows.append((row, dict(build.constants), build.num_warps))
print(json.dumps(rows))
"""


def python(*arguments: str, **environment: str) -> str:
    without = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | environment
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=without
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def compiled(
    chosen: list[Build], arch: str, **environment: str
) -> list[tuple[Row, dict[str, Any], int]]:
    """Rows without problems, with the constants and warps of their builds."""
    keys = (repr(build.key) for build in chosen)
    found = []
    for values, *rest in json.loads(python("-c", PROGRAM, arch, *keys, **environment)):
        loop = values["main_loop"] and Loop(**values["main_loop"])
        found.append((Row(**values | {"main_loop": loop}), *rest))
    assert len(found) == len(chosen) and aot.problems([row for row, *_ in found]) == []
    return found


def check_loops(found: list[tuple[Row, dict[str, Any], int]]) -> None:
    """What a turn of a convolution's loop issues follows from its tile.

    A product of m n k takes m n k / 2048 instructions of a warp on sm_80 and, on sm_90, k / 16 for
    each 64 rows of a group of four warps; SiLU an exponential and a reciprocal, or one tangent, per
    element of the input's tile, which the warps share without repetition.
    """
    for row, constants, warps in found:
        m, n, k = (constants[f"BLOCK_{axis}"] for axis in "MNK")
        products = m * n * k // 2048 // warps
        if row.arch == "sm_90":
            products = (m // 64) // (warps // 4) * k // 16
        special = (1 if "tanh" in row.tile else 2) * m * k // (32 * warps)
        if row.kernel.endswith("input_grad") or "behind" in row.tile:
            special = 0
        assert row.main_loop is not None and row.main_loop.issue > 0
        assert (row.main_loop.tensor, row.main_loop.special) == (products, special), row


def convolutions(arch: str) -> list[Build]:
    """CIFAR's 128 -> 256 channels of 32 x 32, by every plan."""
    every = aot_builds.convolution_builds([torch.bfloat16], arch, every=True)
    return [b for b in every if b.shape == (64, 128, 256, 32, 3) and b.tile]


def test_two_programs_compile_and_are_good(tmp_path: Path) -> None:
    """From an empty cache; `make aot` compiles everything."""
    small = [b for b in convolutions("sm_80") if b.tile == "fused 64x64x64 w4 s3"]
    resize = [b for b in builds([torch.bfloat16]) if b.label == "resize_normalize.adjoint"][:1]
    found = compiled(resize + small, "sm_80", TRITON_CACHE_DIR=str(tmp_path))
    assert [row.kernel for row, *_ in found] == [
        "resize_normalize.adjoint",
        "norm_silu_conv.convolution_input_grad",
    ]
    assert all(16 <= row.registers <= 255 and row.seconds > 0 for row, *_ in found)
    check_loops(found[1:])


@pytest.mark.slow
@pytest.mark.parametrize("arch", aot.TENSOR_CORE)
def test_convolutions_multiply_on_tensor_cores(arch: str) -> None:
    found = compiled(convolutions(arch), arch)
    assert len(found) == {"sm_80": 8, "sm_90": 9}[arch]
    check_loops(found)


@pytest.mark.slow
def test_norms_at_their_largest_compile_without_spills() -> None:
    """Those that hold most: one read of 32 x 32 as one and as two tiles, sweeps, wide slabs."""
    wanted = {(256, 32), (384, 32), (192, 64), (1344, 16)}
    chosen = [
        build
        for build in builds([torch.bfloat16])
        if build.label.startswith("norm_silu.") and build.shape[1:3] in wanted
    ]
    assert len(chosen) >= 6
    for row, _, warps in compiled(chosen, "sm_90"):
        if row.shape[2] == 64:  # swept: alone on its multiprocessor of 65,536 registers
            assert 2 * row.registers * 32 * warps > 65536


NASTY = """
import sys
sys.path.insert(0, "tests/kernels")
import torch
from fastgan_kernels import runtime
from fastgan_kernels.aot.builds import Started, specialised
from fastgan_kernels.aot.compiler import compile_build
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
        build = specialised(Started((n, c, h, w), launch), "fp32")
        if build.key not in done:
            done.add(build.key)
            compile_build((build, "sm_90"))
print(len(done))
"""


@pytest.mark.slow
def test_the_compiler_takes_what_the_interpreter_took() -> None:
    """One pixel, one channel, one group: arguments of 1 become constants, which few kernels see."""
    assert int(python("-c", NASTY)) >= 20


# A small loop inside of a large one that multiplies, a loop that does not, and what is in none.
LISTING = """
        /*0000*/                   MUFU.RSQ R1, R2 ;                /* 0x000 */
        /*0010*/                   LDG.E R0, [R2.64] ;              /* 0x000 */
        /*0020*/                   MUFU.EX2 R1, R2 ;                /* 0x000 */
        /*0030*/                   {multiply} R4, R8, R12, R4 ;     /* 0x000 */
        /*0040*/              @!P0 MUFU.RCP R1, R1 ;                /* 0x000 */
        /*0050*/                   FADD R1, R1, R1 ;                /* 0x000 */
        /*0060*/               @P1 BRA 0x50 ;                       /* 0x000 */
        /*0070*/                   {multiply} R4, R8, R12, R4 ;     /* 0x000 */
        /*0080*/              @!P2 BRA 0x20 ;                       /* 0x000 */
        /*0090*/                   MUFU.EX2 R1, R2 ;                /* 0x000 */
        /*00a0*/               @P1 BRA 0x90 ;                       /* 0x000 */
        /*00b0*/                   BRA 0xc0 ;                       /* 0x000 */
        /*00c0*/                   EXIT ;                           /* 0x000 */
"""


@pytest.mark.parametrize(
    ("arch", "multiply", "cycles"),
    [
        # Two products of 2,048 multiply-adds at 1,024 a cycle.
        ("sm_80", "HMMA.16816.F32.BF16", 4),
        ("sm_80", "HMMA.1688.F32", 2),
        # A warp's quarter of two of 64 x 128 x 16 at 2,048 a cycle.
        ("sm_90", "HGMMA.64x128x16.F32.BF16", 32),
    ],
)
def test_the_loop_that_multiplies_is_found_and_weighed(
    arch: str, multiply: str, cycles: int
) -> None:
    """Two special functions of a warp take 4 cycles of 16 lanes; of 7 instructions 4 are issued in
    a cycle."""
    found = main_loop(arch, LISTING.replace("{multiply}", multiply))
    assert found == Loop(2, 2, load=4 / cycles, instructions=7, issue=7 / 4 / cycles)
    assert main_loop(arch, LISTING.partition("/*0060*/")[0]) is None


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "expected"),
    [
        ("sm_80", 128, 0, 8, 16 / 64),
        ("sm_80", 129, 0, 8, 8 / 64),
        ("sm_80", 32, 0, 4, 64 / 64),
        ("sm_80", 16, 0, 1, 32 / 64),
        ("sm_80", 64, 57_856, 8, 16 / 64),
        ("sm_90", 64, 57_856, 8, 24 / 64),
    ],
)
def test_occupancy(arch: str, registers: int, shared: int, warps: int, expected: float) -> None:
    assert occupancy(arch, registers, shared, warps) == expected


# What is printed


@pytest.mark.parametrize(
    ("defect", "message"),
    [
        ({"spill_bytes": 8}, "8 bytes of registers spilled"),
        ({"shared_bytes": 170_000}, "170000 bytes of shared memory"),
        ({"wide_loads": False}, "no 16-byte loads"),
    ],
)
def test_planted_defects_are_found(defect: dict, message: str) -> None:
    assert aot.problems([GOOD]) == []
    (line,) = aot.problems([GOOD, replace(GOOD, **defect)])
    assert message in line and "norm_silu.forward for sm_80, bf16 [64, 256, 32, 32]" in line
    convolution = replace(GOOD, kernel="norm_silu_conv.convolution", arch="sm_90")
    (line,) = aot.problems([convolution])
    assert "None in place of wgmma instructions" in line
    assert aot.problems([replace(convolution, tensor_core="wgmma")]) == []
    assert aot.problems([replace(convolution, dtype="fp32")]) == []
    assert aot.problems([replace(GOOD, arch="sm_90", shared_bytes=170_000)]) == []


class InProcess:
    """In the place of ProcessPoolExecutor, with results of no compiler."""

    def __init__(self, *_: object, **options: object) -> None: ...

    def __enter__(self) -> "InProcess":
        return self

    def __exit__(self, *_: object) -> None: ...

    def map(self, function: object, jobs: list[tuple[Build, str]], chunksize: int) -> list[Row]:
        return [
            replace(GOOD, kernel=build.label, arch=arch, spill_bytes=8 * (arch == "sm_90"))
            for build, arch in jobs
        ]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(aot, "ProcessPoolExecutor", InProcess)
    monkeypatch.setattr("fastgan_kernels.runtime.INTERPRETED", False)
    monkeypatch.setattr("sys.argv", ["aot", *arguments])
    try:
        return aot.main()
    except SystemExit as end:
        return int(str(end.code))


def test_the_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    subset = ("--kernel", "resize", "--dtype", "bf16", "--arch", "sm_80")
    assert command(monkeypatch, "--json", "--check", *subset) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {row["kernel"] for row in rows} == {
        "resize_normalize.forward",
        "resize_normalize.adjoint",
    }
    assert all(row.keys() == asdict(GOOD).keys() for row in rows)
    assert command(monkeypatch, *subset) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(rows)
    assert command(monkeypatch, "--check", *subset[:-1], "sm_90") == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("error: resize_normalize") == len(rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--jobs", "0"), "error: --jobs is 0, 1 or more would do"),
        (("--arch", "sm_70"), "error: argument --arch: invalid choice: 'sm_70'"),
        (("--check", "--kernel", "nosuch"), "error: no kernel's name contains 'nosuch'"),
    ],
)
def test_wrong_arguments_are_said_in_one_line(
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(monkeypatch, *arguments) == 1
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(message) and len(said.err.splitlines()) == 1


def test_the_interpreter_cannot_compile(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fastgan_kernels.runtime.INTERPRETED", True)
    monkeypatch.setattr("sys.argv", ["aot"])
    assert aot.main() == 1
    assert "nothing to compile with, TRITON_INTERPRET=1 is set" in capsys.readouterr().err
