"""Asked to stop (SIGTERM, or SIGUSR1 as SLURM warns), all processes save at the same iteration."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from fastgan.distributed import cpu_group, exchanging

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
# Exit status of a run that was stopped and saved: try again (EX_TEMPFAIL of sysexits.h).
PREEMPTED = 75


class Preempted(Exception):
    """The run was asked to stop and has saved; commands exit with PREEMPTED."""


class StopRequest:
    """Whether any process was sent one of SIGNALS; construct it in all of them."""

    def __init__(self) -> None:
        self._received = False
        self._group = cpu_group()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Inside, the signals are noted instead of ending the process."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agreed(self) -> bool:
        """The same answer in every process, all of which must ask."""
        if self._group is None:
            return self._received
        asked = torch.tensor(float(self._received))
        with exchanging():
            dist.all_reduce(asked, group=self._group)
        return bool(asked)

    def _note(self, number: int, frame: object) -> None:
        self._received = True
