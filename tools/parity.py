"""Holds a file of arrays computed by the original implementations against this one.

Four layouts (tests/golden/README.md tells their keys): a preconditioned network, one UNet block, a
Heun sampler run, and the discriminator's random projection and heads.
"""

import json
import re
import zipfile
from collections.abc import Mapping
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.common.errors import ArgumentParser, UserError, run_command, shown
from fastgan.common.files import require_file
from fastgan.common.noise import seeded
from fastgan.discriminator.heads import FINAL_SIZE, ConditionalPatchHead, PatchHead
from fastgan.discriminator.projected import RandomProjection
from fastgan.models import Precond, network_from_config
from fastgan.models.sampling import heun
from fastgan.models.unet_block import UNetBlock

OUTPUT, GRADIENT = "output", "gradient"
TOLERANCES = {OUTPUT: 1e-5, GRADIENT: 1e-4}
FLOAT64_TOLERANCE = 1e-9
# Below this a reference is rounding noise, and the difference is judged absolutely.
NEGLIGIBLE = 1e-6
_MAX_BYTES = 1 << 30

Arrays = Mapping[str, np.ndarray]
Tensors = dict[str, Tensor]
# Ours, the original's, and OUTPUT or GRADIENT, by the key of the original's array.
Compared = dict[str, tuple[Tensor, Tensor, str]]


def check_file(path: str | Path) -> dict[str, Any]:
    """One file's verdict: {"file", "layout", "errors", "max_output", "max_gradient", "ok"}.

    An error is max |a - b| / max |b|, or max |a - b| / 1e-6 x tolerance where max |b| < 1e-6. NaN
    fails. Raises UserError for a file of no known layout, or whose arrays do not fit together.
    """
    file = require_file(path, "an .npz of golden arrays")
    layout, compared = compare(load_arrays(file), file)
    errors: dict[str, float | None] = {}
    found: dict[str, list[float]] = {OUTPUT: [], GRADIENT: []}
    ok = bool(compared)
    for key, (ours, golden, kind) in compared.items():
        # A sampler's state is float64 but its network float32, whose error it carries.
        float64 = golden.dtype == torch.float64 and layout != "sampler"
        tolerance = FLOAT64_TOLERANCE if float64 else TOLERANCES[kind]
        error = _error(ours, golden, tolerance)
        ok &= error <= tolerance
        errors[key] = error if isfinite(error) else None
        found[kind].append(error)
    finite = {kind: errors if all(map(isfinite, errors)) else [] for kind, errors in found.items()}
    return {
        "file": str(path),
        "layout": layout,
        "errors": errors,
        "max_output": max(finite[OUTPUT], default=None),
        "max_gradient": max(finite[GRADIENT], default=None),
        "ok": ok,
    }


def load_arrays(file: Path) -> dict[str, np.ndarray]:
    """All arrays of an .npz, nothing unpickled; UserError if it is none or unreasonably large."""
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MAX_BYTES:
            raise ValueError(f"{size} bytes unpacked, more than {_MAX_BYTES}")
        with np.load(file, allow_pickle=False) as content:
            return {name: content[name] for name in content.files}
    except Exception as error:  # zipfile, zlib and numpy raise nearly anything on broken bytes
        raise UserError(
            f"cannot read {file} ({shown(error)}), an .npz of plain arrays expected"
        ) from error


def network_of(arrays: Arrays) -> Precond:
    """The network that `config` and `state/*` describe, in the dtype of its weights."""
    network = network_from_config(json.loads(str(arrays["config"])))
    state = _below(arrays, "state/")
    network.to(next(t.dtype for t in state.values() if t.is_floating_point()))
    network.load_state_dict(state)
    return network.eval()


