"""Compares projection and heads with arrays computed by the original implementation."""

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastgan.discriminator.heads import FINAL_SIZE, ConditionalPatchHead, PatchHead
from fastgan.discriminator.projection import RandomProjection
from fastgan.errors import UserError
from fastgan.seeding import seeded

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
