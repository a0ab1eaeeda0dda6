"""The config.yaml of a run directory, which the same command compares itself with."""

import os
import shutil
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from fastgan import config as cfg
from fastgan.launch.run_dir import open_run_dir
from tests.hostile.damage import damaged
from tests.hostile.harness import Case, Suite, assert_harmless

LINE = "seed: 42\n"
ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
)
# Instead of the line `seed: 42`.
LINES = {
    "number": [
        "seed: 43", "seed: -42", "seed: 42.5", "seed: .nan", "seed: .inf", "seed: 1e999",
        "seed: 4_3", "seed: 0x2b", "seed: 0b1111", "seed: 1:1:1", "seed: " + "9" * 5000,
        "seed: 0x" + "f" * 25_000, "seed: " + "1:" * 12_000 + "1", "seed: 1" + "0" * 30_000,
    ],
    "type": [
        "seed: '42'", "seed: [42]", "seed: {a: 42}", "seed: null", "seed:", "seed: true",
        "seed: 2024-01-01", "seed: 2024-99-99", "seed: 2024-01-01T99:99:99Z", "seed: =",
        "seed: ???",
    ],
    "tag": [
        "seed: !!python/object/apply:os.system ['touch executed']",
        "seed: !!python/object/new:os.system ['touch executed']",
        "seed: !!python/name:os.system", "seed: !!python/module:os", "seed: !!python/tuple [1]",
        "seed: !!python/object:fastgan.config.TrainConfig {seed: 42}",
        "seed: !!python/object/apply:subprocess.Popen [[touch, executed]]",
        "seed: !!python/object/apply:builtins.eval ['1']", "seed: !!int forty", "seed: !!float x",
        "seed: !!bool x", "seed: !!binary '*'", "seed: !!binary " + "QUJD" * 50,
        "seed: !!set {a, b}",
        "seed: !!omap [a: 1]", "seed: !!pairs [a: 1]", "seed: !!timestamp x", "seed: !unknown 42",
        "seed: !!map [1]", "seed: !!seq {a: 1}", "seed: !<tag:x> 1",
        "%TAG ! tag:x,2000:\n---\nseed: 1",
    ],
    "interpolation": [
        "seed: ${oc.env:HOME}", "seed: ${oc.env:PATH,42}", "seed: ${oc.decode:42}",
        "seed: ${oc.create:{a: 1}}", "seed: ${seed}", "seed: ${nope}", "seed: ${",
        "seed: ${a:${b:${c}}}",
        "seed: ${package:../../../../etc/passwd}", "seed: " + "${" * 5000, "seed: " + "${a:" * 3000,
    ],
    "key": [
        "? [a, b]\n: 1", "? {a: b}\n: 1", "? ? ? x", "<<: {seed: 43}", "<<: [1, 2]", "<<: 3",
        "42: seed", "null: 1", "true: 1", ".nan: 1", "seed: 1\nseed: 2", "2024-01-01: x",
        "\"\\e[31m\": 1\nloss: {\"\\e[31m\": 1}", "loss: {x" + "y" * 2000 + ": 1}",
    ],
    "text": [
        "seed: \"\\e[2J\\a\"", "seed: \"a\\nb\"", "seed: |\n  a\n  b", "seed: " + "x" * 50_000,
        "seed: \"\\ud800\"", "seed: \"\\x00\"", "seed: \"\\U00110000\"", "seed: \x07",
        "seed: \u2028",
        "seed: @x", "seed: `x`", "seed: *absent", "\tseed: 42", "seed: 42\n\tx",
        "seed: [1", "seed: {a", "seed: 'a", "seed: \"a", "seed: a: b", "- seed", "...\nseed: 1",
        "--- 1\n--- 2", "%YAML 9.9\n---\nseed: 1", "%YAML 1.1\n%YAML 1.1\n---\nseed: 1",
    ],
    "bomb": [
        ALIASES + LINE, "a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}", "seed: &s 42\nkeep: *s",
        "a: &a {x: 1}\n" + "".join(f"b{i}: {{<<: [*a, *a]}}\n" for i in range(1000)),
        "seed: " + "[" * 30_000, "seed: " + "[" * 500 + "]" * 500, "seed: " + "{a: " * 7_000,
        "? " * 14_000, "- " * 14_000, "".join(" " * i + f"a{i}:\n" for i in range(300)),
        "seed: " + "[" * 30 + "]" * 30, "seed: [" + "0," * 12_000 + "0]", "x" * 70_000,
        "".join(f"k{i}: {i}\n" for i in range(2500)), "# " + "x" * 70_000, "a: [[[[[[[[1]]]]]]]]",
        "seed: 'x" + "\n" * 25_000 + "'", "seed: \"" + "\\\\" * 15_000 + "\"", "!" * 30_000,
    ],
}  # fmt: skip
# What may change between two starts: other keys, and what is only looked at.
HARMLESS = ["keep: 9", "device: cuda", "eval: 3", "extra: [1, 2]", "run_dir: elsewhere", "? x"]
HARMLESS += ["extra: &a 42"]


def settings(folder: Path) -> cfg.TrainConfig:
    config = cfg.TrainConfig(run_dir=str(folder), batch=4, total_images="8k", seed=42)
    config.data.path, config.init.path = "digits", "network.safetensors"
    config.optim.lr_g = config.optim.lr_d = 1e-4
    return config


@cache
def text() -> str:
    return OmegaConf.to_yaml(OmegaConf.structured(settings(Path("run"))))


def _places() -> list[Case]:
    return [
        Case("place", "a folder", Path.mkdir, "refused"),
        Case("place", "a pipe that nobody writes to", os.mkfifo, "refused"),
        Case("place", "an endless device", lambda p: p.symlink_to("/dev/zero"), "refused"),
    ]


def cases() -> list[Case]:
    whole = text()
    assert LINE in whole
    changed = [
        Case(
            kind, f"{i}: {line[:40]!r}", whole.replace(LINE, line + "\n").encode("utf-8"), "refused"
        )
        for kind, lines in LINES.items()
        for i, line in enumerate(lines)
    ]
    free = [Case("valid", line, f"{whole}{line}\n".encode(), "valid") for line in HARMLESS]
    long = {"comment": "# " + "x" * 70_000, "list": "extra: [" + "0," * 200_000 + "0]"}
    longer = [
        Case("bomb", f"a long {name} behind", f"{whole}{line}\n".encode(), "refused")
        for name, line in long.items()
    ]
    return [*damaged(whole.encode(), seed=2), *changed, *free, *longer, *_places()]


def read(path: Path) -> None:
    """Takes the run up, which rewrites config.yaml and adds two folders."""
    folder, before = path.parent, path.read_bytes() if path.is_file() else b""
    config = settings(folder)
    assert open_run_dir(config) == folder
    assert path.read_text() == OmegaConf.to_yaml(OmegaConf.structured(config))
    for name in ("samples", "checkpoints"):
        shutil.rmtree(folder / name)
    path.write_bytes(before)


SUITE = Suite("config.yaml", "config.yaml", cases, read, named="case")


def test_config_yaml() -> None:
    assert_harmless(Path(__file__).stem)
