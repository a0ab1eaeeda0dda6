"""The project's network files: safetensors with the architecture and the origin as metadata.

The metadata (text to text) are: format "fastgan-network", version "1", kind (generator, ema,
discriminator), config (JSON, what the network is built from), nimg (training images seen),
label_dim, sigma_init (the noise level of one-step generation), base_model and base_sha256 (the file
that training started from, empty if from random weights), license, provenance (JSON).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fastgan.checkpoint.edm_records import what_is_right
from fastgan.common.errors import UserError, shown
from fastgan.common.files import file_sha256, parse_object, replacement, require_file, sync
from fastgan.models import SIGMA_INIT, Precond, network_from_config

FORMAT, VERSION = "fastgan-network", "1"
MAX_FILE_BYTES = 16 << 30
_MAX_JSON = 1 << 20  # characters of one metadata entry
_EXPECTED = "a network file of this project expected"


@dataclass(frozen=True)
class NetworkFile:
    """A network file's content.

    Attributes:
        path: where it lies.
        config: architecture, what `fastgan.models.network_from_config` takes for a generator.
        state: tensors by name, on the CPU, dtypes as stored.
        metadata: the file's metadata as they stand.
        provenance: the origin, decoded from the metadata.
        sha256: of the whole file, in hexadecimal.
    """

    path: Path
    config: dict[str, Any]
    state: dict[str, Tensor]
    metadata: dict[str, str]
    provenance: dict[str, Any]
    sha256: str

    @property
    def nimg(self) -> int:
        """Training images seen."""
        return int(self.metadata["nimg"])

    def provenance_of_derived(self) -> dict[str, Any]:
        """Provenance for a network trained from this one: it names this file, keeps the licence."""
        return {
            "base_model": self.path.name,
            "base_sha256": self.sha256,
            "license": self.metadata["license"],
            "base": self.provenance,
        }


def save_network(
    path: str | Path,
    config: Mapping[str, Any],
    state: Mapping[str, Tensor],
    *,
    kind: str,
    nimg: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> None:
    """Writes a network file; `path` holds the old content or the whole new one at any time.

    `state` is written as it is (dtype, names). `provenance` is any JSON object; its entries
    `base_model`, `base_sha256` and `license` are also written as metadata of their own. Raises
    UserError when the file cannot be written.
    """
    assert not any(name.startswith("_orig_mod.") for name in state), "torch.compile's prefix"
    origin = dict(provenance or {})
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "kind": kind,
        "config": json.dumps(dict(config)),
        "nimg": str(nimg),
        "label_dim": str(config.get("label_dim", 0)),
        "sigma_init": f"{SIGMA_INIT:g}",
        "base_model": str(origin.get("base_model", "")),
        "base_sha256": str(origin.get("base_sha256", "")),
        "license": str(origin.get("license", "unspecified")),
        "provenance": json.dumps(origin),
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in state.items()}
    try:
        with replacement(path) as aside:
            save_file(tensors, aside, metadata)
            sync(aside)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write, {path} ({error}), free space expected") from error


def load_network_file(path: str | Path) -> NetworkFile:
    """Reads a network file of at most MAX_FILE_BYTES. Raises UserError for anything else."""
    path = require_file(path, "a network file")
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise UserError(f"over {MAX_FILE_BYTES} bytes, {path}, {_EXPECTED}")
        with safe_open(path, framework="pt") as file:
            metadata = _checked_metadata(file.metadata() or {}, path)
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        sha256 = file_sha256(path)
    except SafetensorError as error:
        raise UserError(f"not a safetensors file, {path} ({error}), {_EXPECTED}") from error
    except OSError as error:
        raise UserError(f"cannot read, {path} ({error}), {_EXPECTED}") from error
    return NetworkFile(
        path=path,
        config=_json_object(metadata, "config", path),
        state=state,
        metadata=metadata,
        provenance=_json_object(metadata, "provenance", path),
        sha256=sha256,
    )


def _checked_metadata(metadata: dict[str, str], path: Path) -> dict[str, str]:
    if metadata.get("format") != FORMAT:
        raise UserError(f"metadata without format={FORMAT}, {path}, {_EXPECTED}")
    if metadata.get("version") != VERSION:
        raise UserError(
            f"version {metadata.get('version', 'missing')[:20]!a} of the format, {path}, "
            f"version {VERSION} expected"
        )
    needed = ("kind", "config", "nimg", "license", "provenance")
    missing = [key for key in needed if key not in metadata]
    if missing:
        raise UserError(f"metadata without {', '.join(missing)}, {path}, {_EXPECTED}")
    nimg = metadata["nimg"]
    if not (nimg.isascii() and nimg.isdigit() and len(nimg) < 19):
        raise UserError(f"metadata nimg={nimg[:20]!a}, {path}, a number of images expected")
    return metadata


def _json_object(metadata: Mapping[str, str], key: str, path: Path) -> dict[str, Any]:
    text = metadata[key]
    try:
        if len(text) > _MAX_JSON:
            raise ValueError(f"more than {_MAX_JSON} characters")
        return parse_object(text)
    except ValueError as error:
        raise UserError(f"metadata {key} ({error}), {path}, {_EXPECTED}") from error


def network_from_file(path: str | Path) -> Precond:
    """The float32 network of a generator or ema file, on the CPU, in training mode.

    Raises UserError when the file is none, or its tensors do not fit its architecture.
    """
    file = load_network_file(path)
    network = require_fit(file.config, file.state, str(path))
    network.load_state_dict({k: v.float() for k, v in file.state.items()}, assign=True)
    return network


def require_fit(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> Precond:
    """The network of `config` on the meta device, after holding its names and shapes to `state`.

    Raises UserError that names the first few differences; `where` names the file.
    """
    _check_arguments(config, state, where)
    try:
        with torch.device("meta"):
            network = network_from_config(config)
    except UserError as error:
        raise UserError(f"{shown(error, 400)}, {where}") from error
    except Exception as error:
        # An inconsistent config of a stranger's file fails anywhere in the constructors.
        raise UserError(
            f"no network can be built, {where} ({type(error).__name__}: {shown(error)}), "
            "constructor arguments that fit each other expected"
        ) from error
    expected = {name: tuple(t.shape) for name, t in network.state_dict().items()}
    found = {name: tuple(t.shape) for name, t in state.items()}
    names = [*expected, *sorted(found.keys() - expected.keys())]
    differences = [
        f"{shown(name)}: {shown(str(found.get(name, 'missing')))}, "
        f"architecture: {expected.get(name, 'none')}"
        for name in names
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise UserError(
            f"{len(differences)} tensors do not fit the architecture, {where} "
            f"({'; '.join(differences[:3])}), tensors of the file's own architecture expected"
        )
    return network


def _check_arguments(config: Mapping[str, Any], state: Mapping[str, Tensor], where: str) -> None:
    """UserError for values and a number of blocks that would take for ever to build."""
    for name, value in config.items():
        right = what_is_right(name, value)
        if right is not None:
            raise UserError(f"{shown(name)}={shown(value)} in the network config, {where}, {right}")
    blocks = config.get("num_blocks", 1) * len(config.get("channel_mult", ()))
    if blocks > len(state):
        raise UserError(f"{blocks} blocks for {len(state)} tensors, {where}, fewer expected")
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            raise UserError(
                f"{tensor.dtype} tensor {shown(name)}, {where}, floating point expected"
            )
