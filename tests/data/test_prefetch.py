"""What threads do ahead: order, bounds, errors, ends."""

import gc
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest

from fastgan.common.errors import UserError
from fastgan.data.batches import Ahead


def decoding_threads() -> int:
    return sum(thread.name.startswith("decode") for thread in threading.enumerate())


class Work:
    """k -> 10 k; counts what was asked, and waits for `go` at every k above `free`."""

    def __init__(self, free: int = 10**9) -> None:
        self.free, self.asked, self.go = free, Counter[int](), threading.Event()
        self._lock = threading.Lock()

    def __call__(self, k: int) -> int:
        with self._lock:
            self.asked[k] += 1
        if k > self.free:
            assert self.go.wait(20)
        return 10 * k


def wait_until(condition: Callable[[], bool], most: float = 10) -> None:
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < most
        time.sleep(0.005)


def test_in_order_everything_is_made_once() -> None:
    work = Work()
    ahead = Ahead(work, 3)
    assert [ahead(k) for k in range(20)] == [10 * k for k in range(20)]
    ahead.close()
    assert set(range(20)) <= work.asked.keys() <= set(range(23))
    assert set(work.asked.values()) == {1}


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_as_many_as_there_are_workers_are_made_ahead(workers: int) -> None:
    work = Work()
    ahead = Ahead(work, workers)
    ahead(5)
    wait_until(lambda: len(work.asked) == workers + 1)
    time.sleep(0.05)  # and no more than that
    assert sorted(work.asked) == list(range(5, 6 + workers))
    ahead.close()


def test_what_was_handed_over_is_not_kept() -> None:
    ahead = Ahead(lambda k: np.full(3, k), 2)
    seen = [weakref.ref(ahead(k)) for k in range(5)]
    ahead.close()
    gc.collect()
    assert [ref() is None for ref in seen] == [True] * 5


def test_an_error_comes_where_its_iteration_is_asked_for() -> None:
    def work(k: int) -> int:
        if k == 2:
            raise UserError("corrupt image, entry 'a.png', a complete one expected")
        return k

    ahead = Ahead(work, 3)
    assert [ahead(0), ahead(1)] == [0, 1]
    for _ in range(2):
        with pytest.raises(UserError, match=r"entry 'a\.png'"):
            ahead(2)
    assert [ahead(3), ahead(4)] == [3, 4]
    ahead.close()


def test_closing_ends_the_threads_and_starts_nothing_more() -> None:
    before = decoding_threads()
    work = Work(free=0)
    ahead = Ahead(work, 2)
    assert ahead(0) == 0
    wait_until(lambda: len(work.asked) == 3)  # both threads are at work, 1 and 2
    assert decoding_threads() == before + 2
    assert ahead._pool is not None
    ahead._pending[9] = ahead._pool.submit(work, 9)  # waits for a thread
    threading.Timer(0.1, work.go.set).start()
    ahead.close()
    assert decoding_threads() == before
    assert 9 not in work.asked


def test_what_is_no_longer_wanted_is_not_made() -> None:
    work = Work(free=0)
    ahead = Ahead(work, 1)
    assert ahead(0) == 0
    wait_until(lambda: 1 in work.asked)  # the one thread is held up in 1
    assert ahead._pool is not None
    ahead._pending[2] = ahead._pool.submit(work, 2)
    threading.Timer(0.1, work.go.set).start()
    assert ahead(50) == 500
    assert ahead(51) == 510
    ahead.close()
    assert set(work.asked) - {52} == {0, 1, 50, 51}
