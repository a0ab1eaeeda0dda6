"""Writes pickles the way EDM's persistence does, with source text that runs if it is trusted."""

import json
import pickle
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"
_BUFFERS = ("freqs", "resample_filter")


class EasyDict(dict):
    """Stands for dnnlib's."""


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None:
    """What the original loader does with a file: it runs its source text."""
    exec(meta["module_src"], {})


class Persistent(torch.nn.Module):
    """A module that pickles as a call of the persistence function."""

    source = ""

    def __reduce__(self) -> tuple[object, ...]:
        meta = {
            "type": "class",
            "version": 6,
            "module_src": self.source,
            "class_name": type(self).__name__,
            "state": self.__dict__,
        }
        return _reconstruct_persistent_obj, (meta,)


class Call:
    """Pickles as the call `function(*arguments)`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@contextmanager
def original_modules() -> Iterator[None]:
    """EDM's module names, while a pickle that mentions them is written."""
    persistence, util = types.ModuleType("torch_utils.persistence"), types.ModuleType("dnnlib.util")
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util.EasyDict = EasyDict  # type: ignore[attr-defined]
    names = {"torch_utils.persistence": persistence, "dnnlib.util": util}
    names |= {parent: types.ModuleType(parent) for parent in ("torch_utils", "dnnlib")}
    origins = {_reconstruct_persistent_obj: persistence, EasyDict: util}
    own = {item: item.__module__ for item in origins}
    sys.modules.update(names)
    for item, module in origins.items():
        item.__module__ = module.__name__
    try:
        yield
    finally:
        for item, name in own.items():
            item.__module__ = name
        for name in names:
            del sys.modules[name]


def new_module(class_name: str, source: str = "") -> Persistent:
    return type(class_name, (Persistent,), {"source": source})()


def module_tree(
    config: dict[str, Any], state: dict[str, torch.Tensor], source: str = ""
) -> Persistent:
    """A persistent network that holds `state`, with real torch.nn.ModuleDicts for enc and dec."""
    root = new_module(config["precond"], source)
    for name, tensor in state.items():
        *path, leaf = name.split(".")
        module: torch.nn.Module = root
        for part in path:
            if part not in module._modules:
                is_container = part in ("enc", "dec")
                class_name = config["model_type"] if part == "model" else "Layer"
                child = torch.nn.ModuleDict() if is_container else new_module(class_name, source)
                module.add_module(part, child)
            module = module._modules[part]  # type: ignore[assignment]
        if leaf in _BUFFERS:
            module.register_buffer(leaf, tensor)
        else:
            module.register_parameter(leaf, torch.nn.Parameter(tensor))
    root._init_args = ()  # type: ignore[assignment]
    kwargs = {key: value for key, value in config.items() if key != "precond"}
    root._init_kwargs = EasyDict(kwargs, use_fp16=False, dropout=0.13)  # type: ignore[assignment]
    return root


def golden_network(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Config and state of a golden file, as the original code made them."""
    arrays = np.load(GOLDEN / f"{name}.npz", allow_pickle=False)
    prefix = "state/"
    state = {
        key.removeprefix(prefix): torch.from_numpy(arrays[key])
        for key in arrays.files
        if key.startswith(prefix)
    }
    return json.loads(str(arrays["config"])), state


def write_pickle(path: Path, root: object, protocol: int = 4) -> Path:
    with original_modules(), path.open("wb") as file:
        pickle.dump(root, file, protocol=protocol)
    return path


def edm_root(network: Persistent) -> EasyDict:
    """The top level of EDM's files around the network."""
    return EasyDict(
        ema=network,
        loss_fn=new_module("EDMLoss"),
        augment_pipe=None,
        dataset_kwargs=EasyDict(resolution=16, path="data.zip", seeds={"a", "b"}),
    )
