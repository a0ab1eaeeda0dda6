"""What a fine-tune costs on A100, H100 and H200: floor, expected speed, hours. Computed from the
networks' own counts, not measured. See docs/budget.md."""

import json
from pathlib import Path

from fastgan.common.errors import ArgumentParser, run_command
from fastgan.models.build import PUBLISHED_NETWORKS


def main() -> int:
    options = _parser().parse_args()
    # Imported here: PyTorch takes seconds that help and mistakes need not wait.
    from fastgan.performance.budget import budgets, report, save_plot

    experiments = options.experiment or [f"{name}_d2o_f" for name in PUBLISHED_NETWORKS]
    rows = [row for name in experiments for row in budgets(name, options.set)]
    if options.plot is not None:
        save_plot(rows, options.plot)
    print(json.dumps(rows, indent=1) if options.json else report(rows))
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="a JSON list instead of the table")
    parser.add_argument(
        "--experiment",
        nargs="+",
        metavar="NAME",
        help="of configs/experiment/ (default: the five published data sets, d2o_f)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="of every experiment's configuration: precision=published (the budget's default is "
        "bf16), share_fakes=true, batch=512 ...",
    )
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="hours against GPUs")
    return parser


if __name__ == "__main__":
    run_command(main)
