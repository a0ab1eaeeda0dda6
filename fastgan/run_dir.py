"""The run directory: made once, by rank 0, and taken up again by the same command."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fastgan import distributed
from fastgan.config import RunConfig
from fastgan.errors import UserError
from fastgan.files import replace_atomically

CONFIG = "config.yaml"
# What may differ when a run is taken up again: how long, how often, where and how fast, how it is
# looked at.
_FREE = {"run_dir", "total_images", "tick", "snapshot", "keep", "dry_run", "eval"}
_FREE |= {"device", "engine", "compile"}


def open_run_dir(config: RunConfig) -> Path:
    """The run's folder with its config.yaml; every process gets the same answer.

    UserError where the folder holds a run with other settings, or cannot be written.
    """
    problem = ""
    if distributed.is_main():
        try:
            _prepare(config)
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = (
                f"run_dir={config.run_dir}: {error.strerror}, a writable folder would be right"
            )
    problem = distributed.broadcast_object(problem)
    if problem:
        raise UserError(problem)
    return Path(config.run_dir)


def _prepare(config: RunConfig) -> None:
    folder = Path(config.run_dir)
    text = OmegaConf.to_yaml(OmegaConf.structured(config))
    if (folder / CONFIG).exists():
        _check_same(folder, config)
    elif folder.exists() and any(folder.iterdir()):
        raise UserError(
            f"run_dir={folder} holds other files, an empty or new folder would be right"
        )
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    with replace_atomically(folder / CONFIG) as file:
        file.write(text.encode())


def _check_same(folder: Path, config: RunConfig) -> None:
    try:
        saved = OmegaConf.to_container(OmegaConf.load(folder / CONFIG))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"{folder / CONFIG} is damaged, another run_dir would do") from error
    ours: dict[str, Any] = OmegaConf.to_container(  # type: ignore[assignment]
        OmegaConf.structured(config), enum_to_str=True
    )
    for key in (f.name for f in fields(config)):
        if key in _FREE or not isinstance(saved, dict):
            continue
        if saved.get(key) != ours[key]:
            raise UserError(
                f"run_dir={folder} holds a run with {_difference(key, saved.get(key), ours[key])}, "
                "another run_dir or the same settings would be right"
            )


def _difference(key: str, saved: Any, ours: Any) -> str:
    """`key=saved (not ours)` at the first place where two configurations differ."""
    if isinstance(saved, dict) and isinstance(ours, dict):
        for name in sorted(saved.keys() | ours.keys(), key=str):
            if saved.get(name) != ours.get(name):
                return _difference(f"{key}.{name}", saved.get(name), ours.get(name))
    return f"{key}={saved} (not {ours})"
