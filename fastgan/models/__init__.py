"""The diffusion UNets, their preconditioning and the rule that freezes them."""

from fastgan.models.build import network_from_config
from fastgan.models.precond import SIGMA_INIT, Precond

__all__ = ["SIGMA_INIT", "Precond", "network_from_config"]
