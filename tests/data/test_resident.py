"""A batch is the same wherever the images lie; what `auto` chooses, and what is refused."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgan import config as cfg
from fastgan.common.distributed import World
from fastgan.common.errors import UserError
from fastgan.common.noise import batch_indices
from fastgan.data import batches as resident
from fastgan.data import open_dataset
from fastgan.data.dataset import subset_indices
from fastgan.launch import build, checks, run_dir
from tests.data.pictures import encoded, write_zip

CPU = torch.device("cpu")
N, BATCH, SEED = 10, 4, 7
PIXELS = np.random.default_rng(3).integers(0, 256, (N, 8, 8, 3), dtype=np.uint8)
CLASSES = [int(c) for c in np.random.default_rng(4).integers(0, 5, N)]
VECTORS = np.random.default_rng(5).normal(size=(N, 3)).round(3).tolist()
# Not in order, twice the same, across epochs (2, 5, 7), far ahead: as a resumed run would ask.
ASKED = [0, 1, 2, 5, 4, 4, 40, 41, 7, 0, 1, 2, 3]
WAYS = {"resident": (True, 4), "in turn": (False, 0), "one": (False, 1), "threads": (False, 3)}


def image_zip(path: Path, labels: list | None, broken: int | None = None) -> Path:
    """Ten noisy images; of image `broken` a bit of the compressed pixels is wrong."""
    entries = {}
    for index in range(N):
        data = bytearray(encoded(PIXELS[index]))
        data[data.index(b"IDAT") + 40] ^= index == broken
        entries[f"00000/img{index:08d}.png"] = bytes(data)
    table = labels and [list(pair) for pair in zip(entries, labels, strict=True)]
    return write_zip(path, entries, table)


def batches(
    path: str | Path, way: str, label_dim: int = 0, rank: int = 0, size: int = 1, **how: int | None
) -> build.Batches:
    wish, workers = WAYS[way]
    data = cfg.DataConfig(path=str(path), resident=wish, workers=workers, **how)
    config = cfg.RunConfig(seed=SEED, batch=BATCH, data=data)
    world = World(rank, rank, size, CPU)
    return build.batches(build.dataset(data), config, label_dim, world)


def expected_rows(k: int, n: int, rank: int, size: int) -> np.ndarray:
    """This rank's slice of the one process's batch."""
    local = BATCH // size
    return batch_indices(n, seed=SEED, iteration=k, batch=BATCH)[rank * local : (rank + 1) * local]


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """Bytes 0-255 to [-1, 1], through a table of numpy's."""
    table = np.arange(256, dtype=np.float32) / np.float32(127.5) - np.float32(1)
    return torch.from_numpy(table[pixels])


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("kind", "rank", "size"),
    [("none", 0, 1), ("classes", 0, 2), ("classes", 1, 2), ("vectors", 1, 2), ("subset", 1, 2),
     ("unasked", 0, 1)],
)  # fmt: skip
def test_every_batch_is_bitwise_what_was_stored(
    tmp_path: Path, way: str, kind: str, rank: int, size: int
) -> None:
    labels = {"none": None, "vectors": VECTORS}.get(kind, CLASSES)
    label_dim = {"none": 0, "unasked": 0, "vectors": 3}.get(kind, 6)
    path = image_zip(tmp_path / "x.zip", labels)
    kept = subset_indices(N, 7) if kind == "subset" else np.arange(N)
    with batches(
        path, way, label_dim, rank, size, max_images=7 if kind == "subset" else None
    ) as draw:
        for k in ASKED:
            rows = kept[expected_rows(k, len(kept), rank, size)]
            images, given = draw(k)
            assert images.dtype == torch.float32
            assert torch.equal(images, normalised(PIXELS[rows].transpose(0, 3, 1, 2)))
            if label_dim == 0:
                assert given is None
                continue
            wanted = np.array(VECTORS) if kind == "vectors" else np.eye(6)[CLASSES]
            assert given is not None and given.dtype == torch.float32
            assert torch.equal(given, torch.from_numpy(wanted[rows]).float())


def test_the_digits(way: str) -> None:
    data = open_dataset("digits")
    assert data.labels is not None
    with batches("digits", way, 10) as draw:
        for k in (3, 249, 250, 3):  # 997 images: 249 crosses into the second epoch
            rows = expected_rows(k, 997, 0, 1)
            images, labels = draw(k)
            assert torch.equal(images, normalised(data.images(rows)))
            assert images.stride() == (256, 256, 16, 1)  # numpy's would choose other algorithms
            assert labels is not None and labels.argmax(1).tolist() == data.labels[rows].tolist()
            assert labels.sum(1).tolist() == [1.0] * BATCH
    said = {"resident": "resident on cpu, 0.00 GB", "in turn": "decoded in turn"}
    said |= {"one": "decoded ahead by 1 thread", "threads": "decoded ahead by 3 threads"}
    assert draw.description == f"data: {said[way]}"


def test_what_an_iteration_got_may_be_written_to(way: str) -> None:
    with batches("digits", way, 10) as draw:
        images, labels = draw(0)
        kept = images.clone()
        images.zero_()
        assert labels is not None and labels.zero_() is labels
        again = draw(0)
    assert torch.equal(again[0], kept) and again[1] is not None and again[1].sum() == BATCH


