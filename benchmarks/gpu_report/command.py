"""What tools/gpu_report.py does once its arguments are read and Hydra can be imported."""

import argparse
import shlex
import sys
import traceback
from pathlib import Path

import torch

from benchmarks.gpu_report import ablation_plot, cifar10_plot, kernel_benchmarks, report
from benchmarks.gpu_report.pack import check, pack
from benchmarks.gpu_report.parts import Case, Part, all_parts, select
from benchmarks.gpu_report.results import Content
from benchmarks.gpu_report.runner import Runner, claim, terminable
from fastgan.common.errors import UserError

OUT = "runs/gpu-report"


def prepare(options: argparse.Namespace) -> tuple[list[Case], list[Part]]:
    """The cases that are meant, and all parts. UserError: the options do not fit each other, or
    this machine."""
    parts = all_parts()
    cases = select(parts, options.part, options.tiny)
    if options.tiny and options.update:
        raise UserError("a dry run is no measurement, --tiny --update, one of them alone would do")
    if not (options.list or options.tiny or options.summary or torch.cuda.is_available()):
        where = "--update" if options.update else "on this machine"
        raise UserError(
            f"no GPU, {where}, --tiny for a dry run or --summary for results brought here would do"
        )
    options.out = options.out or Path(f"{OUT}-tiny" if options.tiny else OUT)
    if options.summary and not (options.out / "kind.json").is_file():
        raise UserError(f"no results, --out {options.out}, the folder of a report would do")
    if options.pack:
        check(options.out, options.pack)
    return cases, parts


def list_cases(cases: list[Case], parts: list[Part]) -> None:
    """Prints them part by part with the time that each should take."""
    for part in parts:
        mine = [case for case in cases if case.part == part.name]
        if mine:
            print(f"{part.name}: {part.summary}")
        for case in mine:
            print(f"  {case.label:40} {case.seconds / 60:5.1f} min expected on an H200")
    print(f"{'all':42} {sum(case.seconds for case in cases) / 60:5.1f} min")


def measure(
    options: argparse.Namespace, cases: list[Case], parts: list[Part], unpacked: Path | None
) -> tuple[Content, Runner]:
    """Runs what has no result yet and writes the report after every case."""
    claim(options.out, options.tiny)
    out = options.out.resolve()
    run = Runner(out, options.tiny, options.minutes, [unpacked] if unpacked else [])
    new = {"kernels", "ablation", "cifar10"} if options.summary else set()
    if not options.summary:
        if options.again:
            report.forget(cases, out)
        try:
            with terminable():
                for case in run.run(cases):
                    new.add(case.part)
                    _bring(options, run, parts)
        finally:
            # Also where this process is told to end: what was begun has notes and a log.
            _bring(options, run, parts)
    if "kernels" in new:
        kernel_benchmarks.write_table(out)
    content = report.write_report(out, parts, options.tiny, run.failed)
    if "ablation" in new:
        ablation_plot.write(content, out)
    if "cifar10" in new:
        cifar10_plot.write(content, out)
    print(f"{options.out / 'report.md'}: written, {len(content['missing'])} cases missing")
    return content, run


def _bring(options: argparse.Namespace, run: Runner, parts: list[Part]) -> None:
    """The report and the archive of what there is: this process may be killed during the next case.
    Results that the report cannot take are no reason to measure no others."""
    try:
        report.write_report(run.out, parts, options.tiny, run.failed)
    except Exception:
        traceback.print_exc()
    if options.pack:
        pack(run.out, options.pack)


def conclude(options: argparse.Namespace, run: Runner) -> int:
    """Packs, says what is left and how to go on; returns the exit status."""
    if options.pack:
        print(*pack(run.out, options.pack), sep="\n")
    if run.left:
        words = [word for word in sys.argv if word != "--again"]
        print(f"left: {', '.join(case.label for case in run.left)}")
        print(f"continue with: {shlex.join(['python', *words])}")
    return 1 if run.failed else 0
