"""python -m fastgan.train experiment=NAME key=value ...: the GAN fine-tune."""

from fastgan import config as cfg
from fastgan.launch import build, checks
from fastgan.launch.cli import hydra_command
from fastgan.launch.engine import make_step
from fastgan.launch.run import millions, run, start
from fastgan.models.freeze import frozen_share
from fastgan.performance.machines import full_speed


def train(config: cfg.TrainConfig) -> None:
    """Fine-tunes the network of `init.path` against a discriminator, into a run directory."""
    checks.check_train(config)
    world = start(config)
    data = build.dataset(config.data)
    model = build.generator(config, data)
    network = model.network
    discriminator = build.discriminator(config, network, data)
    build.prepare_generator(config, network)
    frozen = 100 * frozen_share(network, config.freeze.level)
    run(
        config,
        world,
        data,
        model,
        make_step,
        [network, discriminator],
        plan=[
            f"generator: {millions(network)} parameters, {frozen:.2f}% frozen",
            f"discriminator: {millions(discriminator.heads)} trained parameters",
        ],
        trained_by="fastgan.train",
        full_speed=full_speed(config, model.architecture, world),
    )


if __name__ == "__main__":
    hydra_command("train", cfg.TrainConfig, train)
