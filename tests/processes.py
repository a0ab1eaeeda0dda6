"""Two processes of one job, as torchrun would start them on this machine."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def two_processes(
    code: str,
    *arguments: str,
    timeout: float = 120,
    expected: int | tuple[int, int] = 0,
    **environment: str,
) -> list[str]:
    """Runs `code` in ranks 0 and 1, asserts how both end, and returns what they said on stderr.

    A process that has not ended after `timeout` seconds fails the test, and both are killed.
    """
    statuses = (expected, expected) if isinstance(expected, int) else expected
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    shared |= {"OMP_NUM_THREADS": "1", **environment}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in "01"
    ]
    try:
        errors = [worker.communicate(timeout=timeout)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert tuple(worker.returncode for worker in workers) == statuses, errors
    return errors
