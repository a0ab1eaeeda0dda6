"""What surrounds an optimiser's step (processes, finite gradients, learning rate), and the EMA."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import torch
from fastgan_kernels.dispatch import fused_adam
from torch import Tensor, nn
from torch.profiler import record_function

from fastgan.common.distributed import World, all_reduce_sum
from fastgan.common.errors import UserError

NonFinite = Literal["skip", "published"]
Adam = Literal["torch", "apex"]
# Of a LossScale in the state, where the others' entries have a parameter's name.
_SCALE = "loss_scale"


class Updater:
    """Adam over named parameters; called with gradients in place, it makes one update.

    `lr_factor` maps images seen to a factor on the optimiser's own learning rate. `adam`: PyTorch's
    or, where it is installed, apex's FusedAdam (UserError where not). PyTorch's leaves an update
    out without asking the host; apex's waits for the answer. `scale_losses`: gradients are those of
    scaled losses, for what computes in float16.
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
        scale_losses: bool = False,
    ) -> None:
        self.names, self.parameters = list(parameters), list(parameters.values())
        self.world, self.lr, self.nonfinite, self.adam = world, lr, nonfinite, adam
        self.lr_factor = lr_factor or (lambda nimg: 1.0)
        create, device = _adam_class(adam), self.parameters[0].device
        rate = lr if adam == "apex" else _learning_rate(lr, device)
        self.optimizer = create(self.parameters, lr=rate, betas=betas, eps=1e-8)
        self._blamed = torch.zeros(len(self.parameters), dtype=torch.bool, device=device)
        self._scale = LossScale(device) if scale_losses else None

    def follow(self, nimg: int) -> None:
        """Sets the learning rate for an update of `nimg` images."""
        rate = self.lr * self.lr_factor(nimg)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of `loss`, scaled, to these parameters'.

        Nothing is computed for another network or, in R1, down to the image.
        """
        scaled = loss if self._scale is None else loss * self._scale.value
        scaled.backward(inputs=self.parameters)

    @record_function("step/update")
    def __call__(self, loss: Tensor) -> Tensor:
        """Averages, checks, steps, clears; 1 where something not finite stopped the update, or 0.

        `loss` is the objective that the gradients belong to, a scalar; the answer is one too, on
        its device and the same in all processes.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        loss = loss.detach().clone()
        average_over_processes([*gradients, loss], self.world)
        if self._scale is not None:
            torch._foreach_mul_(gradients, 1 / self._scale.value)
        skipped = self._check(gradients, loss)
        if self._scale is not None:
            self._scale.update(skipped)
        if self.adam == "torch":
            self.optimizer.found_inf = skipped  # type: ignore[attr-defined]
            self.optimizer.step()
        elif not skipped:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return skipped

    def blamed(self) -> list[str]:
        """The parameters whose gradients were not finite when an update was last left out."""
        return [name for name, bad in zip(self.names, self._blamed.tolist(), strict=True) if bad]

    def _check(self, gradients: list[Tensor], loss: Tensor) -> Tensor:
        """Whether to leave the update out (1.0) or not; `published` first replaces NaN and inf."""
        if self.nonfinite == "published":
            for gradient in gradients:
                torch.nan_to_num_(gradient, nan=0.0, posinf=1e5, neginf=-1e5)
            return loss.new_zeros((), dtype=torch.float32)
        norms = iter(torch._foreach_norm(gradients))
        # R1 does not reach every parameter: the last biases move all logits alike.
        of_all = [loss.new_zeros(()) if p.grad is None else next(norms) for p in self.parameters]
        bad = ~torch.stack(of_all).isfinite()
        skipped = bad.any() | ~loss.isfinite()
        # Kept on the device until somebody asks.
        self._blamed.copy_(torch.where(skipped, bad, self._blamed))
        return skipped.float()

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
        if self._scale is not None:
            state |= {f"{_SCALE}/{entry}": value for entry, value in self._scale.state().items()}
        return state

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Restores what `state` gave; what has no entry starts fresh."""
        known = dict(zip(self.names, self.parameters, strict=True))
        for key, value in state.items():
            name, _, entry = key.rpartition("/")
            if name == _SCALE:
                if self._scale is not None:
                    self._scale.state()[entry].copy_(value)
                continue
            if name not in known:
                raise UserError(f"optimiser state names {name}, which does not train here")
            if entry == "step" and isinstance(self.optimizer, fused_adam() or ()):
                self.optimizer.param_groups[0]["step"] = int(value)
                continue
            parameter = known[name]
            self.optimizer.state[parameter][entry] = value.to(parameter.device)


class LossScale:
    """What losses are multiplied by, lest their gradients vanish in float16, on the device.

    Halved with every update left out, doubled after 2,000 made in a row: torch.amp.GradScaler's
    rule and numbers, without its questions to the host.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((), 2.0**16, device=device)
        self._made = torch.zeros((), dtype=torch.int32, device=device)

    def update(self, skipped: Tensor) -> None:
        torch._amp_update_scale_(self.value, self._made, skipped, 2.0, 0.5, 2000)

    def state(self) -> dict[str, Tensor]:
        return {"value": self.value, "made": self._made}


