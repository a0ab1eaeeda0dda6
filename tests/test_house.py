"""The plan of docs/architecture.md, read off the imports: six floors, no way up, no circle."""

import ast
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "fastgan_kernels": 1,
    "fastgan.common": 1,
    "fastgan.config": 1,
    "fastgan.models": 2,
    "fastgan.discriminator": 2,
    "fastgan.data": 2,
    "fastgan.evaluation": 2,
    "fastgan.checkpoint": 2,
    "fastgan.training": 3,
    "fastgan.launch": 4,
    "fastgan.performance": 5,
    "fastgan.run_report": 5,
    "fastgan.export": 5,
    "benchmarks": 5,
    "fastgan.train": 6,
    "fastgan.pretrain": 6,
    "fastgan.sample": 6,
    "fastgan.evaluate": 6,
    "tools": 6,
}
# Who must not import what, beyond the floors.
FENCES = {
    "fastgan.": {"benchmarks", "tools"},
    "fastgan.config": {"fastgan"},
    **{
        f"fastgan.{room}": {"hydra", "omegaconf"}
        for room in ("common", "models", "discriminator", "data", "evaluation", "checkpoint")
    },
    "fastgan.training": {"hydra", "omegaconf", "fastgan.config"},
    "fastgan.run_report": {"hydra", "omegaconf"},
    "fastgan.export": {"hydra", "omegaconf"},
}
INSTRUMENTS = (
    "benchmarks",
    "fastgan.performance",
    "fastgan_kernels.aot",
    "fastgan_kernels.tune",
    "tools.budget",
    "tools.gpu_report",
    "tools.mutants",
    "tools.parity",
    "tools.profile_step",
)


def module_name(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    parts = parts[1:] if parts[0] == "kernels" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {
    module_name(path): path
    for folder in ("kernels/fastgan_kernels", "fastgan", "benchmarks", "tools")
    for path in (ROOT / folder).rglob("*.py")
}


def imports(path: Path, known: set[str]) -> set[str]:
    """What a file imports anywhere, functions included: modules of `known`, or else the names."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = inside & known
            found |= modules | ({node.module} if modules != inside else set())
    return found


IMPORTS = {name: imports(path, set(FILES)) for name, path in FILES.items()}


def lies_in(module: str, room: str) -> bool:
    return module == room or module.startswith(room.rstrip(".") + ".")


def floor(module: str) -> int | None:
    """The floor of the room that holds the module; None for another library."""
    return next((level for room, level in FLOORS.items() if lies_in(module, room)), None)


def ways_up(graph: dict[str, set[str]]) -> list[str]:
    return [
        f"{module} -> {other}"
        for module, others in graph.items()
        for other in others
        if (floor(other) or 0) > (floor(module) or 0)
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of an import circle, if there is one."""
    try:
        TopologicalSorter({m: others - {m} for m, others in graph.items()}).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_every_file_has_a_floor() -> None:
    assert len(FILES) > 80
    assert [name for name in FILES if floor(name) is None and name != "fastgan"] == []


def test_imports_point_down() -> None:
    assert ways_up(IMPORTS) == []
    assert ways_up({"fastgan.models.x": {"fastgan.training.step"}})
    # Commands call each other through launch, rooms of one floor do not lean on each other's tools.
    assert circle(IMPORTS) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


@pytest.mark.parametrize("room", FENCES)
def test_fences(room: str) -> None:
    crossed = {
        f"{module} -> {other}"
        for module, others in IMPORTS.items()
        for other in others
        if lies_in(module, room) and any(lies_in(other, f) for f in FENCES[room])
    }
    assert crossed == set()


def test_kernels_stand_alone() -> None:
    """Tensors only: torch, triton, the standard library, and apex and xformers if they exist."""
    allowed = {"torch", "triton", "fastgan_kernels", "apex", "xformers"} | sys.stdlib_module_names
    wrong = {
        f"{module} -> {other}"
        for module, others in IMPORTS.items()
        for other in others
        if lies_in(module, "fastgan_kernels") and other.partition(".")[0] not in allowed
    }
    assert wrong == set()


def test_the_house_stays_small() -> None:
    lines = {name: len(path.read_text().splitlines()) for name, path in FILES.items()}
    instruments = sum(n for m, n in lines.items() if any(lies_in(m, i) for i in INSTRUMENTS))
    assert len(FILES) <= 135
    assert sum(lines.values()) <= 19_700
    assert instruments <= 0.31 * (sum(lines.values()) - instruments)
    assert all(path.read_text().strip() for path in FILES.values()), "an empty file"
