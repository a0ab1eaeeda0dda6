"""The configuration's `kernels=` made effective, with errors a user understands."""

import torch

from fastgan.errors import UserError
from kernels import dispatch

# Inductor fuses the definitions itself; attention it leaves to a library.
FOR_COMPILER = "reference,attention=library"


def select_kernels(setting: str, device: torch.device, *, compiled: bool = False) -> None:
    """Sets the implementation of every op for this process; FASTGAN_KERNELS overrides it.

    `compiled`: auto then means what torch.compile makes most of, the plain definitions. UserError
    where either names no implementation, or one that cannot run on `device`.
    """
    if compiled and setting == "auto":
        setting = FOR_COMPILER
    try:
        dispatch.use(setting)
        for op in dispatch.IMPLEMENTATIONS:
            dispatch.choose(op, device.type, torch.float32)
    except ValueError as error:
        raise UserError(str(error)) from error
