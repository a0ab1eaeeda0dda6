"""python -m fastgan.pretrain experiment=NAME key=value ...: an EDM model from random weights."""

from fastgan import config as cfg
from fastgan.launch import build, checks
from fastgan.launch.cli import hydra_command
from fastgan.launch.engine import make_edm_step
from fastgan.launch.run import millions, run, start


def pretrain(config: cfg.PretrainConfig) -> None:
    """Trains a denoiser with EDM's loss, into a run directory."""
    checks.check_pretrain(config)
    world = start(config)
    data = build.dataset(config.data)
    model = build.fresh_network(config, data)
    run(
        config,
        world,
        data,
        model,
        make_edm_step,
        [model.network],
        plan=[f"network: {millions(model.network)} parameters"],
        trained_by="fastgan.pretrain",
    )


if __name__ == "__main__":
    hydra_command("pretrain", cfg.PretrainConfig, pretrain)
