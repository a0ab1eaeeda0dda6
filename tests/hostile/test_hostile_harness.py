"""The harness itself: it notices what a parser must not do, and damages files as it says."""

import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.hostile import harness
from tests.hostile.bad_parser import MISDEEDS
from tests.hostile.damage import damaged
from tests.hostile.harness import Ending, Outcome, assert_harmless, run_apart
from tests.hostile.zips import Entry, archive


def test_every_misdeed_is_noticed() -> None:
    told = {outcome.name: outcome for outcome in run_apart("bad_parser")}
    assert told.keys() == MISDEEDS.keys()
    for name, (_, said) in MISDEEDS.items():
        outcome = told[name]
        assert outcome.ending == ("failed" if said else "valid"), outcome
        assert said in outcome.told, outcome


def outcomes(ending: Ending, count: int) -> list[Outcome]:
    kinds = ["flip", "cut"] * count
    return [Outcome(kinds[i], f"{i}", ending, "", 0.0, 0) for i in range(count)]


@pytest.mark.parametrize(
    ("found", "said"),
    [
        ([*outcomes("refused", 200), *outcomes("valid", 99)], "299 cases, 300"),
        (outcomes("refused", 300), "no case is valid"),
        ([*outcomes("valid", 250), *outcomes("refused", 60)], "hardly any"),
        ([*outcomes("refused", 300), *outcomes("failed", 1)], "1 of 301 cases"),
    ],
)
def test_a_suite_with_a_failure_or_too_few_cases_fails(
    found: list[Outcome], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = [replace(outcome, name=str(i)) for i, outcome in enumerate(found)]
    monkeypatch.setattr(harness, "run_apart", lambda suite: named)
    with pytest.raises(AssertionError, match=said):
        assert_harmless("any")


def test_a_process_that_dies_is_told() -> None:
    with pytest.raises(AssertionError, match="died after nothing"):
        run_apart("absent_suite")


def test_damage_is_the_same_every_time_and_all_different() -> None:
    valid = bytes(range(256)) * 4
    cases = damaged(valid, seed=1, hot=[(0, 16)])
    assert cases == damaged(valid, seed=1, hot=[(0, 16)])
    assert len({case.content for case in cases}) == len(cases) > 230
    flips = [case.content for case in cases if case.kind == "flip"]
    assert len(flips) > 100 and all(len(c) == len(valid) != 0 for c in flips)  # type: ignore[arg-type]
    in_header = [c for c in flips if c[:16] != valid[:16]]  # type: ignore[index]
    assert len(in_header) > len(flips) / 3
    cuts = [case.content for case in cases if case.kind == "cut"]
    assert all(len(c) < len(valid) for c in cuts) and len(cuts) > 50  # type: ignore[arg-type]


def test_the_archives_are_archives(tmp_path: Path) -> None:
    """What is not changed is right: other readers agree."""
    path = tmp_path / "x.zip"
    path.write_bytes(archive([Entry(b"a", b"one" * 99, 8), Entry(b"b", b"two")]))
    with zipfile.ZipFile(path) as opened:
        assert opened.testzip() is None
        assert [opened.read(name) for name in "ab"] == [b"one" * 99, b"two"]
