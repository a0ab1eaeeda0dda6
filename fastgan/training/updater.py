"""What surrounds an optimiser's step: averaging over processes, finite gradients, learning rate."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fastgan.distributed import World, all_reduce_sum
from fastgan.errors import UserError
from kernels.optional import fused_adam

NonFinite = Literal["skip", "published"]
Adam = Literal["torch", "apex"]


class Updater:
    """Adam over named parameters; called with gradients in place, it makes one update.

    `lr_factor` maps images seen to a factor on the optimiser's own learning rate. `adam`: PyTorch's
    or, where it is installed, apex's FusedAdam (UserError where not). `fused`: whether PyTorch's
    updates all parameters in one kernel.
    """

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        world: World,
        *,
        lr: float,
        betas: tuple[float, float],
        nonfinite: NonFinite = "skip",
        lr_factor: Callable[[int], float] | None = None,
        adam: Adam = "torch",
        fused: bool = False,
    ) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())
        create = _adam_class(adam, fused)
        self.optimizer = create(self.parameters, lr=lr, betas=betas, eps=1e-8)
        self.world, self.lr, self.nonfinite = world, lr, nonfinite
        self.lr_factor = lr_factor or (lambda nimg: 1.0)

    def __call__(self, nimg: int) -> bool:
        """Averages, checks, steps, clears; False where a non-finite gradient stopped the update."""
        average_gradients(self.parameters, self.world)
        finite = repair_gradients(self.parameters, self.nonfinite)
        if finite:
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * self.lr_factor(nimg)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return finite

    def state(self) -> dict[str, Tensor]:
        """Adam's moments and step counts as `<parameter>/<entry>`."""
        state = {
            f"{name}/{entry}": value
            for name, parameter in zip(self.names, self.parameters, strict=True)
            for entry, value in self.optimizer.state[parameter].items()
        }
        steps = self.optimizer.param_groups[0].get("step")
        if steps is not None:  # apex counts once for all parameters
            state |= {f"{name}/step": torch.tensor(float(steps)) for name in self.names}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` gave; parameters without an entry start fresh."""
        known = dict(zip(self.names, self.parameters, strict=True))
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            if name not in known:
                raise UserError(f"optimiser state names {name}, which does not train here")
            if entry == "step" and isinstance(self.optimizer, fused_adam() or ()):
                self.optimizer.param_groups[0]["step"] = int(value)
                continue
            parameter = known[name]
            # Unless it is fused, Adam keeps its step count on the CPU.
            on_cpu = entry == "step" and not self.optimizer.param_groups[0].get("fused")
            device = torch.device("cpu") if on_cpu else parameter.device
            self.optimizer.state[parameter][entry] = value.to(device)


def _adam_class(adam: Adam, fused: bool) -> Callable[..., torch.optim.Optimizer]:
    if adam == "torch":
        return partial(torch.optim.Adam, fused=True) if fused else torch.optim.Adam
    found = fused_adam()
    if found is None:
        raise UserError(
            "optim.adam=apex, but NVIDIA's apex is not installed here, optim.adam=torch would do"
        )
    return found


def average_gradients(parameters: list[nn.Parameter], world: World) -> None:
    """Replaces the gradients by their mean over all processes, in one flat all-reduce."""
    if world.size == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    all_reduce_sum(flat)
    flat /= world.size
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def repair_gradients(parameters: list[nn.Parameter], mode: NonFinite) -> bool:
    """Whether the update may go ahead; `published` first replaces NaN by 0 and inf by +-1e5."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if mode == "published":
        for gradient in gradients:
            torch.nan_to_num_(gradient, nan=0.0, posinf=1e5, neginf=-1e5)
        return True
    return bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all())


def linear_decay(total_images: int, decay_from: float | None) -> Callable[[int], float]:
    """1 until the share `decay_from` of the images, then linearly down to 0 at the end."""

    def factor(nimg: int) -> float:
        if decay_from is None or nimg < decay_from * total_images:
            return 1.0
        return max(0.0, (total_images - nimg) / (total_images * (1 - decay_from)))

    return factor