def compare(arrays: Arrays, file: Path) -> tuple[str, Compared]:
    """The layout's name and every comparison that the arrays allow."""
    try:
        # The constructors draw weights, which the file's then replace.
        with seeded(0):
            if "network" in arrays:
                return "sampler", _sampler(arrays, file)
            if "proj/in0" in arrays or "disc/x" in arrays:
                projection = _projection(arrays) if "proj/in0" in arrays else {}
                return "discriminator", projection | (_head(arrays) if "disc/x" in arrays else {})
            if "config" in arrays and "emb" in arrays:
                return "block", _block(arrays)
            if "config" in arrays:
                return "network", _network(arrays)
    except UserError:
        raise
    except Exception as error:  # whatever names, shapes and values of a stranger's file provoke
        raise UserError(
            f"the arrays of {file} do not fit together ({' '.join(repr(error).split())[:300]}), "
            "a layout of tests/golden/README.md expected"
        ) from error
    raise UserError(f"{file} has no known layout, one of tests/golden/README.md expected")


def _network(arrays: Arrays) -> Compared:
    network = network_of(arrays)
    compared: Compared = {}
    for case in sorted({key.split("/")[0] for key in arrays if key.endswith("/out")}):
        part = _below(arrays, f"{case}/")
        x = part["x"].requires_grad_()
        network.zero_grad()
        out = network(x, part["sigma"], part.get("labels"))
        found = _differentiated(network, out, {"grad_x": x}, part)
        compared |= {f"{case}/{key}": value for key, value in found.items()}
    return compared


def _block(arrays: Arrays) -> Compared:
    config = json.loads(str(arrays["config"]))
    config.pop("block", None)
    # SongUNet's sqrt(0.5) may have been rounded on its way through JSON.
    if abs(config.get("skip_scale", 1.0) - sqrt(0.5)) < 1e-6:
        config["skip_scale"] = sqrt(0.5)
    state, part = _below(arrays, "state/"), _below(arrays, "")
    block = UNetBlock(**config).to(state["norm0.weight"].dtype).eval()
    block.load_state_dict(state)
    x, emb = part["x"].requires_grad_(), part["emb"].requires_grad_()
    return _differentiated(block, block(x, emb), {"grad_x": x, "grad_emb": emb}, part)


def _differentiated(module: nn.Module, out: Tensor, inputs: Tensors, part: Tensors) -> Compared:
    """The output, and the gradients of its inner product with `probe`, by inputs and parameters."""
    (out * part["probe"]).sum().backward()
    named = {k: module.get_parameter(k[5:]) for k in part if k.startswith("grad/")}
    compared: Compared = {"out": (out.detach(), part["out"], OUTPUT)}
    for key, source in (inputs | named).items():
        assert source.grad is not None, f"{key} has no gradient"
        compared[key] = (source.grad, part[key], GRADIENT)
    return compared


def _sampler(arrays: Arrays, file: Path) -> Compared:
    # The name only: a file may not point out of its own folder.
    beside = file.parent / Path(str(arrays["network"])).name
    network = network_of(load_arrays(require_file(beside, "the sampler's network")))
    given = {key: float(arrays[key]) for key in ("sigma_min", "sigma_max", "rho")}
    labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
    latents, steps = torch.from_numpy(arrays["latents"]), int(arrays["num_steps"])
    images = heun(network, latents, labels, steps=steps, **given)
    return {"out": (images, torch.from_numpy(arrays["out"]), OUTPUT)}


def _projection(arrays: Arrays) -> Compared:
    """`proj/in*`, `proj/state/*`, `proj/out*`: the random mixing, of any depth and widths."""
    part, state = _below(arrays, "proj/"), _below(arrays, "proj/state/")
    features = [part[f"in{level}"] for level in range(sum(k.startswith("in") for k in part))]
    widths = [len(state[f"layer{level}_ccm.weight"]) for level in range(len(features))]
    projection = RandomProjection([x.shape[1] for x in features], widths)
    projection.to(features[0].dtype).load_state_dict(state)
    ours = {f"out{level}": x for level, x in enumerate(projection(features))}
    if "channels" in part:
        ours["channels"] = torch.tensor(projection.out_channels)
    return {f"proj/{key}": (value, part[key], OUTPUT) for key, value in ours.items()}


