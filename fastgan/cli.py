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
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from fastgan.errors import UserError, fail
from fastgan.training.loop import Diverged

DIVERGED = 3


def config_folder() -> Path:
    """configs/: beside the package in a wheel, at the repository's root in a checkout."""
    packaged = Path(__file__).parent / "configs"
    return packaged if packaged.is_dir() else Path(__file__).parent.parent / "configs"


def register(name: str, schema: type) -> None:
    """Makes `schema` the type of configs/<name>.yaml (listed there as `<name>_schema`)."""
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def hydra_command(name: str, schema: type, run: Callable[[Any], None]) -> NoReturn:
    """Composes configs/<name>.yaml with the command line, and runs `run(config)`."""
    register(name, schema)
    # Hydra then raises instead of printing several lines; what it raises becomes one line below.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)
    def command(config: DictConfig) -> None:
        run(typed(config))

    try:
        command()
    except UserError as error:
        fail(str(error))
    except Diverged as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(DIVERGED) from error
    except (HydraException, OmegaConfBaseException) as error:
        fail(cause(error))
    except KeyboardInterrupt:
        fail("interrupted, the same command resumes from the latest checkpoint")
    raise SystemExit(0)


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
    if isinstance(error, MissingMandatoryValue):
        return f"no value for a mandatory key: {lines[0]}"
    key = getattr(error, "full_key", None)
    message = lines[0] if lines else type(error).__name__
    if key and key not in message:
        message = f"{message}, key {key}"
    return f"{message}, --help lists the keys and their values"
