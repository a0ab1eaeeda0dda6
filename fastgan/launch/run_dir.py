"""The run directory: made once, by rank 0, and taken up again by the same command."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from fastgan.checkpoint.store import resumable
from fastgan.common import distributed
from fastgan.common.errors import UserError, shown
from fastgan.common.files import PART, replace_atomically
from fastgan.config import RunConfig
from fastgan.launch.checks import AUTO

CONFIG = "config.yaml"
# What may differ when a run is taken up again: how long, how often, where and how fast, how it is
# looked at.
_FREE = {"run_dir", "total_images", "tick", "snapshot", "keep", "dry_run", "eval"}
_FREE |= {"device", "engine", "compile", "fast", "timeout"}
_FREE_INSIDE = {"data": ("resident", "workers"), "generator": ("checkpoint",)}
# Ours has three kilobytes, no aliases (a few of which can stand for gigabytes) and four levels.
_MOST_BYTES = 32 * 1024
_MOST_LEVELS = 20


def open_run_dir(config: RunConfig) -> Path:
    """The run's folder with its config.yaml; every process gets the same answer.

    batch_gpu=auto becomes what it was when the run that is taken up again was begun: it decides
    the heads' BatchNorm. UserError where the folder holds a run with other settings, or cannot be
    written.
    """
    problem = _prepare(config) if distributed.is_main() else None
    problem, config.batch_gpu = distributed.broadcast_object((problem, config.batch_gpu))
    if problem:
        raise UserError(problem)
    return Path(config.run_dir)


def _prepare(config: RunConfig) -> str | None:
    """Makes or takes up the folder; what is wrong with it, for all processes to say."""
    folder = Path(config.run_dir)
    try:
        if (folder / CONFIG).exists():
            _check_same(folder, config)
        elif folder.exists() and any(path.suffix != PART for path in folder.iterdir()):
            return f"run_dir={folder} holds other files, an empty or new folder would be right"
        # First of all: a folder with anything else in it and no config.yaml is somebody else's.
        write_config(config)
        (folder / "samples").mkdir(exist_ok=True)
        (folder / "checkpoints").mkdir(exist_ok=True)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"run_dir={folder}: {error.strerror}, a writable folder would be right"
    return None


def write_config(config: RunConfig) -> None:
    """Replaces the config.yaml of the run by this configuration."""
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    with replace_atomically(Path(config.run_dir) / CONFIG) as file:
        file.write(text.encode())


def _check_same(folder: Path, config: RunConfig) -> None:
    saved, free = read_config(folder / CONFIG), _FREE
    if not resumable(folder / "checkpoints"):
        # Nothing was trained with it that is still there: it may just have been too large.
        free = _FREE | {"batch_gpu"}
    elif config.batch_gpu == AUTO and isinstance(saved.get("batch_gpu"), int | None):
        config.batch_gpu = saved["batch_gpu"]
    ours: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
        OmegaConf.structured(config), enum_to_str=True
    )
    for group, keys in _FREE_INSIDE.items():
        for settings in (saved.get(group), ours.get(group)):
            if isinstance(settings, dict):
                for key in keys:
                    settings.pop(key, None)
    for key in (f.name for f in fields(config)):
        if key not in free and saved.get(key) != ours[key]:
            raise UserError(
                f"run_dir={folder} holds a run with {_difference(key, saved.get(key), ours[key])}, "
                "another run_dir or the same settings would be right"
            )


def read_config(path: Path) -> dict[str, Any]:
    """The settings in a config.yaml: plain values, in which nothing is resolved."""
    try:
        if not path.is_file():  # a pipe would keep us waiting
            raise ValueError("no file")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"more than {_MOST_BYTES} bytes")
        _check_structure(content.decode())
        saved = yaml.safe_load(content.decode())
        if not isinstance(saved, dict):
            raise ValueError("no settings")
        json.dumps(saved, default=str)  # fails for numbers too long to be shown in a message
    except Exception as error:
        # PyYAML raises nearly anything on broken bytes, and its own errors run over several lines.
        raise UserError(f"{path} is damaged ({shown(error)}), another run_dir would do") from error
    return saved


def _check_structure(text: str) -> None:
    """ValueError for aliases and deep nesting, before anything is built from them."""
    levels = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        levels += isinstance(event, yaml.CollectionStartEvent)
        levels -= isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or levels > _MOST_LEVELS:
            raise ValueError("aliases or many levels")


def _difference(key: str, saved: Any, ours: Any) -> str:
    """`key=saved (not ours)` at the first place where two configurations differ."""
    if isinstance(saved, dict) and isinstance(ours, dict):
        for name in sorted(saved.keys() | ours.keys(), key=str):
            if saved.get(name) != ours.get(name):
                return _difference(f"{key}.{shown(str(name))}", saved.get(name), ours.get(name))
    return f"{key}={shown(str(saved), 200)} (not {shown(str(ours), 200)})"
