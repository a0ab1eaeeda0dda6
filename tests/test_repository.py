"""What no other test sees: the repository's files, its documents and its experiments."""

import re
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

import pytest
import yaml

from fastgan import config as cfg

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("kernels", "fastgan", "tools", "tests", "benchmarks", "configs", "docs", ".ci")
TEXT = {".py", ".md", ".yaml", ".toml", ".json", ".jsonl", ".svg", ".sbatch", ""}
# An op of kernels/ with its device code, launcher and derivative stays in one file.
MAX_LINES, MAX_LINES_OF_AN_OP = 400, 600
# Assembled, so that this file does not match its own pattern.
ROOTS = "|".join(("work", "root", "home", "Users"))
MACHINE_PATH = re.compile(rf"(?<![\w.:/-])/(?:{ROOTS})/")

EXPERIMENTS = {path.stem: path for path in (ROOT / "configs/experiment").glob("*.yaml")}


def text_files() -> list[Path]:
    """What is, or is about to be, tracked."""
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*")]
    top = [path for path in ROOT.iterdir() if path.name in ("Makefile", "LICENSE")]
    files = [*inside, *top, *ROOT.glob("*.md"), *ROOT.glob("*.toml"), *ROOT.glob(".*.yaml")]
    return [p for p in files if p.is_file() and p.suffix in TEXT and "__pycache__" not in p.parts]


def python_files() -> list[Path]:
    return [path for path in text_files() if path.suffix == ".py"]


def documents() -> list[Path]:
    return [path for path in text_files() if path.suffix == ".md"]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_files_are_found() -> None:
    found = {name_of(path) for path in text_files()}
    assert {"Makefile", "README.md", "pyproject.toml", ".ci/run", "fastgan/launch/cli.py"} <= found
    assert len(python_files()) > 80 and len(documents()) >= 8


def test_no_machine_path() -> None:
    found = [
        f"{name_of(path)}:{number}"
        for path in text_files()
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1)
        if MACHINE_PATH.search(line)
    ]
    assert found == []
    assert MACHINE_PATH.search("see /" + "home/someone/x") and not MACHINE_PATH.search(
        "a/ro" + "ot/b"
    )


def test_python_files_are_short_and_ascii() -> None:
    most = {p: MAX_LINES_OF_AN_OP if "kernels" in p.parts else MAX_LINES for p in python_files()}
    assert [name_of(p) for p, n in most.items() if len(p.read_text().splitlines()) > n] == []
    assert [name_of(p) for p in python_files() if not p.read_bytes().isascii()] == []


def test_links_between_documents_resolve() -> None:
    broken = []
    for path in documents():
        for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
            if re.match(r"[a-z]+:", link):
                continue
            file, _, anchor = link.partition("#")
            target = path.parent / file if file else path
            if not target.exists() or (anchor and anchor not in anchors(target)):
                broken.append(f"{name_of(path)}: {link}")
    assert broken == []


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {
        re.sub(r"[^\w -]", "", heading).strip().lower().replace(" ", "-") for heading in headings
    }


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiments_say_their_name_and_what_is_published(name: str) -> None:
    content = yaml.safe_load(EXPERIMENTS[name].read_text())
    assert content["experiment_name"] == name
    assert "published" in content
    published = content["published"]
    assert published is None or {"fid", "nfe"} <= published.keys()


def test_documents_name_the_experiments_that_exist() -> None:
    for path in documents():
        named = re.findall(r"experiment=([a-z0-9_]+)", path.read_text())
        assert set(named) <= EXPERIMENTS.keys(), name_of(path)
    stable = (ROOT / "docs/stability.md").read_text()
    listed = stable.partition("**Experiments**:")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z0-9_]+)`", listed)) == EXPERIMENTS.keys()


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for path in documents():
        # In code only: prose also uses the verb.
        text = path.read_text()
        named = set(re.findall(r"(?:`|^)make ([a-z]+(?:-[a-z0-9]+)*)", text, re.MULTILINE))
        assert named <= targets, name_of(path)


def test_documented_files_exist() -> None:
    folders = "|".join(folder for folder in FOLDERS if folder != ".ci")
    pattern = re.compile(rf"(?<![\w/.-])(?:{folders})/[\w/.-]+\.\w+")
    for path in documents():
        # NAME stands for a name of the reader's.
        named = [name for name in pattern.findall(path.read_text()) if "NAME" not in name]
        assert [name for name in named if not (ROOT / name).exists()] == [], name_of(path)


def keys_of(schema: type, prefix: str = "") -> set[str]:
    """The dotted keys of a configuration dataclass."""
    keys: set[str] = set()
    hints = get_type_hints(schema)
    for field in fields(schema):
        key = prefix + field.name
        kind = hints[field.name]
        nested = isinstance(kind, type) and is_dataclass(kind)
        keys |= keys_of(kind, f"{key}.") if nested else {key}
    return keys


def test_configuration_page_lists_exactly_the_keys() -> None:
    schemas = (cfg.TrainConfig, cfg.PretrainConfig, cfg.SampleConfig, cfg.EvaluateConfig)
    text = (ROOT / "docs/configuration.md").read_text()
    listed = set(re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE))
    assert listed == set().union(*(keys_of(schema) for schema in schemas))
