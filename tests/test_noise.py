"""Randomness without history."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgan.common.noise import global_stream, normal, seeded_latents, stream

KEYS = st.lists(st.integers(0, 10**12) | st.text(max_size=5), max_size=3).map(tuple)


def draw(seed: int, *key: int | str) -> list[float]:
    return torch.rand(3, generator=stream(seed, *key), dtype=torch.float64).tolist()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**63 - 1), KEYS, st.integers(0, 2**63 - 1), KEYS)
def test_a_stream_is_named_by_its_key(seed: int, key: tuple, other: int, other_key: tuple) -> None:
    assert draw(seed, *key) == draw(seed, *key)
    assert (draw(seed, *key) == draw(other, *other_key)) == ((seed, key) == (other, other_key))


def test_keys_do_not_run_together() -> None:
    assert len({tuple(draw(1, *k)) for k in [("a", 12), ("a", 1, 2), ("a1", 2), ("a", "12")]}) == 4


def test_known_values() -> None:
    """Another version must resume old runs with the same noise."""
    assert stream(42, "z", "G", 7).initial_seed() == 6437456724544708797


def test_normal_draws() -> None:
    x = normal(stream(0, "x"), 50, 1000, dtype=torch.float64)
    assert x.dtype == torch.float64 and x.shape == (50, 1000)
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.01


def test_the_global_generator_is_lent_and_given_back() -> None:
    torch.manual_seed(9)
    state = torch.get_rng_state()
    draws = []
    for _ in range(2):
        with global_stream(3, "dropout", 5, device=torch.device("cpu")):
            draws.append(torch.rand(4).tolist())
        assert torch.equal(torch.get_rng_state(), state)
    assert draws[0] == draws[1]
    with global_stream(3, "dropout", 6, device=torch.device("cpu")):
        assert torch.rand(4).tolist() != draws[0]


def test_a_seed_names_its_latent_and_class_in_any_batch() -> None:
    shape = (2, 4, 4)
    z, classes = seeded_latents([5, 0, 123456789012], shape, label_dim=7)
    assert z.dtype == torch.float64 and classes is not None
    for i, seed in enumerate((5, 0, 123456789012)):
        # As published: z first, in float32, then the class, from one generator.
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(z[i], torch.randn(shape, generator=generator).double())
        assert classes[i] == torch.randint(7, (), generator=generator)
    without, none = seeded_latents([5], shape)
    assert none is None and torch.equal(without[0], z[0])


def test_classes_are_uniform() -> None:
    _, classes = seeded_latents(list(range(3000)), (1, 1, 1), label_dim=3)
    assert classes is not None and all(abs((classes == c).sum() - 1000) < 120 for c in range(3))
