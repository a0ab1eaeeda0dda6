"""ablation.png: images per second row by row, a panel per experiment."""

from pathlib import Path
from typing import Any

from benchmarks.gpu_report.ablation import ROWS
from benchmarks.gpu_report.results import Content
from fastgan.common.errors import UserError
from fastgan.common.files import replace_atomically
from fastgan.common.libraries import import_pyplot

FILE = "ablation.png"
TITLES = {
    "published": "plain PyTorch, as published",
    "layout": "+ discriminator in channels_last",
    "precision": "+ discriminator in bfloat16",
    "compile": "+ torch.compile",
    "kernels": "+ our kernels",
    "folded": "+ BatchNorm folded",
    "graphs": "+ CUDA graphs",
    "resident": "+ images on the device",
    "shared": "+ shared fakes",
}
# Okabe and Ito's colours: the method as published, and the row that changes its schedule.
_SAME, _OTHER, _QUIET = "#0072B2", "#E69F00", "#666666"
# Where the columns beside the bars end, as shares of a panel's width; bars end before them.
_COLUMNS = {"x row above": 0.84, "x first row": 1.0}
_BARS = 0.56


def write(report: Content, folder: Path) -> None:
    """Draws `report`'s part `ablation` into the folder, if it is there and matplotlib is too."""
    if "ablation" not in report:
        return
    try:
        save_plot(report["ablation"], folder / FILE)
    except UserError as error:
        print(f"not drawn: {folder / FILE}: {error}")


def save_plot(found: Content, path: Path) -> None:
    """Writes a PNG. UserError: matplotlib is not installed, `path` cannot be written."""
    plt = import_pyplot(path.name)
    experiments = found["experiments"]
    figure, axes = plt.subplots(
        1, len(experiments), figsize=(2.6 + 5.2 * len(experiments), 4.8), sharey=True,
        squeeze=False, layout="constrained",
    )  # fmt: skip
    figure.get_layout_engine().set(wspace=0.06)
    for axis, (name, content) in zip(axes.flat, experiments.items(), strict=True):
        _panel(axis, name, content["rows"])
    axes[0, 0].set_yticks(range(len(ROWS)), [TITLES[name] for name in ROWS], ha="left")
    axes[0, 0].tick_params(axis="y", pad=190)
    axes[0, 0].set_ylim(len(ROWS) - 0.4, -1.1)
    chip = "dry run on a CPU: no number is a speed" if found["dry_run"] else found["chip"]
    figure.suptitle(f"Images per second, row by row ({chip})", fontsize=13)
    try:
        with replace_atomically(path) as file:
            figure.savefig(file, format="png", dpi=150)
    finally:
        plt.close(figure)


def _panel(axis: Any, experiment: str, rows: Content) -> None:
    """Bars with their speed; beside them what it is over the row above's and the first row's."""
    widest = max((each.get("img_s", 0.0) for each in rows.values()), default=0.0) or 1.0
    beside = axis.get_yaxis_transform()
    for title, x in _COLUMNS.items():
        axis.text(x, -0.75, title, transform=beside, ha="right", fontsize=9, color=_QUIET)
    for position, name in enumerate(ROWS):
        each = rows.get(name, {})
        speed = each.get("img_s", 0.0)
        axis.barh(position, speed, height=0.7, color=_OTHER if name == "shared" else _SAME)
        axis.annotate(
            _words(each), (speed, position), xytext=(5, 0), textcoords="offset points",
            va="center", color="black" if speed else _QUIET,
        )  # fmt: skip
        gains = [each["gain"]["median"] if each.get("gain") else None, each.get("total")]
        for x, gain in zip(_COLUMNS.values(), gains, strict=True):
            text = "" if gain is None else f"{gain:.2f}"
            axis.text(x, position, text, transform=beside, ha="right", va="center")
    batches = {each["facts"]["batch"] for each in rows.values() if each.get("facts")}
    of_batch = f", batch {batches.pop()}" if len(batches) == 1 else ""
    axis.set_title(f"{experiment}{of_batch}", fontsize=11)
    axis.set_xlim(0, widest / _BARS)
    axis.set_xticks([])
    axis.tick_params(axis="y", length=0)
    for side in ("top", "right", "bottom"):
        axis.spines[side].set_visible(False)


def _words(each: Content) -> str:
    """What stands at a bar's end, or in its place."""
    if "img_s" not in each:
        return "could not run" if each.get("error") else "not measured"
    return f"{each['img_s']:,.0f}" if each["img_s"] >= 100 else f"{each['img_s']:.3g}"
