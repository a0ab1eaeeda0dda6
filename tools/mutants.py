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
COPIED = ("kernels", "fastgan", "configs", "tests", "tools", "pyproject.toml")


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
        "kernels/frozen_block.py",
        "return (h + (x if skip is None else convolve(x, skip))) * gain",
        "return h + (x if skip is None else convolve(x, skip))",
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
        "kernels/attention.py",
        "qkv.reshape(n * heads, depth, 3, height * width).unbind(2)",
        "qkv.reshape(n * heads, 3, depth, height * width).unbind(1)",
        f"{GOLDEN}[unet_block_adm_two_heads.npz]",
    ),
    Mutant(
        "group norm's backward without the mean of dz xhat",
        "kernels/norm_silu_triton.py",
        "- m1[None, :] - xhat * m2[None, :])",
        "- m1[None, :])",
        "tests/kernels/test_norm_silu.py::test_as_accurate_as_plain_pytorch",
    ),
    Mutant(
        "pre_shift's gradient without the sum of xhat",
        "kernels/norm_silu_triton.py",
        "(a * sum_dz - m1 * pixels - m2 * sum_xhat)",
        "(a * sum_dz - m1 * pixels)",
        "tests/kernels/test_norm_silu.py::test_as_accurate_as_plain_pytorch",
    ),
    Mutant(
        "deviations of the positions not merged with those of the means",
        "kernels/norm_silu_tiles.py",
        "tl.sum(deviations + away * away * count, axis=0)",
        "tl.sum(deviations, axis=0)",
        "tests/kernels/test_norm_silu.py::test_as_accurate_as_plain_pytorch",
    ),
    Mutant(
        "groups that lie in two tiles counted in their first one only",
        "kernels/norm_silu_tiles.py",
        "tl.sum(of_v, axis=1) + tl.sum(tl.where(shared, w[None, :], 0.0), axis=1)",
        "tl.sum(of_v, axis=1)",
        "tests/kernels/test_norm_silu.py::test_as_accurate_as_plain_pytorch",
    ),
    Mutant(
        "variance as the mean square minus the squared mean",
        "kernels/norm_silu_tiles.py",
        "        squares = tl.sum(away * away, axis=0)",
        "        squares = tl.sum(tl.where(mask, u * u, 0.0), axis=0) - total * total * pixels",
        "tests/kernels/test_norm_silu.py::test_large_mean_small_deviation",
    ),
    Mutant(
        "pixels beyond the image counted in xhat",
        "kernels/norm_silu_triton.py",
        "all_xhat += tl.where(mask, xhat, 0.0)",
        "all_xhat += xhat",
        "tests/kernels/test_norm_silu.py::test_as_accurate_as_plain_pytorch",
    ),
    Mutant(
        "the block's skip gradient without the gain",
        "kernels/frozen_block.py",
        "residual_scale=i.gain",
        "residual_scale=1.0",
        "tests/kernels/test_frozen_block.py::test_as_accurate_as_plain_pytorch",
    ),
    Mutant(
        "the block keeps what its first convolution saw",
        "kernels/frozen_block.py",
        "ctx.save_for_backward(h, statistics0, statistics1, *inputs[:14])",
        "ctx.save_for_backward(h, statistics0, statistics1, *inputs[:14], h + 1, h + 2)",
        "tests/kernels/test_frozen_block.py::test_keeps_at_most_40_percent_of_eager",
    ),
    Mutant(
        "conv0's bias forgotten where it enters norm1",
        "kernels/frozen_block.py",
        "bias if i.pre_shift is None else bias + i.pre_shift.float()",
        "0 * bias if i.pre_shift is None else i.pre_shift.float()",
        "tests/kernels/test_frozen_block.py::test_as_accurate_as_plain_pytorch",
    ),
    Mutant(
        "frozen convolution keeps its input",
        "kernels/frozen_conv.py",
        "    ctx.save_for_backward(weight, flipped)\n\n\ndef _backward",
        "    ctx.save_for_backward(weight, flipped, x)\n\n\ndef _backward",
        "tests/kernels/test_frozen_conv.py::test_keeps_nothing_but_the_weight",
    ),
    Mutant(
        "R1 on ops without a second derivative",
        "fastgan/training/step.py",
        "            with twice_differentiable():",
        "            if True:",
        "tests/training/test_step_on_kernels.py",
    ),
    Mutant(
        "a kernel that forgets its last partial tile",
        "kernels/norm_silu_tiles.py",
        "mask = (offs_p < pixels)[:, None] & mask_c[None, :]",
        "mask = (offs_p < pixels - 1)[:, None] & mask_c[None, :]",
        "tests/kernels/test_norm_silu.py::test_as_accurate_as_plain_pytorch",
    ),
    Mutant(
        "an iteration that counts the discriminator's reals or fakes only",
        "fastgan/performance/iteration.py",
        "forward, input_grad = forward + 2, input_grad + 2 * trained.input_grad",
        "forward, input_grad = forward + 1, input_grad + 2 * trained.input_grad",
        "tests/performance/test_counts.py",
    ),
    Mutant(
        "gaps of a trace that count twice",
        "fastgan/performance/trace.py",
        "            idle += time - now",
        "            idle += 2 * (time - now)",
        "tests/performance/test_profile.py",
    ),
    Mutant(
        "MFU of one GPU in a run on eight",
        "fastgan/performance/mfu.py",
        "return world.size * peaks[0]",
        "return peaks[0]",
        "tests/performance/test_mfu.py",
    ),
    Mutant(
        "processes that all compile at the same time",
        "fastgan/distributed.py",
        "    if not is_main():\n        with exchanging():",
        "    if is_main():\n        with exchanging():",
        "tests/test_distributed.py",
    ),
    Mutant(
        "the adjoint of going up not four times going down",
        "kernels/resample.py",
        "(4.0 if ctx.up else 0.25)",
        "(1.0 if ctx.up else 0.25)",
        "tests/kernels/test_resample.py::test_as_accurate_as_plain_pytorch",
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
    Mutant(
        "EMA without the ramp",
        "fastgan/training/ema.py",
        "half_life = min(half_life, ramp * nimg)",
        "half_life = half_life",
        "tests/training/test_ema.py",
    ),
    Mutant(
        "EMA copies frozen parameters",
        "fastgan/training/ema.py",
        "memo=shared",
        "memo={}",
        "tests/training/test_ema.py::test_only_what_trains_is_copied",
    ),
    Mutant(
        "R1 already in iteration 0",
        "fastgan/training/step.py",
        "iteration % interval == 0 and iteration > 0",
        "iteration % interval == 0",
        "tests/training/test_step.py::test_r1_comes_every_16th_time_on_bare_reals_with_their_labels",
    ),
    Mutant(
        "R1 not weighted by its interval",
        "fastgan/training/step.py",
        "return gamma / 2 * self.r1_interval",
        "return gamma / 2",
        "tests/training/test_step.py::test_r1_weights",
    ),
    Mutant(
        "R1 of the mean of the logits, not of their sum",
        "fastgan/training/losses.py",
        "[patches.sum() for patches in logits]",
        "[patches.mean() for patches in logits]",
        "tests/training/test_losses.py",
    ),
    Mutant(
        "R1 on augmented reals",
        "fastgan/training/step.py",
        "self.discriminator(images, take(labels, part), None)",
        'self.discriminator(images, take(labels, part), self._streams["augment", "D"])',
        "tests/training/test_step.py::test_r1_comes_every_16th_time_on_bare_reals_with_their_labels",
    ),
    Mutant(
        "R1's weight depends on the batch again",
        "fastgan/training/step.py",
        "gamma /= self.published_batch_gpu",
        "gamma /= self.batch_gpu",
        "tests/training/test_step.py::test_r1_weights",
    ),
    Mutant(
        "fakes and reals in one pass through D",
        "fastgan/training/step.py",
        '                features = self._encode(shown.images, labels, "D")\n'
        "        logits = self._judge(features, labels)\n",
        "                both = torch.cat([shown.images, -shown.images])\n"
        '                features = self._encode(both, None, "D")\n'
        "        logits = [x.chunk(2)[0] for x in self._judge(features, None)]\n",
        "tests/training/test_step.py::test_fakes_and_reals_pass_apart",
    ),
    Mutant(
        "D trains on the fakes of G's step",
        "fastgan/training/step.py",
        "if not self.settings.share_fakes:",
        "if self.settings.share_fakes:",
        "tests/training/test_step.py::test_fakes_of_d_are_fresh_and_of_the_updated_generator",
    ),
    Mutant(
        "a saturating generator loss",
        "fastgan/training/losses.py",
        "return _per_image(fake, lambda x: F.softplus(-x))",
        "return _per_image(fake, lambda x: -F.softplus(x))",
        "tests/training/test_losses.py",
    ),
    Mutant(
        "a non-finite gradient updates all the same",
        "fastgan/training/updater.py",
        "            self.optimizer.found_inf = skipped",
        "            self.optimizer.found_inf = 0 * skipped",
        "tests/training/test_updater.py::test_skip_touches_neither_parameters_nor_moments",
    ),
    Mutant(
        "a replay sees the images of the recording",
        "fastgan/training/replay.py",
        "                static.copy_(given)",
        "                pass",
        "tests/training/test_fast.py::test_replays_equal_the_plain_step_bitwise",
    ),
    Mutant(
        "every iteration draws the same noise",
        "fastgan/training/step.py",
        "reseed(generator, s.seed, kind, purpose, iteration, *own)",
        "reseed(generator, s.seed, kind, purpose, 0, *own)",
        "tests/training/test_step.py::test_eighteen_iterations_equal_the_recipe_written_out",
    ),
    Mutant(
        "a checkpoint is written from tensors that go on training",
        "fastgan/checkpoint/writer.py",
        "training=_copied(checkpoint.training)",
        "training=checkpoint.training",
        "tests/checkpoint/test_writer.py::test_values_are_those_of_the_call",
    ),
    Mutant(
        "chunks count samples where the cache counts slabs",
        "kernels/norm_silu_tiles.py",
        "max(1, chip.l2_bytes // p.swept_bytes // slabs)",
        "max(1, chip.l2_bytes // p.swept_bytes)",
        "tests/kernels/test_norm_silu_tiles.py",
    ),
    Mutant(
        "rounds of accumulation weigh like whole batches",
        "fastgan/training/step.py",
        "return loss.sum() / (self.settings.batch // self.world.size)",
        "return loss.mean()",
        "tests/training/test_step.py::test_two_rounds_equal_one",
    ),
    Mutant(
        "every rank draws the same images",
        "fastgan/data/sampler.py",
        "first = iteration * batch + rank * local",
        "first = iteration * batch",
        "tests/data/test_sampler.py",
    ),
    Mutant(
        "rounding instead of truncation to uint8",
        "fastgan/sampling.py",
        "(images * 127.5 + 128).clip(0, 255)",
        "(images * 127.5 + 127.5).clip(0, 255)",
        "tests/test_sampling.py::test_quantisation_truncates_as_published",
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