def _adam_class(adam: Adam) -> Callable[..., torch.optim.Optimizer]:
    if adam == "torch":
        # Fused: the one that can leave an update out by itself (`found_inf`).
        return partial(torch.optim.Adam, fused=True, capturable=True)
    found = fused_adam()
    if found is None:
        raise UserError(
            "optim.adam=apex, but NVIDIA's apex is not installed here, optim.adam=torch would do"
        )
    return found


def _learning_rate(value: float, device: torch.device) -> Tensor:
    """As a tensor, which a captured graph reads anew; CUDA's kernel takes float32 only."""
    dtype = torch.float32 if device.type == "cuda" else torch.float64
    return torch.full((), value, dtype=dtype, device=device)


def average_over_processes(tensors: list[Tensor], world: World) -> None:
    """Replaces the tensors by their means over all processes, in one flat all-reduce."""
    if world.size == 1:
        return
    flat = torch.cat([t.flatten() for t in tensors])
    all_reduce_sum(flat)
    flat /= world.size
    for tensor, mean in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(mean.view_as(tensor))


def linear_decay(total_images: int, decay_from: float | None) -> Callable[[int], float]:
    """1 until the share `decay_from` of the images, then linearly down to 0 at the end."""

    def factor(nimg: int) -> float:
        if decay_from is None or nimg < decay_from * total_images:
            return 1.0
        return max(0.0, (total_images - nimg) / (total_images * (1 - decay_from)))

    return factor


Module = TypeVar("Module", bound=nn.Module)


def ema_beta(batch: int, nimg: int, *, half_life: float, ramp: float | None = 0.05) -> float:
    """The decay of one update of `batch` images when `nimg` were seen before it.

    beta = 0.5^(batch / h), h = min(half_life, ramp x nimg) images: early averages forget quickly,
    and the first update copies (h = 0).
    """
    if ramp is not None:
        half_life = min(half_life, ramp * nimg)
    return 0.5 ** (batch / half_life) if half_life > 0 else 0.0


def averaged_copy(network: Module) -> Module:
    """A copy to average into; frozen parameters and buffers are shared with it, not copied."""
    frozen = [p for p in network.parameters() if not p.requires_grad]
    shared = {id(tensor): tensor for tensor in [*frozen, *network.buffers()]}
    return copy.deepcopy(network, memo=shared).requires_grad_(False).eval()


@record_function("step/EMA")
@torch.no_grad()
def update_ema(average: nn.Module, network: nn.Module, beta: Tensor) -> None:
    """average <- network + beta (average - network), over the parameters that train.

    `beta` is a scalar tensor in their dtype, beside them: a captured graph reads its value anew.
    """
    pairs = [
        (a, p)
        for a, p in zip(average.parameters(), network.parameters(), strict=True)
        if p.requires_grad
    ]
    averages: list[Tensor] = [a for a, _ in pairs]
    parameters: list[Tensor] = [p for _, p in pairs]
    torch._foreach_sub_(averages, parameters)
    torch._foreach_mul_(averages, beta)
    torch._foreach_add_(averages, parameters)
