"""Where the time of a training step goes: a Chrome trace, a table by phase and kind, img/s, MFU.

Random weights and noise as data, nothing to download. See docs/profiling.md.
"""

from pathlib import Path

import torch

from fastgan.common.errors import ArgumentParser, UserError, run_command
from fastgan.launch import checks
from fastgan.performance.live_step import measured_config, tiny_overrides
from fastgan.performance.profile import profile_step, table


def main() -> None:
    options = _parser().parse_intermixed_args()
    experiment, overrides = _experiment(options.overrides)
    if options.tiny:
        small = tiny_overrides(experiment)
        overrides = [*small, *([] if torch.cuda.is_available() else ["device=cpu"]), *overrides]
    config = measured_config(experiment, overrides)
    checks.check_train(config)
    out = options.out or Path("runs", "profile", f"{experiment}-{config.engine.value}")
    print(table(profile_step(config, out, options.iterations)))
    print(f"\n{out}: profile.json, and trace.json.gz to open in https://ui.perfetto.dev")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="experiment=NAME, and any key of fastgan.train: engine=compiled, batch=64 ...",
    )
    parser.add_argument(
        "--iterations", type=int, default=10, help="on the clock, without R1 (default: 10)"
    )
    parser.add_argument(
        "--tiny", action="store_true", help="shrunk networks and batch; on the CPU without a GPU"
    )
    parser.add_argument("--out", type=Path, help="folder (default: runs/profile/EXPERIMENT-ENGINE)")
    return parser


def _experiment(overrides: list[str]) -> tuple[str, list[str]]:
    """The experiment's name and the other overrides; UserError where it is not named once."""
    names = [o.removeprefix("experiment=") for o in overrides if o.startswith("experiment=")]
    if len(names) != 1 or not names[0]:
        raise UserError(
            f"{len(names)} experiments named, on the command line, "
            "experiment=cifar10_uncond_d2o_f would be one"
        )
    return names[0], [o for o in overrides if not o.startswith("experiment=")]


if __name__ == "__main__":
    run_command(main)
