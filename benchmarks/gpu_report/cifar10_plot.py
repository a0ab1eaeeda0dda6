"""cifar10.png: how near the generators come to the training images, over the images they saw."""

from pathlib import Path
from typing import Any

from benchmarks.gpu_report.results import Content
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically
from fastgan.common.libraries import import_pyplot

FILE = "cifar10.png"
# Okabe and Ito's colours.
CURVES = {
    "d2o_f": ("D2O-F, one step", "#0072B2"),
    "d2o_f_shared": ("D2O-F, shared fakes", "#E69F00"),
    "d2o": ("D2O (nothing frozen)", "#D55E00"),
}
_LINES = {"teacher": ("EDM model, Heun 18 steps", "--"), "real": ("test images", ":")}


def write(report: Content, folder: Path) -> None:
    """Draws `report`'s part `cifar10` into the folder, if it is there and matplotlib is too."""
    if "cifar10" not in report:
        return
    try:
        save_plot(report["cifar10"], folder / FILE)
    except UserError as error:
        print(f"not drawn: {folder / FILE}: {error}")


def save_plot(found: Content, path: Path) -> None:
    """Writes a PNG. UserError: matplotlib is not installed, `path` cannot be written."""
    plt = import_pyplot(path.name)
    figure, axis = plt.subplots(figsize=(7.2, 4.6), layout="constrained")
    stages = found["stages"]
    curves = {name: stages[name]["curve"] for name in CURVES if name in stages}
    for name, points in curves.items():
        label, color = CURVES[name]
        axis.plot(*_xy(points), marker="o", markersize=4, color=color, label=label)
    metric = next((stages[name]["metric"] for name in curves), None)
    for name, (label, style) in _LINES.items():
        scores = list(stages.get(name, {}).get("scores", {}).values())
        if scores:
            axis.axhline(scores[0]["value"], linestyle=style, color="#444444", label=label)
    chip = "dry run on a CPU: random weights" if found["dry_run"] else found["chip"]
    axis.set_title(f"CIFAR-10 from scratch, one seed ({chip})", fontsize=12)
    axis.set_xlabel("thousands of images of the fine-tune")
    axis.set_ylabel(f"{metric or 'distance'} to the training images, n = 10,000")
    axis.set_yscale("log")
    axis.grid(which="both", alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(frameon=False)
    try:
        with replace_atomically(path) as file:
            figure.savefig(file, format="png", dpi=150)
    finally:
        plt.close(figure)


def _xy(points: list[Any]) -> tuple[list[float], list[float]]:
    return [point["kimg"] for point in points], [point["value"] for point in points]
