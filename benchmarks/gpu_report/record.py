"""What of a report becomes the project's record, and the names under which a target may ask for it.

Kernels are recorded by `python -m benchmarks.summarise --update`; here are the other parts.
"""

from pathlib import Path

from benchmarks.gpu_report import ablation_plot, cifar10_plot
from benchmarks.gpu_report.markdown import markdown
from benchmarks.gpu_report.results import Content, write_json
from benchmarks.gpu_report.variants import BASELINES
from fastgan.common.files import replace_atomically

KEPT = ("environment", "rates", "parity", "steps", "ablation", "cifar10")


def numbers(report: Content) -> dict[str, dict[str, float]]:
    """Per part its measured numbers by the `id` that a row of benchmarks/targets.json would have.

    rates: its own keys that are one number each (copy_bandwidth, conv_dgrad_efficiency ...).
    steps: EXPERIMENT_VARIANT_QUANTITY, quantities img_s, mfu, iteration_ms, peak_gb, vs_BASELINE
    (how many times the baseline's images per second) and kept_vs_compiled_bf16 (bytes per image
    that G keeps for backward, relative to the compiled engine's); with _ for -.
    """
    rates = {k: v for k, v in report.get("rates", {}).items() if isinstance(v, float)}
    steps: dict[str, float] = {}
    for experiment, content in report.get("steps", {}).get("experiments", {}).items():
        for variant, found in content["variants"].items():
            values = _step_numbers(found) | _ratios(content["ratios"], variant)
            values |= _kept(found, content["variants"].get("compiled-bf16", {}))
            prefix = f"{experiment}_{variant}".replace("-", "_")
            steps |= {f"{prefix}_{k}": v for k, v in values.items() if v is not None}
    return {"rates": rates, "steps": steps}


def write_record(report: Content, folder: Path, wanted: set[str]) -> dict[str, tuple[float, str]]:
    """Writes KEPT parts and the tables into `folder`, each JSON file with the `targets` that it
    holds the values of; returns these of `wanted` ids with their file's name."""
    found: dict[str, tuple[float, str]] = {}
    measured = numbers(report)
    for part in KEPT:
        if part not in report:
            continue
        held = {k: v for k, v in measured.get(part, {}).items() if k in wanted}
        write_json(folder / f"{part}.json", report[part] | {"targets": held})
        found |= {name: (value, f"{part}.json") for name, value in held.items()}
    with replace_atomically(folder / "report.md") as file:
        file.write(markdown(report).encode())
    ablation_plot.write(report, folder)
    cifar10_plot.write(report, folder)
    return found


def _step_numbers(found: Content) -> dict[str, float | None]:
    if "img_s" not in found:
        return {}
    peak = found["facts"]["peak_r1"]
    return {
        "img_s": found["img_s"],
        "mfu": found["mfu"],
        "iteration_ms": found["iteration_ms"]["median"],
        "peak_gb": None if peak is None else peak["reserved"] / 1e9,
    }


def _kept(found: Content, compiled: Content) -> dict[str, float | None]:
    ours, theirs = ((each.get("facts") or {}).get("generator_kept") for each in (found, compiled))
    return {"kept_vs_compiled_bf16": ours / theirs if ours and theirs else None}


def _ratios(ratios: Content, variant: str) -> dict[str, float]:
    return {
        f"vs_{base.replace('-', '_')}": ratios[base][variant]["median"]
        for base in BASELINES
        if variant in ratios.get(base, {})
    }
