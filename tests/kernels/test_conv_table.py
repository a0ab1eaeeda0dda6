"""The file of measured plans, and what dispatch makes of it."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fastgan_kernels import dispatch
from fastgan_kernels.norm_silu_conv import plans as conv_table
from fastgan_kernels.norm_silu_conv.plans import (
    LIBRARY,
    Entry,
    Plan,
    Shape,
    candidates,
    fitted,
    plan_for,
)

SHAPE = Shape(256, 128, 32, 32, 3)
PLAN = Plan("fused", 128, 256, 32, 8, 3, tanh=True)
WINS = Entry(SHAPE, "fp16", "forward", 64, PLAN, us=90.0, library_us=100.0)
LOSES = replace(WINS, direction="backward", us=110.0)


@pytest.fixture(autouse=True)
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The table of an A100 to be; what was read before is forgotten."""
    monkeypatch.setattr(conv_table, "FOLDER", tmp_path)
    monkeypatch.setattr(conv_table, "capability", lambda device: (8, 0))
    conv_table.table.cache_clear()
    yield tmp_path / "sm_80.json"
    conv_table.table.cache_clear()


def x(dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.empty(0, dtype=dtype)


def test_what_is_written_is_read(file: Path) -> None:
    assert conv_table.read(file) == {}
    plan = Plan("behind", 64, 128, 64, 4, 3, descriptors=True)
    entries = [WINS, LOSES, replace(WINS, shape=replace(SHAPE, cin=8), plan=plan)]
    conv_table.write(file, {"machine": "a GPU"}, entries)
    assert conv_table.read(file) == {entry.key: entry for entry in entries}
    assert '"machine": "a GPU"' in file.read_text()
    conv_table.write(file, {}, [LOSES])
    assert list(conv_table.read(file).values()) == [LOSES]
    assert list(file.parent.iterdir()) == [file]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"entries"', '"rows"'),
        lambda text: text.replace('"cin"', '"depth"'),
        lambda text: text.replace('"stages"', '"phases"'),
        lambda text: text.replace('"library_us"', '"cudnn_us"'),
        lambda text: "[]",
        lambda text: '{"entries": [null]}',
        lambda text: '{"entries": 3}',
    ],
)
def test_a_damaged_table_is_named_in_one_line(damage, file: Path) -> None:
    conv_table.write(file, {}, [WINS])
    file.write_text(damage(file.read_text()))
    with pytest.raises(ValueError, match=r"not a table of plans .*sm_80\.json") as error:
        conv_table.read(file)
    assert "\n" not in str(error.value) and "python -m fastgan_kernels.tune" in str(error.value)


def test_tuned_takes_the_plan_only_where_it_wins(file: Path) -> None:
    dispatch.use("norm_silu_conv=tuned")
    assert plan_for("forward", x(), SHAPE) == LIBRARY
    conv_table.table.cache_clear()
    conv_table.write(file, {}, [WINS, LOSES])
    # 128 channels: half the tile, whose warps stay.
    assert plan_for("forward", x(), SHAPE) == replace(PLAN, n=128)
    assert plan_for("backward", x(), SHAPE) == LIBRARY
    assert not replace(WINS, us=100.0).wins


def test_triton_takes_the_fastest_plan_even_where_it_loses(file: Path) -> None:
    conv_table.write(file, {}, [LOSES])
    dispatch.use("norm_silu_conv=triton")
    first = next(candidates((8, 0), torch.float16, "forward", SHAPE))
    assert plan_for("backward", x(), SHAPE) == fitted(PLAN, "backward", SHAPE) != LIBRARY
    assert plan_for("forward", x(), SHAPE) == first != LIBRARY


@pytest.mark.parametrize("setting", ["library", "norm_silu_conv=reference"])
def test_other_settings_take_the_library(setting: str, file: Path) -> None:
    conv_table.write(file, {}, [WINS])
    dispatch.use(setting)
    assert plan_for("forward", x(), SHAPE) == LIBRARY


def test_shapes_dtypes_and_architectures_are_apart(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(WINS, dtype="bf16", plan=replace(PLAN, tanh=False))
    conv_table.write(file, {}, [WINS, other])
    dispatch.use("norm_silu_conv=tuned")
    for name in ("cin", "cout", "height", "width"):
        assert plan_for("forward", x(), replace(SHAPE, **{name: 16})) == LIBRARY
    assert plan_for("forward", x(), SHAPE).tanh
    found = plan_for("forward", x(torch.bfloat16), SHAPE)
    assert found != LIBRARY and not found.tanh
    assert plan_for("forward", x(torch.float32), SHAPE) == LIBRARY
    monkeypatch.setattr(conv_table, "capability", lambda device: (9, 0))
    assert plan_for("forward", x(), SHAPE) == LIBRARY
