"""The demo over three seeds with its controls (make demo-study), or variants of it.

Each run is a folder of its own and is not repeated when it is already done.
"""

import json
import statistics
from pathlib import Path
from typing import Any

from demo import TEACHER, demo, table

from fastgan.checkpoint.network_file import load_network_file
from fastgan.common.errors import ArgumentParser, run_command
from fastgan.common.files import replace_atomically

SEEDS = (42, 43, 44)
SPACES = ("classifier", "pca")
# The method and its controls; the others ask what an engine, a schedule, a precision changes.
USUAL = ["d2o_f", "d2o", "random_weights"]


def variants() -> dict[str, list[str]]:
    """Name -> overrides of experiment=demo; the control keeps the discriminator's encoder."""
    source = load_network_file(TEACHER).config
    unet = ("model_type", "model_channels", "channel_mult", "num_blocks", "attn_resolutions")
    architecture = ",".join(f"{key}:{json.dumps(source[key])}" for key in unet)
    random_weights = [
        "init.path=null",
        f"init.network={{{architecture}}}",
        f"discriminator.network={TEACHER}",
        "freeze.level=0",
    ]
    fast = ["engine=fast"]
    return {
        "d2o_f": [],
        "fast": fast,
        "fresh_fakes": [*fast, "share_fakes=false"],
        "bf16": [*fast, "precision=bf16"],
        "fp16": [
            *fast,
            *(f"arithmetic.{part}=fp16" for part in ("generator", "backbones", "heads")),
        ],
        "d2o": ["freeze.level=0"],
        "random_weights": random_weights,
    }


def study(out: Path, names: list[str], overrides: list[str]) -> dict[str, Any]:
    """The rows of all runs of the variants, and mean and standard deviation over the seeds;
    OUT/summary.json."""
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, special in ((name, variants()[name]) for name in names):
        for seed in SEEDS:
            folder = out / f"{name}-{seed}"
            result_file = folder / "result.json"
            if not result_file.exists():
                print(f"{name}, seed {seed}", flush=True)
                print(table(demo(folder, "test", seed, [*special, *overrides])), flush=True)
            runs.setdefault(name, []).append(json.loads(result_file.read_text()))
    first = runs[names[0]][0]
    summary = {
        "rows": {
            **{name: first["rows"][name] for name in ("real", "untuned", "heun")},
            **{name: _over_seeds(results) for name, results in runs.items()},
        },
        "runs": {
            name: [{"seed": r["seeds"][0], **r["rows"]["d2o_f"]} for r in results]
            for name, results in runs.items()
        },
        "heun_steps": first["heun_steps"],
        "n": first["n"],
        "seeds": list(SEEDS),
        "provenance": first["provenance"],
    }
    with replace_atomically(out / "summary.json") as file:
        file.write((json.dumps(summary, indent=2) + "\n").encode())
    return summary


def markdown(summary: dict[str, Any]) -> str:
    """The README's table."""
    names = {
        "real": "real against real",
        "untuned": "EDM model, one step, un-tuned",
        "heun": f"EDM model, Heun {summary['heun_steps']} steps",
        "d2o_f": "D2O-F: convolutions frozen, one step",
        "fast": "D2O-F, `engine=fast`",
        "fresh_fakes": "D2O-F, `engine=fast share_fakes=false`",
        "bf16": "D2O-F, `engine=fast precision=bf16`",
        "fp16": "D2O-F, `engine=fast`, all parts in fp16",
        "d2o": "D2O: all parameters trained, one step",
        "random_weights": "the same GAN from random weights",
    }
    lines = ["| | classifier features | pixel PCA |", "|---|---|---|"]
    for key, name in ((key, name) for key, name in names.items() if key in summary["rows"]):
        cells = [_cell(summary["rows"][key][space]) for space in SPACES]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def _over_seeds(results: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    over = {space: [r["rows"]["d2o_f"][space] for r in results] for space in SPACES}
    return {
        space: {"mean": statistics.mean(values), "stdev": statistics.stdev(values)}
        for space, values in over.items()
    }


def _cell(value: float | dict[str, float]) -> str:
    if isinstance(value, dict):
        return f"{value['mean']:.2f} +- {value['stdev']:.2f}"
    return f"{value:.2f}"


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/demo-study"))
    parser.add_argument("overrides", nargs="*", help="key=value of experiment=demo")
    parser.add_argument("--only", nargs="+", choices=list(variants()), default=USUAL)
    args = parser.parse_args()
    print(markdown(study(args.out, args.only, args.overrides)))


if __name__ == "__main__":
    run_command(main)
