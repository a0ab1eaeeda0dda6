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
from fastgan.models import network_from_config
from fastgan.models.precond import Precond
from fastgan.models.sampling import heun
from fastgan.models.unet_block import UNetBlock

# Ours, the original's, and "output" or "gradient" (they have different tolerances).
Comparison = tuple[Tensor, Tensor, str]


def check_discriminator(arrays: Mapping[str, np.ndarray]) -> dict[str, Comparison]:
    """Every comparison that the arrays allow, by the key of the original's array.

    `proj/in*`, `proj/state/*`, `proj/out*`: the random mixing. `disc/state/*`, `disc/x`,
    `disc/logits` ...: one head in train mode, conditional where the state has `cls`; one forward
    gives logits, losses, the state afterwards and R1 = ||d sum(logits) / dx||^2 with the gradients
    of its batch mean. Shapes and depths are inferred. UserError when an array is missing or odd.
    """
    known = [key for key in arrays if key.startswith(("proj/", "disc/"))]
    found: dict[str, Comparison] = {}
    try:
        tensors = {key: torch.from_numpy(np.array(arrays[key])) for key in known}
        # The constructors draw weights, which the files' then replace.
        with seeded(0):
            if "proj/in0" in tensors:
                found |= _check_projection(tensors)
            if "disc/x" in tensors:
                found |= _check_head(tensors)
    except (KeyError, RuntimeError, StopIteration, TypeError, ValueError) as error:
        raise UserError(
            f"arrays do not describe a discriminator ({error!r}), in the parity file, "
            "proj/* or disc/* as in tests/golden/README.md expected"
        ) from error
    return found


def _check_projection(tensors: Mapping[str, Tensor]) -> dict[str, Comparison]:
    state = _below(tensors, "proj/state/")
    features = list(_below(tensors, "proj/in").values())
    widths = [len(state[f"layer{level}_ccm.weight"]) for level in range(len(features))]
    projection = RandomProjection([x.shape[1] for x in features], widths)
    projection.to(features[0].dtype).load_state_dict(state)
    keys = [f"proj/out{level}" for level in range(len(features))]
    outputs = zip(keys, projection(features), strict=True)
    found: dict[str, Comparison] = {key: (x, tensors[key], "output") for key, x in outputs}
    if "proj/channels" in tensors:
        channels = torch.tensor(projection.out_channels)
        found["proj/channels"] = (channels, tensors["proj/channels"], "output")
    return found


def _check_head(tensors: Mapping[str, Tensor]) -> dict[str, Comparison]:
    head = _build_head(tensors)
    x = tensors["disc/x"].clone().requires_grad_()
    logits = head(x, tensors.get("disc/labels"))
    # The state first: it belongs to this one forward.
    ours = {f"disc/state_after/{k}": v.clone() for k, v in head.state_dict().items()}
    ours["disc/logits"] = logits.detach()
    ours["disc/loss_ns_real"] = F.softplus(-logits).mean().detach()
    ours["disc/loss_ns_fake"] = F.softplus(logits).mean().detach()
    found: dict[str, Comparison] = {
        key: (value, tensors[key], "output") for key, value in ours.items() if key in tensors
    }
    for key, value in _r1(head, logits, x).items():
        if key in tensors:
            found[key] = (value, tensors[key], "gradient")
    missing = {k for k in tensors if k.startswith(("disc/state_after/", "disc/r1"))} - found.keys()
    if missing:
        raise KeyError(min(missing))
    return found


def _r1(head: nn.Module, logits: Tensor, x: Tensor) -> dict[str, Tensor]:
    (slope,) = torch.autograd.grad(logits.sum(), x, create_graph=True)
    penalty = slope.square().sum(dim=(1, 2, 3))
    parameters = dict(head.named_parameters())
    gradients = torch.autograd.grad(
        penalty.mean(), list(parameters.values()), materialize_grads=True
    )
    found = {f"disc/r1_grad/{k}": g for k, g in zip(parameters, gradients, strict=True)}
    return found | {"disc/r1_penalty_wrt_x": penalty.detach()}


