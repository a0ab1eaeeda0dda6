"""Proves that the tests can fail: breaks the method in one line at a time and runs the test for it.

Every mutant is applied to a copy of the repository; its test must pass before and fail after.
Prints a row per mutant and exits with 1 if one survives or no longer applies.
"""

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastgan.errors import ArgumentParser, UserError, run_command

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("fastgan", "configs", "tests", "tools", "pyproject.toml")


@dataclass(frozen=True)
class Mutant:
    """One line of the method made wrong, and the test that must notice."""

    what: str
    file: str
    right: str
    wrong: str
    test: str


GOLDEN = "tests/models/test_golden.py::test_every_golden_file_holds"
MUTANTS = (
    Mutant(
        "c_skip without the eps shift",
        "fastgan/models/precond.py",
        "self.sigma_data**2 / ((sigma - self.eps) ** 2 + self.sigma_data**2)",
        "self.sigma_data**2 / (sigma**2 + self.sigma_data**2)",
        "tests/models/test_networks.py::test_d2o_is_the_identity_at_its_smallest_sigma",
    ),
    Mutant(
        "c_out shifted in the denominator too",
        "fastgan/models/precond.py",
        "(sigma - self.eps) * self.sigma_data / (sigma**2 + self.sigma_data**2).sqrt()",
        "(sigma - self.eps) * self.sigma_data / ((sigma - 0.1) ** 2 + self.sigma_data**2).sqrt()",
        f"{GOLDEN}[ncsnpp_uncond_d2o.npz]",
    ),
    Mutant(
        "no skip scale after the residual branch",
        "fastgan/models/unet_block.py",
        "(x if self.skip is None else self.skip(x))) * self.skip_scale",
        "(x if self.skip is None else self.skip(x)))",
        f"{GOLDEN}[ddpmpp_cond_edm.npz]",
    ),
    Mutant(
        "labels not scaled by sqrt(label_dim)",
        "fastgan/models/song_unet.py",
        "labels * sqrt(self.map_label.in_features)",
        "labels",
        f"{GOLDEN}[ddpmpp_cond_edm.npz]",
    ),
    Mutant(
        "sin and cos of the noise embedding not swapped",
        "fastgan/models/song_unet.py",
        "torch.cat([sin, cos], dim=1)",
        "torch.cat([cos, sin], dim=1)",
        f"{GOLDEN}[ncsnpp_uncond_d2o.npz]",
    ),
    Mutant(
        "scale and shift halves exchanged",
        "fastgan/models/unet_block.py",
        "scale, shift = params.chunk(2, dim=1)",
        "shift, scale = params.chunk(2, dim=1)",
        f"{GOLDEN}[adm_cond_d2o.npz]",
    ),
    Mutant(
        "q, k, v stacked instead of interleaved",
        "fastgan/models/unet_block.py",
        "qkv.reshape(n * num_heads, depth, 3, height * width).unbind(2)",
        "qkv.reshape(n * num_heads, 3, depth, height * width).unbind(1)",
        f"{GOLDEN}[unet_block_adm_two_heads.npz]",
    ),
    Mutant(
        "the attention output convolution trains",
        "fastgan/models/freeze.py",
        '("conv", "proj"),',
        '("conv",),',
        "tests/models/test_golden.py::test_frozen_share_equals_the_published_table",
    ),
    Mutant(
        "Heun's correction left out",
        "fastgan/sampling.py",
        "(following - now) * (before + slope(ahead, following)) / 2",
        "(following - now) * before",
        f"{GOLDEN}[heun_sampler_ddpmpp_cond.npz]",
    ),
)


def kills(mutant: Mutant) -> bool:
    """Whether the mutant's test fails on a copy with the mutation (and passes without it)."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, copy / name)
        if not _passes(copy, mutant.test):
            raise UserError(f"{mutant.test} fails without a mutation, a green test expected")
        file = copy / mutant.file
        text = file.read_text()
        if text.count(mutant.right) != 1:
            raise UserError(
                f"mutant {mutant.what!r} finds its line {text.count(mutant.right)} times in "
                f"{mutant.file}, exactly once expected"
            )
        file.write_text(text.replace(mutant.right, mutant.wrong))
        return not _passes(copy, mutant.test)


def _passes(folder: Path, test: str) -> bool:
    # The copy's own package must win over an installed one.
    script = (
        "import sys; sys.path.insert(0, '.'); import pytest; sys.exit(pytest.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", script, "-x", "-q", "-p", "no:cacheprovider", test]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    if done.returncode not in (0, 1):
        raise UserError(f"{test} did not run: {done.stdout.strip().splitlines()[-1:]}")
    return done.returncode == 0


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--list", action="store_true", help="print the mutants, run nothing")
    parser.add_argument("--only", metavar="TEXT", default="", help="mutants whose title has TEXT")
    args = parser.parse_args()
    survivors = 0
    for mutant in (m for m in MUTANTS if args.only in m.what):
        verdict = "" if args.list else ("killed" if kills(mutant) else "SURVIVED")
        survivors += verdict == "SURVIVED"
        print(f"{verdict:9} {mutant.what:58} {mutant.test}", flush=True)
    return 1 if survivors else 0


if __name__ == "__main__":
    run_command(main)
