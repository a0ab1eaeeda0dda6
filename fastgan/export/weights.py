"""The network file that is handed on: the weights in one dtype, origin and licence kept."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgan.checkpoint.network_file import NetworkFile, load_network_file, save_network
from fastgan.errors import UserError, shown

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MIB = 1 << 20


def write_rounded(
    source: NetworkFile, network: nn.Module, path: Path, dtype: str, licence: str | None = None
) -> NetworkFile:
    """Writes `source` with the parameters of `network`, which was read from it, in `dtype`.

    `licence` is for a source that names none.

    Buffers, which are few, stay as they are: Fourier frequencies of a hundred radians would lose
    whole turns. Provenance gains `exported`, a list of {file, sha256, dtype}: what the file was
    made from, the last one last. UserError: a weight that overflows, a file that cannot be written.
    """
    parameters = {name for name, _ in network.named_parameters()}
    state = {
        name: _rounded(name, tensor, dtype, source.path) if name in parameters else tensor
        for name, tensor in source.state.items()
    }
    kind = source.metadata["kind"]
    provenance = _provenance(source, dtype)
    if licence is not None:
        provenance["license"] = licence
    save_network(path, source.config, state, kind=kind, nimg=source.nimg, provenance=provenance)
    return load_network_file(path)


def require_size(file: NetworkFile, parameters: int, dtype: str, max_mib: float | None) -> None:
    """UserError where the file is larger than `max_mib`, naming the dtype that would fit."""
    size = file.path.stat().st_size
    if max_mib is None or size <= max_mib * _MIB:
        return
    without = size - parameters * DTYPES[dtype].itemsize
    sizes = {name: without + parameters * each.itemsize for name, each in DTYPES.items()}
    fitting = [name for name, each in sizes.items() if each <= max_mib * _MIB]
    right = f"--dtype {' or '.join(fitting)}" if fitting else f"--max-mib {_above(sizes)}"
    raise UserError(
        f"{size / _MIB:.1f} MiB in {dtype}, {file.path.name}, more than --max-mib {max_mib:g}: "
        f"{right} would be right"
    )


def _above(sizes: dict[str, int]) -> str:
    """The smallest of the sizes in whole MiB, rounded up, with its dtype."""
    best = min(sizes, key=lambda name: sizes[name])
    return f"{-(-sizes[best] // _MIB)} with --dtype {best}"


def _rounded(name: str, tensor: Tensor, dtype: str, path: Path) -> Tensor:
    rounded = tensor.to(DTYPES[dtype])
    if not rounded.isfinite().all():
        raise UserError(
            f"{shown(name)} has values beyond {dtype}, {path}, --dtype bf16 or fp32 would be right"
        )
    return rounded


def _provenance(source: NetworkFile, dtype: str) -> dict[str, Any]:
    """The source's, with what its metadata say of base and licence, and where this comes from."""
    said = {
        key: source.metadata[key]
        for key in ("base_model", "base_sha256", "license")
        if source.metadata.get(key)
    }
    before = source.provenance.get("exported")
    made_from = {"file": source.path.name, "sha256": source.sha256, "dtype": dtype}
    exported = [*(before if isinstance(before, list) else []), made_from]
    return {**source.provenance, **said, "exported": exported}
