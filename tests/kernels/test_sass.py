"""The static estimate of compiled programs, and that norm_silu_conv's use the tensor cores."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastgan_kernels.aot import __main__ as aot
from fastgan_kernels.aot import builds as aot_builds
from fastgan_kernels.aot import sass
from fastgan_kernels.aot.__main__ import Row, problems
from fastgan_kernels.aot.shapes import NETWORKS
from fastgan_kernels.norm_silu_conv.plans import DIRECTIONS, Plan, Shape, candidates, fitted

ROOT = Path(__file__).resolve().parents[2]
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
    found = sass.main_loop(arch, LISTING.replace("{multiply}", multiply))
    assert found == sass.Loop(2, 2, load=4 / cycles, instructions=7, issue=7 / 4 / cycles)


def test_a_program_without_loops_has_no_main_loop() -> None:
    assert sass.main_loop("sm_80", LISTING.partition("/*0060*/")[0]) is None


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
    assert sass.occupancy(arch, registers, shared, warps) == expected


def test_every_published_convolution_is_built() -> None:
    """Nothing but its tiles and what it takes tells one program from another."""
    for arch in aot.ARCHITECTURES:
        found = aot_builds.convolution_builds([torch.bfloat16], arch)
        labels = {build.label for build in found}
        assert {"norm_silu_conv.convolution", "norm_silu_conv.convolution_input_grad"} < labels
        capability = int(arch[-2]), int(arch[-1])
        every = aot_builds._convolutions(torch.bfloat16, capability, False)
        started = {one.shape for one in every}
        expected = {
            (net.batch, *convolution) for net in NETWORKS for convolution in net.convolutions()
        }
        assert started == expected


@pytest.mark.parametrize("architecture", [(8, 0), (9, 0)])
def test_every_plan_is_built(architecture: tuple[int, int]) -> None:
    """As it is for a large image, once at least."""
    arch = f"sm_{architecture[0]}{architecture[1]}"
    built = {build.tile for build in aot_builds.convolution_builds([torch.float16], arch)}
    for direction in DIRECTIONS:
        whole = Shape(1024, 1024, 32, 32, 3)
        plans = {str(plan) for plan in candidates(architecture, torch.float16, direction, whole)}
        assert len(plans) >= 2 and plans <= built


def test_plans_are_cut_to_small_images_and_few_channels() -> None:
    plan, whole = Plan("fused", 128, 256, 64, 8, 3, "boxes"), Shape(1024, 1024, 64, 64, 3)
    assert fitted(plan, "forward", whole) == plan
    half = fitted(plan, "forward", replace(whole, height=8, width=8))
    assert (half.m, half.n, half.warps) == (64, 128, 4)
    assert fitted(plan, "forward", replace(whole, width=48)).loads == "rows"
    assert fitted(plan, "forward", replace(whole, cin=1020)).loads == "pointers"
    tiny = fitted(plan, "forward", Shape(5, 3, 1, 1, 3))
    assert (tiny.m, tiny.n, tiny.k, tiny.loads) == (16, 16, 16, "pointers")
    # Backward the channels change their places.
    narrow = replace(whole, cin=16)
    assert fitted(plan, "forward", narrow).k == 16 and fitted(plan, "backward", narrow).n == 16


PROGRAM = """
import json, sys
from dataclasses import asdict
import torch
from kernels import aot, aot_builds

rows = []
for arch in aot.ARCHITECTURES:
    for build in aot_builds.convolution_builds([torch.bfloat16], arch, every=True):
        if "convolution" in build.label and list(build.shape) in json.loads(sys.argv[1]):
            constants = dict(build.constants)
            if not constants["FLATTEN"] and not constants["SPECIALIZED"]:
                blocks = [constants[f"BLOCK_{axis}"] for axis in "MNK"]
                row = asdict(aot.compile_build((build, arch)))
                rows.append((row, blocks, build.num_warps))
print(json.dumps(rows))
"""


def test_convolutions_multiply_on_tensor_cores() -> None:
    """CIFAR's 128 -> 256 channels of 32 x 32: what a turn of the loop issues follows from its tile.

    A product of m n k takes m n k / 2048 instructions of a warp on sm_80 and, on sm_90, k / 16 for
    each 64 rows of a group of four warps; SiLU an exponential and a reciprocal, or one tangent, per
    element of the input's tile, which the warps share without repetition.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "[[64, 128, 256, 32, 3]]"],
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found) == 19
    for values, (m, n, k), warps in found:
        row = Row(**values | {"main_loop": sass.Loop(**values["main_loop"])})
        assert problems([row]) == []
        assert row.tensor_core == {"sm_80": "mma", "sm_90": "wgmma"}[row.arch]
        products = m * n * k // 2048 // warps
        if row.arch == "sm_90":
            products = (m // 64) // (warps // 4) * k // 16
        special = (1 if "tanh" in row.tile else 2) * m * k // (32 * warps)
        if row.kernel.endswith("input_grad") or "behind" in row.tile:
            special = 0
        assert (row.main_loop.tensor, row.main_loop.special) == (products, special), row
        assert row.main_loop.issue > 0
