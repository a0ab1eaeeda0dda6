"""All results of a folder as one: PART.json where a part is complete, report.json and report.md."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.gpu_report.markdown import markdown
from benchmarks.gpu_report.parts import Case, Part
from benchmarks.gpu_report.results import Content, read_json, write_json
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically


def write_report(
    out: Path, parts: Iterable[Part], tiny: bool, failed: dict[str, str] | None = None
) -> Content:
    """Writes all of it from the results that are there, and returns report.json's content.

    A part of a single nameless case has its file already.
    `missing` names the cases without a result, with the line in which they failed (or null).
    """
    report: Content = {"dry_run": tiny, "missing": {}}
    for part in parts:
        cases = part.cases(tiny)
        found = results(cases, out)
        if found:
            report[part.name] = part.merged(found)
        if len(found) == len(cases) and any(found):
            write_json(out / f"{part.name}.json", report[part.name])
        absent = {case.label: (failed or {}).get(case.label) or _begun(case, out) for case in cases
                  if case.name not in found}  # fmt: skip
        if found or any(absent.values()) or not part.asked_for:
            report["missing"] |= absent
    report["dry_run"] = tiny or any(each["dry_run"] for each in _measured(report))
    write_json(out / "report.json", report)
    with replace_atomically(out / "report.md") as file:
        file.write(markdown(report).encode())
    return report


def _begun(case: Case, out: Path) -> str | None:
    """Where what is known of it is, before it has ended."""
    notes = case.result(out).with_suffix(".progress.json")
    return f"begun, {notes.relative_to(out)} has what is known" if notes.is_file() else None


def results(cases: Sequence[Case], out: Path) -> dict[str, Content]:
    """By case name what is there."""
    files = {case.name: case.result(out) for case in cases}
    return {name: read_json(file) for name, file in files.items() if file.is_file()}


def forget(cases: Iterable[Case], out: Path) -> None:
    """Removes what was measured of `cases`, finished or not."""
    for case in cases:
        result = case.result(out)
        for path in (result, *result.parent.glob(f"{result.stem}.progress.json")):
            path.unlink(missing_ok=True)


def chips(report: Content) -> set[str]:
    """Every device that a part was measured on: one, unless folders were mixed."""
    return {each["chip"] for each in _measured(report)}


def _measured(report: Content) -> list[Content]:
    return [each for each in report.values() if isinstance(each, dict) and "dry_run" in each]


def require_record(report: Content, machine: str) -> None:
    """UserError unless all was measured on one GPU whose name has `machine` in it."""
    if report["dry_run"]:
        raise UserError("results of a CPU, --update, those of a run on a GPU would do")
    found = chips(report)
    if "environment" not in report or len(found) != 1 or machine not in next(iter(found)):
        names = ", ".join(sorted(found)) or "nothing"
        raise UserError(
            f"measured on {names}, --update, part environment and all others on one {machine}, "
            "for which the targets are, would do"
        )
