"""The configuration's `kernels=` made effective, with errors a user understands."""

import torch

from fastgan.errors import UserError
from kernels import dispatch


def select_kernels(setting: str, device: torch.device) -> None:
    """Sets the implementation of every op for this process; FASTGAN_KERNELS overrides it.

    UserError where either names no implementation, or one that cannot run on `device`.
    """
    try:
        dispatch.use(setting)
        for op in dispatch.IMPLEMENTATIONS:
            dispatch.choose(op, device.type, torch.float32)
    except ValueError as error:
        raise UserError(str(error)) from error
