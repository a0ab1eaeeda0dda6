"""Networks out of EDM's pickled checkpoints, without running anything that lies in them.

EDM stores an object as a call of its persistence function with the object's source text and its
`__dict__`; loading it the original way executes that text. Here the file is read as data
(fastgan.checkpoint.inert_pickle); tensors and constructor arguments are picked out of the records,
and the architecture is ours.
"""

import hashlib
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from torch import Tensor

from fastgan.checkpoint.edm_records import (
    NN_MODULES,
    PERSISTENT,
    architecture,
    module_content,
    read_tensors,
)
from fastgan.checkpoint.inert_pickle import InertUnpickler, RefusedGlobal
from fastgan.checkpoint.network_file import require_fit, save_network
from fastgan.common.errors import UserError, shown
from fastgan.common.files import file_sha256

MAX_FILE_BYTES = 8 << 30  # the largest published checkpoint has 1.2 GB, with `net` and `ema` 2.4
LICENSE = "CC-BY-NC-SA-4.0"  # of EDM's weights, and so of what is derived from them

_PRECONDS = {"EDMPrecond": "EDMPrecond", "D2OPrecond": "D2OPrecond", "GDDPrecond": "D2OPrecond"}
_DICTS = frozenset({"collections.OrderedDict", "dnnlib.util.EasyDict"})
_ALLOWED = _DICTS | {
    PERSISTENT,
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.storage._load_from_bytes",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "_codecs.encode",
    "builtins.set",  # how protocols 2 and 3 spell a set
    "__builtin__.set",
}
_EXPECTED = "an EDM, D2O or GDD checkpoint expected (EDM2 is not supported)"


Network = tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]  # config, state, provenance


def read_edm_pickle(path: str | Path, network: str = "ema") -> Network:
    """Reads the network under the key `network` ("ema" or "net") of an EDM, D2O or GDD pickle.

    Returns what `fastgan.models.network_from_config` takes, the parameters and persistent buffers
    under their published names, and the provenance for a network file: also the class (EDMPrecond,
    D2OPrecond, GDDPrecond), the file's layout ("edm" {ema, loss_fn, ...} or "d2o" {net, ema, ...})
    and the constructor arguments of the source that nothing here corresponds to.

    Tensors come out bit-identical on the CPU. Their names and shapes are held against the
    architecture that the file's own constructor arguments describe. The file has at most
    MAX_FILE_BYTES, and its tensors have no more bytes than it. Raises UserError; for a file that
    mentions a global outside the format, with that name.
    """
    path = Path(path)
    with _mapped(path) as file:
        try:
            return _read_network(file, _load_root(file, path), network, path)
        except UserError:
            raise
        except Exception as error:
            # Decoding a damaged or hostile file fails anywhere and anyhow; the answer is the same.
            reason = f"{type(error).__name__} {shown(error)}".strip()
            raise UserError(f"damaged checkpoint, {path} ({reason}), {_EXPECTED}") from error


def import_edm(
    source: Path, destination: Path, network: str = "ema", force: bool = False
) -> dict[str, Any]:
    """Writes a network of the pickle `source` as the network file `destination`; says what it did.

    Raises UserError before anything is read if `destination` exists and `force` is not given.
    """
    if destination.resolve() == source.resolve():
        raise UserError(f"source and destination are one file, {source}, two paths expected")
    if destination.exists() and not force:
        raise UserError(f"file exists, {destination}, another path or --force expected")
    config, state, provenance = read_edm_pickle(source, network)
    kind = "ema" if network == "ema" else "generator"
    save_network(destination, config, state, kind=kind, provenance=provenance)
    return {
        **provenance,
        "tensors": len(state),
        "values": sum(tensor.numel() for tensor in state.values()),
        "destination": str(destination),
        "sha256": file_sha256(destination),
    }


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file's bytes; reads from a map never allocate more than is there."""
    try:
        if not path.is_file():
            raise UserError(f"no such file, {path}, {_EXPECTED}")
        size = path.stat().st_size
        if size > MAX_FILE_BYTES:
            raise UserError(f"{size} bytes, {path}, at most {MAX_FILE_BYTES} are read")
        with path.open("rb") as file:
            if file.read(1) != b"\x80":
                raise UserError(f"not a pickle of protocol 2 or newer, {path}, {_EXPECTED}")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
                yield mapped
    except OSError as error:
        raise UserError(f"cannot read, {path} ({error.strerror}), {_EXPECTED}") from error


def _load_root(file: mmap.mmap, path: Path) -> dict[str, object]:
    """The outermost dict of the file."""
    try:
        root = InertUnpickler(cast(BinaryIO, file), _is_allowed, _DICTS).load()
    except RefusedGlobal as error:
        raise UserError(
            f"the file names the global {shown(error)}, {path}, which is refused: {_EXPECTED}"
        ) from error
    if not isinstance(root, dict) or not all(isinstance(key, str) for key in root):
        raise UserError(f"no named networks at the top level, {path}, {_EXPECTED}")
    if file.tell() != len(file):
        raise UserError(
            f"{len(file) - file.tell()} bytes after the pickle's end, {path}, a whole file expected"
        )
    return root


def _is_allowed(name: str) -> bool:
    return name in _ALLOWED or name.startswith(NN_MODULES)


def _read_network(file: mmap.mmap, root: dict[str, object], network: str, path: Path) -> Network:
    """The chosen network of the outermost dict `root` of `file`."""
    precond = root.get(network)
    if precond is None:
        held = ", ".join(shown(key) for key in list(root)[:8]) or "nothing"
        raise UserError(f"no network {network!r}, {path} (it holds {held}), ema or net expected")
    class_name, content = module_content(precond)
    if class_name not in _PRECONDS:
        raise UserError(
            f"{network!r} is of class {shown(class_name)}, {path}, "
            f"one of {', '.join(_PRECONDS)} expected (EDM2 is not supported)"
        )
    config, unused = architecture(_PRECONDS[class_name], content, str(path))
    state = read_tensors(precond, max_bytes=len(file), where=str(path))
    require_fit(config, state, str(path))
    provenance = {
        "base_model": path.stem,
        "base_sha256": hashlib.sha256(file).hexdigest(),
        "license": LICENSE,
        "source_class": class_name,
        "source_format": "d2o" if "net" in root else "edm",
        "source_network": network,
        "unused_arguments": unused,
    }
    return config, state, provenance