def _head(arrays: Arrays) -> Compared:
    """`disc/*`: one head in train mode, conditional where the state has `cls`.

    One forward gives logits, losses, the state afterwards and R1 = ||d sum(logits) / dx||^2 with
    the gradients of its batch mean.
    """
    part = _below(arrays, "disc/")
    head, x = _head_of(part), part["x"].requires_grad_()
    logits = head(x, part.get("labels"))
    # The state first: it belongs to this one forward.
    outputs = {f"state_after/{k}": v.clone() for k, v in head.state_dict().items()}
    outputs["logits"] = logits.detach()
    outputs["loss_ns_real"] = F.softplus(-logits).mean().detach()
    outputs["loss_ns_fake"] = F.softplus(logits).mean().detach()
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    penalty = slope.square().sum(dim=(1, 2, 3))
    parameters = dict(head.named_parameters())
    slopes = torch.autograd.grad(penalty.mean(), list(parameters.values()), materialize_grads=True)
    gradients = {f"r1_grad/{k}": g for k, g in zip(parameters, slopes, strict=True)}
    gradients["r1_penalty_wrt_x"] = penalty.detach()
    ours = outputs | gradients
    if missing := {k for k in part if k.startswith(("state_after/", "r1"))} - ours.keys():
        raise KeyError(min(missing))
    kinds = dict.fromkeys(outputs, OUTPUT) | dict.fromkeys(gradients, GRADIENT)
    return {f"disc/{k}": (v, part[k], kinds[k]) for k, v in ours.items() if k in part}


def _head_of(part: Tensors) -> nn.Module:
    """A head of the depth and widths that the state shows, with that state."""
    state = {k.removeprefix("state/"): v for k, v in part.items() if k.startswith("state/")}
    depth = sum(bool(re.fullmatch(r"main\.\d+\.main\.0\.weight_orig", k)) for k in state)
    blocks = [state[f"main.{i}.main.0.weight_orig"] for i in range(depth)]
    size = FINAL_SIZE << depth
    widths = {size >> (i + 1): len(weight) for i, weight in enumerate(blocks)}
    last = state["cls.weight_orig" if "cls.weight_orig" in state else f"main.{depth}.weight_orig"]
    channels = (blocks[0] if blocks else last).shape[1]
    head: nn.Module
    if "cls.weight_orig" in state:
        if "embed.weight" not in state:  # the rows of the classes that the key names
            key = min(k for k in part if k.startswith("embed_rows_"))
            classes = [int(c) for c in key.removeprefix("embed_rows_").split("_")]
            state["embed.weight"] = part[key].new_zeros(part["labels"].shape[1], len(part[key][0]))
            state["embed.weight"][classes] = part[key]
        head = ConditionalPatchHead(channels, size, state["embed.weight"], widths, len(last))
    else:
        head = PatchHead(channels, size, widths)
    head.to(part["x"].dtype).load_state_dict(state)
    return head


def _below(arrays: Arrays, prefix: str) -> Tensors:
    """The numbers under a prefix, without it."""
    return {
        key.removeprefix(prefix): torch.from_numpy(np.array(value))
        for key, value in arrays.items()
        if key.startswith(prefix) and value.dtype.kind in "fiub"
    }


def _error(ours: Tensor, golden: Tensor, tolerance: float) -> float:
    if ours.shape != golden.shape:
        return float("inf")
    # NaN anywhere makes these NaN, which no tolerance accepts.
    difference = float((ours.double() - golden.double()).abs().amax()) if ours.numel() else 0.0
    scale = float(golden.double().abs().amax()) if golden.numel() else 0.0
    return difference / NEGLIGIBLE * tolerance if scale < NEGLIGIBLE else difference / scale


def main() -> int:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE.npz")
    verdicts = []
    for file in parser.parse_args().files:
        verdicts.append(check_file(file))
        print(json.dumps(verdicts[-1]), flush=True)
    return 0 if all(verdict["ok"] for verdict in verdicts) else 1


if __name__ == "__main__":
    run_command(main)