def _build_head(tensors: Mapping[str, Tensor]) -> nn.Module:
    """A head of the depth and widths that the state shows, with that state."""
    state = _below(tensors, "disc/state/")
    blocks = [v for k, v in state.items() if re.fullmatch(r"main\.\d+\.main\.0\.weight_orig", k)]
    nominal_size = FINAL_SIZE << len(blocks)
    widths = {nominal_size >> (i + 1): len(weight) for i, weight in enumerate(blocks)}
    conditional = "cls.weight_orig" in state
    last = state["cls.weight_orig" if conditional else f"main.{len(blocks)}.weight_orig"]
    in_channels = (blocks[0] if blocks else last).shape[1]
    head: nn.Module
    if conditional:
        state.setdefault("embed.weight", _embedding(tensors))
        embedding = state["embed.weight"]
        head = ConditionalPatchHead(in_channels, nominal_size, embedding, widths, len(last))
    else:
        head = PatchHead(in_channels, nominal_size, widths)
    head.to(tensors["disc/x"].dtype)
    head.load_state_dict(state)
    return head


def _embedding(tensors: Mapping[str, Tensor]) -> Tensor:
    """The class embedding [classes, width] with the stored rows at the classes its key names."""
    prefix = "disc/embed_rows_"
    key = next(k for k in tensors if k.startswith(prefix))
    classes = [int(c) for c in key.removeprefix(prefix).split("_")]
    embedding = tensors[key].new_zeros(tensors["disc/labels"].shape[1], tensors[key].shape[1])
    embedding[classes] = tensors[key]
    return embedding


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under a prefix, in order, without it."""
    found = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def _natural(name: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", name)]


OUTPUT, GRADIENT = "output", "gradient"
TOLERANCES = {OUTPUT: 1e-5, GRADIENT: 1e-4}
FLOAT64_TOLERANCE = 1e-9
# Below this a reference is rounding noise, and the difference is judged absolutely.
NEGLIGIBLE = 1e-6
_MAX_BYTES = 1 << 30

Arrays = Mapping[str, np.ndarray]


def check_file(path: str | Path) -> dict[str, Any]:
    """One file's verdict: {"file", "layout", "errors", "max_output", "max_gradient", "ok"}.

    An error is max |a - b| / max |b|, or max |a - b| / 1e-6 x tolerance where max |b| < 1e-6. NaN
    fails. Raises UserError for a file of no known layout.
    """
    file = require_file(path, "an .npz of golden arrays")
    arrays = load_arrays(file)
    layout, compared = _compare(arrays, file)
    errors, kinds = {}, {}
    for key, (ours, golden, kind) in compared.items():
        errors[key], kinds[key] = _error(ours, golden, _tolerance(golden, kind, layout)), kind
    within = [
        error <= _tolerance(compared[key][1], kinds[key], layout) for key, error in errors.items()
    ]
    return {
        "file": str(path),
        "layout": layout,
        "errors": {key: value if isfinite(value) else None for key, value in errors.items()},
        "max_output": _largest(errors, kinds, OUTPUT),
        "max_gradient": _largest(errors, kinds, GRADIENT),
        "ok": bool(within) and all(within),
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


def network_of(arrays: Arrays, where: Path) -> Precond:
    """The network that `config` and `state/*` describe, in the dtype of its weights."""
    network = network_from_config(_json(arrays, where))
    state = _tensors(arrays, "state/")
    dtype = next((t.dtype for t in state.values() if t.is_floating_point()), torch.float32)
    _load_state(network.to(dtype), state, where)
    return network.eval()


def _compare(arrays: Arrays, file: Path) -> tuple[str, dict[str, Comparison]]:
    try:
        if "network" in arrays:
            return "sampler", _check_sampler(arrays, file)
        if "proj/in0" in arrays or "disc/x" in arrays:
            return "discriminator", check_discriminator(arrays)
        if "config" in arrays and "emb" in arrays:
            return "block", _check_block(arrays, file)
        if "config" in arrays:
            return "network", _check_network(arrays, file)
    except (KeyError, TypeError, RuntimeError, AssertionError) as error:
        raise UserError(
            f"the arrays of {file} do not fit together ({error}), "
            "a layout of tests/golden/README.md expected"
        ) from error
    raise UserError(f"{file} has no known layout, one of tests/golden/README.md expected")


def _check_network(arrays: Arrays, file: Path) -> dict[str, Comparison]:
    network = network_of(arrays, file)
    compared: dict[str, Comparison] = {}
    for case in sorted({key.split("/")[0] for key in arrays if key.endswith("/out")}):
        part = _tensors(arrays, f"{case}/")
        x = part["x"].requires_grad_()
        network.zero_grad()
        out = network(x, part["sigma"], part.get("labels"))
        (out * part["probe"]).sum().backward()
        assert x.grad is not None
        compared[f"{case}/out"] = (out.detach(), part["out"], OUTPUT)
        compared[f"{case}/grad_x"] = (x.grad, part["grad_x"], GRADIENT)
        compared |= _gradients(network, part, f"{case}/")
    return compared


def _check_block(arrays: Arrays, file: Path) -> dict[str, Comparison]:
    config = _json(arrays, file)
    config.pop("block", None)
    state = _tensors(arrays, "state/")
    # SongUNet's sqrt(0.5) may have been rounded on its way through JSON.
    if abs(config.get("skip_scale", 1.0) - sqrt(0.5)) < 1e-6:
        config["skip_scale"] = sqrt(0.5)
    block = UNetBlock(
        config.pop("in_channels"),
        config.pop("out_channels"),
        config.pop("emb_channels"),
        **config,
    )
    _load_state(block.to(state["norm0.weight"].dtype), state, file)
    part = _tensors(arrays, "")
    x, emb = part["x"].requires_grad_(), part["emb"].requires_grad_()
    out = block.eval()(x, emb)
    (out * part["probe"]).sum().backward()
    assert x.grad is not None and emb.grad is not None
    return {
        "out": (out.detach(), part["out"], OUTPUT),
        "grad_x": (x.grad, part["grad_x"], GRADIENT),
        "grad_emb": (emb.grad, part["grad_emb"], GRADIENT),
        **_gradients(block, part, ""),
    }


def _check_sampler(arrays: Arrays, file: Path) -> dict[str, Comparison]:
    # The name only: a file may not point out of its own folder.
    beside = file.parent / Path(str(arrays["network"])).name
    network = network_of(load_arrays(require_file(beside, "the sampler's network")), beside)
    labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
    images = heun(
        network,
        torch.from_numpy(arrays["latents"]),
        labels,
        steps=int(arrays["num_steps"]),
        sigma_min=float(arrays["sigma_min"]),
        sigma_max=float(arrays["sigma_max"]),
        rho=float(arrays["rho"]),
    )
    return {"out": (images, torch.from_numpy(arrays["out"]), OUTPUT)}


def _gradients(
    module: torch.nn.Module, part: dict[str, Tensor], prefix: str
) -> dict[str, Comparison]:
    parameters = dict(module.named_parameters())
    compared: dict[str, Comparison] = {}
    for key in part:
        if key.startswith("grad/"):
            gradient = parameters[key.removeprefix("grad/")].grad
            assert gradient is not None, f"{key} has no gradient"
            compared[prefix + key] = (gradient, part[key], GRADIENT)
    return compared


def _load_state(module: torch.nn.Module, state: dict[str, Tensor], where: Path) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"state/* of {where} does not fit its config ({reason}), the config's names expected"
        ) from error


def _json(arrays: Arrays, where: Path) -> dict[str, Any]:
    try:
        config = json.loads(str(arrays["config"]))
    except ValueError as error:
        raise UserError(f"config in {where} is no JSON ({error}), an object expected") from error
    if not isinstance(config, dict):
        raise UserError(f"config in {where} is no JSON object, an object expected")
    return config


def _tensors(arrays: Arrays, prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): torch.from_numpy(np.array(value))
        for key, value in arrays.items()
        if key.startswith(prefix) and value.dtype.kind in "fiub"
    }


def _tolerance(golden: Tensor, kind: str, layout: str) -> float:
    # A sampler's state is float64 but its network float32, whose error it carries.
    float64 = golden.dtype == torch.float64 and layout != "sampler"
    return FLOAT64_TOLERANCE if float64 else TOLERANCES[kind]


def _error(ours: Tensor, golden: Tensor, tolerance: float) -> float:
    if ours.shape != golden.shape:
        return float("inf")
    a, b = ours.detach().double(), golden.double()
    # NaN anywhere makes these NaN, which no tolerance accepts.
    difference = float((a - b).abs().max()) if a.numel() else 0.0
    scale = float(b.abs().max()) if b.numel() else 0.0
    if scale < NEGLIGIBLE:
        return difference / NEGLIGIBLE * tolerance
    return difference / scale


def _largest(errors: dict[str, float], kinds: dict[str, str], kind: str) -> float | None:
    found = [error for key, error in errors.items() if kinds[key] == kind]
    if not found or not all(map(isfinite, found)):
        return None
    return max(found)


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
