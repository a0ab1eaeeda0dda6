"""The numbers and the table that a profile is read for."""

from collections import defaultdict
from typing import Any

from fastgan.performance.kinds import KINDS
from fastgan.performance.phases import DISCRIMINATOR
from fastgan.performance.trace import Timeline

GAPS = "gaps"
NO_PHASE = "none"
_TOP = 25


def summary(found: Timeline, iterations: int) -> dict[str, Any]:
    """Milliseconds per iteration by kind (`gaps` included: they add up to `milliseconds`), by phase
    and kind, and of the names that take longest; launches per iteration."""
    by_phase: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    by_name: dict[tuple[str, str], list[float]] = defaultdict(list)
    for work in found.works:
        milliseconds = work.microseconds / 1e3 / iterations
        by_phase[work.phase or NO_PHASE][work.kind] += milliseconds
        by_name[work.name, work.kind].append(milliseconds)
    longest = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:_TOP]
    kinds = {kind: sum(phase.get(kind, 0.0) for phase in by_phase.values()) for kind in KINDS}
    return {
        "iterations": iterations,
        "milliseconds": found.total / 1e3 / iterations,
        "kinds": {**kinds, GAPS: found.idle / 1e3 / iterations},
        "phases": {phase: dict(of_phase) for phase, of_phase in by_phase.items()},
        "launches": found.launches / iterations,
        "launched": "device kernels" if found.on_device else "operators, those inside others too",
        "attribution": _attribution(found),
        "longest": [
            {
                "name": name,
                "kind": kind,
                "milliseconds": sum(taken),
                "calls": len(taken) / iterations,
            }
            for (name, kind), taken in longest
        ],
    }


def table(report: dict[str, Any]) -> str:
    """The report of profile.json for people."""
    lines = [_title(report)]
    if report["note"]:
        lines.append(f"note: {report['note']}")
    if report["skipped_updates"]:
        lines.append(f"note: {report['skipped_updates']} updates were skipped (not finite)")
    lines += _facts(report)
    for name, profile in report["profiles"].items():
        lines += ["", f"{_NAMES[name]}, milliseconds per iteration", *_rows(profile)]
        lines.append(f"{profile['launches']:.0f} launches per iteration ({profile['launched']})")
        lines.append(f"kinds: {profile['attribution']}")
    return "\n".join(lines)


_NAMES = {"step": "Step without R1", "r1": "Step with R1"}


def _title(report: dict[str, Any]) -> str:
    size = " (shrunk)" if report["tiny"] else ""
    settings = " ".join(f"{key}={report[key]}" for key in ("engine", "precision", "kernels"))
    batch = f"batch={report['batch']} batch_gpu={report['batch_gpu']}"
    return f"{report['experiment']}{size} {settings} {batch} on {report['device_name']}"


def _facts(report: dict[str, Any]) -> list[str]:
    clocked, peak = report["seconds_per_iteration"], report["peak_memory_bytes"]
    memory = "not counted on a CPU" if peak is None else f"{peak / 2**30:.2f} GiB"
    return [
        f"img/s: {report['img_per_sec']:.4g} (median of {clocked['n']} iterations, "
        f"{1e3 * clocked['median']:.1f} ms each without the profiler)",
        _utilisation(report),
        f"peak memory: {memory}",
        f"time to first step: {report['seconds_to_first_step']:.1f} s",
    ]


def _utilisation(report: dict[str, Any]) -> str:
    work = f"{report['gflop_per_image']:.4g} GFLOP per image"
    if report["mfu"] is None:
        return f"MFU: not known on a CPU ({work})"
    rate = report["matmul_flop_per_sec"] / 1e12
    return f"MFU: {report['mfu']:.1%} ({work}, {rate:.3g} TFLOP/s in products of bf16 matrices)"


def _rows(profile: dict[str, Any]) -> list[str]:
    total = profile["milliseconds"]
    rows = [f"{'kind':<12}{'all':>12}{'share':>9}{'G':>12}{'D':>12}{'rest':>12}"]
    for kind, milliseconds in profile["kinds"].items():
        cells = f"{kind:<12}{milliseconds:>12.3f}{milliseconds / total:>9.1%}"
        if kind != GAPS:
            cells += "".join(f"{part:>12.3f}" for part in _parts(profile["phases"], kind))
        rows.append(cells)
    return [*rows, f"{'total':<12}{total:>12.3f}{1:>9.1%}"]


def _parts(phases: dict[str, dict[str, float]], kind: str) -> tuple[float, float, float]:
    """Of a kind: the generator's share, the discriminator's, and what is neither's."""
    g = phases.get("generator", {}).get(kind, 0.0)
    d = sum(phases.get(phase, {}).get(kind, 0.0) for phase in DISCRIMINATOR)
    return g, d, sum(of_phase.get(kind, 0.0) for of_phase in phases.values()) - g - d


def _attribution(found: Timeline) -> str:
    """How the table knows what belongs where."""
    busy = sum(work.microseconds for work in found.works)
    placed = sum(work.microseconds for work in found.works if work.phase)
    sentence = (
        f"{placed / busy if busy else 0:.0%} of the busy time was started in ranges around parts "
        "of the step (backward through autograd's sequence numbers), the rest goes by name alone"
    )
    if not found.phases & {"backbone", "mixing", "heads"}:
        sentence += (
            "; D is compiled as a whole, without ranges inside: "
            "its backbone, mixing and heads are counted by the names of their kernels"
        )
    return sentence
