"""How the Hydra commands start and end: schemas, one-line errors, exit codes."""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import hydra
import torch
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastgan.common import distributed
from fastgan.common.errors import UserError, fail, one_line, shown
from fastgan.training.monitor import DIVERGED, Diverged
from fastgan.training.resume import PREEMPTED, Preempted

_PACKAGE = Path(__file__).parent.parent
# What ends a command without a traceback.
_STOPS = (Diverged, Preempted, KeyboardInterrupt)
_ENDS = (UserError, OmegaConfBaseException, torch.OutOfMemoryError, *_STOPS)
# How lines begin that tell a user nothing.
_TECHNICAL = ("full_key:", "object_type=", "reference_type=", "See https://", "^")


def config_folder() -> Path:
    """configs/: beside the package in a wheel, at the repository's root in a checkout."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def packaged_file(name: str) -> str:
    """`${package:assets/...}` in a configuration: a file that ships inside the package."""
    return str(_PACKAGE / name)


def register(name: str, schema: type) -> None:
    """Makes `schema` the type of configs/<name>.yaml (listed there as `<name>_schema`)."""
    OmegaConf.register_new_resolver("package", packaged_file, replace=True)
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def hydra_command(name: str, schema: type, run: Callable[[Any], None]) -> NoReturn:
    """Composes configs/<name>.yaml with the command line, and runs `run(config)`."""
    register(name, schema)
    # Hydra then raises instead of printing several lines; what it raises becomes one line below.
    os.environ["HYDRA_FULL_ERROR"] = "1"

    started = False

    @hydra.main(version_base="1.3", config_path=str(config_folder()), config_name=name)
    def command(config: DictConfig) -> None:
        nonlocal started
        started = True
        try:
            run(typed(config))
            distributed.shutdown()
        except _ENDS as error:
            # SystemExit passes through Hydra, which prints the overrides above anything else.
            raise SystemExit(exit_status(error)) from None

    try:
        _check_flags()
        command()
    except Exception as error:
        # Composing strange settings fails with nearly anything; what fails later is our defect.
        if started:
            raise
        fail(cause(error))
    raise SystemExit(0)


def exit_status(error: BaseException) -> int:
    """Says in one line what ended a command; 1, 3 for a diverged run, 75 for a stopped one."""
    if isinstance(error, Preempted):
        distributed.shutdown()
        print(error, file=sys.stderr)
        return PREEMPTED
    if isinstance(error, KeyboardInterrupt):
        fail("interrupted, the same command resumes from the latest checkpoint")
    message = cause(error) if isinstance(error, OmegaConfBaseException) else error
    if isinstance(error, torch.OutOfMemoryError):
        message = "out of memory, on the GPU, a smaller batch would be right"
    print(f"error: {one_line(str(message))}", file=sys.stderr)
    return DIVERGED if isinstance(error, Diverged) else 1


def compose(name: str, schema: type, overrides: list[str]) -> Any:
    """The configuration that `python -m fastgan.<name> OVERRIDES` would run with."""
    register(name, schema)
    with hydra.initialize_config_dir(str(config_folder()), version_base="1.3"):
        try:
            return typed(hydra.compose(name, overrides))
        except UserError:
            raise
        except Exception as error:  # as in hydra_command
            raise UserError(cause(error)) from error


def typed(config: DictConfig) -> Any:
    """The configuration as its dataclass; UserError naming a key that has no value."""
    _check_keys(config)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(
            f"no value for {', '.join(missing)}, KEY=VALUE on the command line expected"
        )
    found = OmegaConf.to_object(config)
    _check_types(found)
    return found


def _check_flags() -> None:
    """Refuses a flag that Hydra does not know, before Hydra answers it with several lines."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        _, unknown = parser.parse_known_args()
    except argparse.ArgumentError as error:
        fail(f"{error}, --help lists the keys and their values")
    if unknown:
        fail(f"cannot read {' '.join(unknown)}, KEY=VALUE ... and then flags of --help expected")


def _check_keys(config: DictConfig, prefix: str = "") -> None:
    """UserError naming a key that `+key=value` added to the schema or `~key` took out of it."""
    schema = OmegaConf.get_type(config)
    assert schema is not None
    expected = {f.name for f in fields(schema)}
    for key in sorted(expected ^ {str(key) for key in config.keys()}):  # noqa: SIM118
        wrong = "is needed" if key in expected else "is no key of this command"
        raise UserError(f"{prefix}{key} {wrong}, --help lists the keys and their values")
    for key in expected:
        if is_dataclass(OmegaConf.get_type(config, key)):
            _check_keys(config[key], f"{prefix}{key}.")


def _check_types(config: Any, prefix: str = "") -> None:
    """UserError naming a group of keys that an interpolation has replaced by another one."""
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(field.type) and type(value) is not field.type:
            raise UserError(f"{prefix}{field.name} is another group, its own keys expected")
        if is_dataclass(value):
            _check_types(value, f"{prefix}{field.name}.")


def cause(error: BaseException) -> str:
    """The root of a chain of Hydra's and OmegaConf's exceptions, in one line with its key."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, MissingConfigException) and error.options:
        return f"{lines[0]}, one of {', '.join(error.options)} expected"
    # OmegaConf says what in the first line; Hydra where, then what, then what would be right.
    count = len(lines) if isinstance(error, HydraException) else 1
    told = [line for line in lines[:count] if not line.startswith(_TECHNICAL)]
    message = shown(" ".join(told), 400) or type(error).__name__
    key = getattr(error, "full_key", None)
    if key and key not in message:
        message = f"{message}, key {key}"
    if "not in struct" in message:
        return f"{message}, +{key}=VALUE would add it"
    return f"{message}, --help lists the keys and their values"