def test_resident_images_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = open_dataset(image_zip(tmp_path / "x.zip", None))
    config = cfg.RunConfig(seed=SEED, batch=BATCH, data=cfg.DataConfig(resident=True))
    with build.batches(data, config, 0, World(0, 0, 1, CPU)) as draw:
        monkeypatch.setattr(data, "images", None)
        images, _ = draw(0)
    rows = expected_rows(0, N, 0, 1)
    assert torch.equal(images, normalised(PIXELS[rows].transpose(0, 3, 1, 2)))


@pytest.mark.parametrize("workers", [0, 3])
def test_blocks_cover_the_dataset_and_no_more_is_held(
    monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(resident, "_BLOCK_BYTES", 100 * 256)
    data, asked = open_dataset("digits"), []
    images = data.images

    def counted(indices: np.ndarray) -> np.ndarray:
        if len(indices):  # nothing lies behind the last block
            asked.append(indices.tolist())
        return images(indices)

    monkeypatch.setattr(data, "images", counted)
    pixels = resident.load_pixels(data, CPU, workers)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.numpy(), images(np.arange(997)))
    assert max(map(len, asked)) == 100 and len(asked) == 10
    assert sorted(i for block in asked for i in block) == list(range(997))


def test_a_broken_image_is_named(tmp_path: Path, way: str) -> None:
    """Sound as an entry of the zip, and its header too: only decoding tells."""
    path = image_zip(tmp_path / "x.zip", None, broken=6)
    before = next(k for k in range(3) if 6 in expected_rows(k, N, 0, 1))
    draw, reached = batches(path, way), []
    with pytest.raises(UserError) as caught, draw:
        for k in range(3):
            draw(k)
            reached.append(k)
    assert "entry '00000/img00000006.png' of zip" in str(caught.value)
    assert str(caught.value).startswith("corrupt image (")
    assert reached == list(range(0 if way == "resident" else before)) and before > 0


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], None]]:
    """Sets how much memory this machine has free."""

    def set_free(amount: int) -> None:
        values = {"SC_AVPHYS_PAGES": amount // 4096, "SC_PAGE_SIZE": 4096}
        monkeypatch.setattr("os.sysconf", values.__getitem__)

    yield set_free


DIGITS_BYTES = 997 * 16 * 16 + 997 * 8


def test_auto_takes_a_quarter_of_the_free_memory(free: Callable[[int], None]) -> None:
    data = open_dataset("digits")
    page = 4096
    enough = (4 * DIGITS_BYTES // page + 1) * page
    free(enough)
    assert resident.choose(data, "auto", CPU, 1)
    assert not resident.choose(data, "auto", CPU, 2)  # a copy for each of two processes
    assert not resident.choose(data, False, CPU, 1)
    free(enough - page)
    assert not resident.choose(data, "auto", CPU, 1)
    assert resident.choose(data, True, CPU, 1)
    free(2 * enough)
    assert resident.choose(data, "auto", CPU, 2)


def test_auto_takes_two_gigabytes_of_a_large_machine(
    free: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    free(1 << 40)
    data = open_dataset("digits")
    for needed, expected in ((2 << 30, True), ((2 << 30) + 1, False)):
        monkeypatch.setattr(resident, "decoded_bytes", lambda data, needed=needed: needed)
        assert resident.choose(data, "auto", CPU, 1) is expected
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (64 << 30, 80 << 30))
    for needed, expected in ((16 << 30, True), ((16 << 30) + 1, False)):
        monkeypatch.setattr(resident, "decoded_bytes", lambda data, needed=needed: needed)
        assert resident.choose(data, "auto", torch.device("cuda", 0), 8) is expected


def test_what_cannot_fit_is_refused(free: Callable[[int], None]) -> None:
    free(200_000)
    with pytest.raises(UserError) as caught:
        batches("digits", "resident")
    assert "data.resident=true takes 0.00 GB and cpu has 0.00 GB free" in str(caught.value)
    assert "digits/train, data.resident=auto would be right" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("resident", "yes", "data.resident='yes', auto, true or false would be right"),
        ("resident", 1, "data.resident=1, "),
        ("resident", None, "data.resident=None, "),
        ("workers", -1, "data.workers=-1 is out of range, 0 or more"),
        ("workers", 257, "data.workers=257 is out of range, at most 256"),
    ],
)
def test_wrong_settings(key: str, value: object, said: str) -> None:
    config = cfg.RunConfig(batch=4, data=cfg.DataConfig(path="digits"))
    checks.check_run(config)
    setattr(config.data, key, value)
    with pytest.raises(UserError) as caught:
        checks.check_run(config)
    assert said in str(caught.value)


def test_where_the_images_lie_may_change_on_resume(tmp_path: Path) -> None:
    def opened(**data: object) -> None:
        config = cfg.RunConfig(
            run_dir=str(tmp_path / "run"), batch=4, total_images=8,
            data=cfg.DataConfig(path="digits", **data),
        )  # fmt: skip
        run_dir.open_run_dir(config)

    opened()
    opened(resident=False, workers=0)
    with pytest.raises(UserError, match=r"data\.max_images=None \(not 7\)"):
        opened(max_images=7)
    # A run from before there were these keys.
    saved = tmp_path / "run/config.yaml"
    text, count = re.subn(r"^ +(resident|workers):.*\n", "", saved.read_text(), flags=re.M)
    assert count == 2
    saved.write_text(text)
    opened(resident=True)
