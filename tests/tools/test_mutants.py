"""The list of mutants fits the code as it is; `python tools/mutants.py` runs them."""

import ast
from pathlib import Path

import pytest

from tools.mutants import ROOT, Mutant, mutants

MUTANTS = mutants()


def test_there_are_enough() -> None:
    assert len(MUTANTS) >= 12
    assert len({mutant.what for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.what)
def test_mutants_apply_and_name_existing_tests(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    assert source.count(mutant.right) == 1
    ast.parse(source.replace(mutant.right, mutant.wrong))
    path, _, name = mutant.test.partition("::")
    tree = ast.parse((ROOT / Path(path)).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert not name or name.split("[")[0] in functions
