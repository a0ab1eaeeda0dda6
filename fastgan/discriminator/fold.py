"""BatchNorm in eval mode is a scale and a shift: those behind a convolution become part of it.

    bn(conv(x; w, b)) = conv(x; s w, s (b - mean) + beta),   s = gamma / sqrt(var + eps)

Which BatchNorms follow a convolution, the graph of one forward pass says, not the modules' names.
"""

import copy

import torch
from torch import Tensor, nn
from torch.fx import Node
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fastgan.common.libraries import import_timm

_CONV, _NORM = torch.ops.aten.conv2d.default, torch.ops.aten.batch_norm.default


@torch.no_grad()
def fold_batch_norms(module: nn.Module, example: Tensor) -> int:
    """Folds, in place, every BatchNorm that can be proven to follow a convolution; how many.

    `module` is a network in eval mode that stays there, with weights in float32 or float64;
    `example` is an input of any numbers. Proven means, in the graph of module(example): the
    convolution's output goes into the BatchNorm and nowhere else, both are called once, and the
    convolution's weight is a parameter as it stands. All others stay, and so does a network of
    which no graph can be made. Outputs and input gradients are the same to rounding.
    """
    assert not any(m.training for m in module.modules()), "eval mode expected"
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    pairs = _pairs(module, example) if norms else []
    for conv, norm in pairs:
        _fold(conv, norm)
        _replace(module, norm, _activation_of(norm))
    return len(pairs)


def _pairs(module: nn.Module, example: Tensor) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    try:
        exported = torch.export.export(module, (example,), strict=False)
    except Exception:  # it raises nearly anything on what it cannot trace
        return []
    signature = exported.graph_signature
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    found = []
    for node in exported.graph.nodes:
        if node.target is not _NORM or node.args[0].target is not _CONV:
            continue
        source = node.args[0]
        conv = _owner(module, names, source.args[1], "weight")
        norm = _owner(module, names, node.args[3], "running_mean")
        if (
            len(source.users) == 1
            and isinstance(conv, nn.Conv2d)
            and isinstance(norm, nn.BatchNorm2d)
            and type(norm) in _known_norms()
        ):
            found.append((conv, norm))
    return found


def _owner(module: nn.Module, names: dict[str, str], node: Node | None, key: str) -> object:
    """The only module that has the graph's input `node` as its `key`; None where it is used more
    than once, no module's or several modules' own, or the graph computes it."""
    if node is None or node.name not in names or len(node.users) != 1:
        return None
    path, _, last = names[node.name].rpartition(".")
    tensor = getattr(module.get_submodule(path), key, None)
    owners = [m for m in module.modules() if getattr(m, key, None) is tensor]
    return owners[0] if last == key and len(owners) == 1 else None


def _known_norms() -> tuple[type[nn.Module], ...]:
    """The classes of which it is known what they do besides: timm's activates in the same call."""
    return nn.BatchNorm2d, import_timm().layers.BatchNormAct2d


def _activation_of(norm: nn.Module) -> nn.Module:
    # timm's also drops, which in eval mode is nothing.
    return nn.Identity().eval() if type(norm) is nn.BatchNorm2d else norm.get_submodule("act")


def _fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    dtype = conv.weight.dtype
    assert dtype in (torch.float32, torch.float64), "folded before weights are stored in less"
    # In float64, rounded once at the end.
    wide = copy.deepcopy(conv).double(), copy.deepcopy(norm).double()
    fused = fuse_conv_bn_eval(*wide).to(dtype)
    conv.weight, conv.bias = fused.weight, fused.bias


def _replace(module: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Puts `new` wherever `old` is registered, under however many names."""
    for name, child in list(module.named_modules(remove_duplicate=False)):
        if child is old:
            module.set_submodule(name, new)
