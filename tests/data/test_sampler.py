"""Batches as a function of (seed, k, rank)."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan.common.noise import batch_indices


def batch(k: int, n: int = 10, size: int = 4, seed: int = 1, **place: int) -> np.ndarray:
    return batch_indices(n, seed=seed, iteration=k, batch=size, **place)


def walk(iterations: int, **how: int) -> np.ndarray:
    return np.concatenate([batch(k, **how) for k in range(iterations)])


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 2**63 - 1))
def test_epochs_are_permutations(n: int, size: int, seed: int) -> None:
    positions = walk(3 * n // size + 1, n=n, size=size, seed=seed)
    for epoch in range(len(positions) // n):
        assert sorted(positions[epoch * n : (epoch + 1) * n]) == list(range(n))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 40), st.integers(1, 4), st.integers(1, 4), st.integers(0, 50), st.integers(0, 9)
)
def test_the_ranks_make_up_the_batch_of_one_process(
    n: int, local: int, world: int, k: int, seed: int
) -> None:
    size = local * world
    parts = [batch(k, n, size, seed, rank=r, world_size=world) for r in range(world)]
    assert [len(part) for part in parts] == [local] * world
    assert np.array_equal(np.concatenate(parts), batch(k, n, size, seed))
    if size <= n - (k * size) % n:  # within one epoch nobody gets another's image
        assert len(set(np.concatenate(parts).tolist())) == size


def test_a_function_of_its_arguments_whatever_was_asked_before() -> None:
    forwards = [batch(k).tolist() for k in range(9)]
    backwards = [batch(k).tolist() for k in reversed(range(9))]
    assert forwards == backwards[::-1]
    assert forwards != [batch(k, seed=2).tolist() for k in range(9)]


def test_known_values() -> None:
    """Resuming a run under another numpy must meet the same images."""
    assert batch(0).tolist() == [8, 4, 7, 0]
    # The last two of the third epoch, the first two of the fourth.
    assert batch(7).tolist() == [7, 2, 2, 0]
