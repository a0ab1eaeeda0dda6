"""The config.yaml of a run directory, which the same command compares itself with."""

import shutil
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from fastgan import config as cfg
from fastgan.launch.run_dir import open_run_dir
from tests.hostile.damage import damaged, each, places
from tests.hostile.harness import Case, Suite

LINE = "seed: 42\n"
ALIASES = "a0: &a0 [x, x]\n" + "".join(
    f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)
)
# Instead of the value of `seed`.
VALUES = {
    "number": [
        "43", "-42", "42.5", ".nan", ".inf", "1e999", "4_3", "0x2b", "0b1111", "1:1:1", "9" * 5000,
        "0x" + "f" * 25_000, "1:" * 12_000 + "1",
    ],
    "type": [
        "'42'", "[42]", "{a: 42}", "null", "", "true", "2024-01-01", "2024-99-99",
        "2024-01-01T99:99:99Z", "=", "???",
    ],
    "tag": [
        *(f"!!python/object/{how}:os.system ['touch executed']" for how in ("apply", "new")),
        "!!python/name:os.system", "!!python/module:os", "!!python/tuple [1]",
        "!!python/object:fastgan.config.TrainConfig {seed: 42}",
        "!!python/object/apply:subprocess.Popen [[touch, executed]]", "!!int forty", "!!float x",
        "!!bool x", "!!binary '*'", "!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]",
        "!!timestamp x", "!unknown 42", "!!map [1]", "!!seq {a: 1}", "!<tag:x> 1",
    ],
    "interpolation": [
        "${oc.env:HOME}", "${oc.env:PATH,42}", "${oc.decode:42}", "${oc.create:{a: 1}}", "${seed}",
        "${nope}", "${", "${a:${b:${c}}}", "${package:../../../../etc/passwd}", "${" * 5000,
    ],
    "text": [
        "\"\\e[2J\\a\"", "\"a\\nb\"", "|\n  a\n  b", "x" * 50_000, "\"\\ud800\"", "\"\\x00\"",
        "\"\\U00110000\"", "\x07", "\u2028", "@x", "`x`", "*absent", "[1", "{a", "'a", "\"a",
        "a: b", "42\n\tx", "'x" + "\n" * 25_000 + "'", "\"" + "\\\\" * 15_000 + "\"",
    ],
    "bomb": [
        "[" * 30_000, "[" * 500 + "]" * 500, "{a: " * 7_000, "[" * 30 + "]" * 30,
        "[" + "0," * 12_000 + "0]",
    ],
}  # fmt: skip
# Instead of the whole line.
LINES = {
    "key": [
        "? [a, b]\n: 1", "? {a: b}\n: 1", "? ? ? x", "<<: {seed: 43}", "<<: [1, 2]", "<<: 3",
        "42: seed", "null: 1", "true: 1", ".nan: 1", "seed: 1\nseed: 2", "2024-01-01: x",
        "\"\\e[31m\": 1\nloss: {\"\\e[31m\": 1}", "loss: {x" + "y" * 2000 + ": 1}",
        "\tseed: 42", "- seed", "...\nseed: 1", "--- 1\n--- 2", "%YAML 9.9\n---\nseed: 1",
    ],
    "bomb": [
        ALIASES + LINE, "a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}", "seed: &s 42\nkeep: *s",
        "a: &a {x: 1}\n" + "".join(f"b{i}: {{<<: [*a, *a]}}\n" for i in range(1000)),
        "? " * 14_000, "- " * 14_000, "".join(" " * i + f"a{i}:\n" for i in range(300)),
        "x" * 70_000, "".join(f"k{i}: {i}\n" for i in range(2500)), "# " + "x" * 70_000,
        "!" * 30_000,
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


def cases() -> list[Case]:
    whole = text()
    assert LINE in whole
    found = damaged(whole.encode(), seed=2)
    for kind, values in VALUES.items():
        found += each(kind, values, lambda v: whole.replace(LINE, f"seed: {v}\n").encode())
    for kind, lines in LINES.items():
        found += each(kind, lines, lambda line: whole.replace(LINE, f"{line}\n").encode())
    long = ["# " + "x" * 70_000, "extra: [" + "0," * 200_000 + "0]"]
    found += each("long", long, lambda line: f"{whole}{line}\n".encode())
    found += each("valid", HARMLESS, lambda line: f"{whole}{line}\n".encode(), "valid")
    # Without the file the folder is that of a new run.
    return [*found, *places()[:-1]]


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
