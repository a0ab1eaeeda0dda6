"""How the Hydra commands start and end: schemas, one-line errors, exit codes."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastgan.errors import UserError, fail
from fastgan.training.loop import Diverged

DIVERGED = 3


def config_folder() -> Path:
    """configs/: beside the package in a wheel, at the repository's root in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def packaged_file(name: str) -> str:
    """`${package:assets/...}` in a configuration: a file that ships inside the package."""
    return str(Path(__file__).parent / name)


def register(name: str, schema: type) -> None:
    """Makes `schema` the type of configs/<name>.yaml (listed there as `<name>_schema`)."""
    OmegaConf.register_new_resolver("package", packaged_file, replace=True)
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def hydra_command(name: str, schema: type, run: Callable[[Any], None]) -> NoReturn:
    """Composes configs/<name>.yaml with the command line, and runs `run(config)`."""
    register(name, schema)
    # Hydra then raises instead of printing several lines; what it raises becomes one line below.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)
    def command(config: DictConfig) -> None:
        # Caught here and told below: Hydra would print the overrides above a passing exception.
        try:
            run(typed(config))
        except (UserError, Diverged, KeyboardInterrupt) as error:
            ended_by.append(error)

    ended_by: list[BaseException] = []
    try:
        command()
    except (HydraException, OmegaConfBaseException) as error:
        fail(cause(error))
    raise SystemExit(exit_status(ended_by[0]) if ended_by else 0)


def exit_status(error: BaseException) -> int:
    """Says in one line what ended a command; 1, or 3 for a diverged run."""
    if isinstance(error, KeyboardInterrupt):
        fail("interrupted, the same command resumes from the latest checkpoint")
    print(f"error: {error}", file=sys.stderr)
    return DIVERGED if isinstance(error, Diverged) else 1


def compose(name: str, schema: type, overrides: list[str]) -> Any:
    """The configuration that `python -m fastgan.<name> OVERRIDES` would run with."""
    register(name, schema)
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            return typed(hydra.compose(name, overrides))
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(cause(error)) from error


def typed(config: DictConfig) -> Any:
    """The configuration as its dataclass; UserError naming a key that has no value."""
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(
            f"no value for {', '.join(missing)}, KEY=VALUE on the command line expected"
        )
    return OmegaConf.to_object(config)


def cause(error: BaseException) -> str:
    """The root of a chain of Hydra's and OmegaConf's exceptions, in one line with its key."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # Hydra says where in the first line and what in the second; OmegaConf all in the first.
    shown = 2 if isinstance(error, HydraException) else 1
    message = " ".join(lines[:shown]) or type(error).__name__
    key = getattr(error, "full_key", None)
    if key and key not in message:
        message = f"{message}, key {key}"
    return f"{message}, --help lists the keys and their values"
