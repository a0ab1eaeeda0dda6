"""A run's state.json, which schedulers and the next start read."""

import json
import os
from pathlib import Path
from typing import Any, get_args

from fastgan.common.run_state import RunState, Status, read_state
from tests.hostile.damage import damaged
from tests.hostile.harness import Case, Suite, assert_harmless

STATE = {"status": "preempted", "nimg": 48_000, "exit_code": 75, "message": "stopped by SIGTERM"}
TEXT = json.dumps(STATE)
BIG = 10**4000
VALUES: dict[str, list[Any]] = {
    "status": ["", "Done", "running ", None, 1, True, [], {}, ["done"], {"done": 1}, "done\n", 0.5],
    "nimg": [-1, 1.0, 1.5, "48000", None, True, [], {}, 2**63, BIG, -BIG, float("nan")],
    "exit_code": ["75", 75.0, True, [], {}, [75], float("inf"), 256, -1000, BIG, -BIG],
    "message": [None, 0, [], {}, True, ["x"], 1.5],
}
TEXTS = {
    "no object": ["null", "true", "3", "[]", '"running"', "[" + TEXT + "]", "NaN", "-Infinity"],
    "syntax": [
        "{", "}", TEXT[:-1], TEXT + "}", TEXT + TEXT, TEXT.replace('"', "'"), "{status: done}",
        TEXT.replace(":", "="), TEXT[:-1] + ",}", "/* c */" + TEXT, TEXT.replace("48000", "4_8"),
        TEXT.replace("48000", "048000"), TEXT.replace("48000", "+48000"),
        TEXT.replace("48000", "0xbb80"), TEXT.replace("48000", "4e4"),
        TEXT.replace("48000", "NaN"), TEXT.replace("48000", "Infinity"),
        TEXT.replace("48000", "9" * 5000), TEXT.replace("48000", "1" + "0" * 60_000),
        TEXT.replace("48000", "1e999999999"), TEXT.replace("stopped", "\\ud8zz"),
        TEXT.replace("stopped", "\\u"), TEXT.replace("stopped", "a\nb"),
        TEXT.replace("stopped", "a\x1b[31m"),
    ],
    "nesting": [
        "[" * 100_000, "[" * 60_000, "[" * 990, "[" * 2000 + "]" * 2000, '{"status":' * 10_000,
        TEXT.replace("48000", "[" * 20_000 + "]" * 20_000),
        TEXT.replace("48000", '{"a":' * 9000 + "1" + "}" * 9000),
    ],
    "size": [
        TEXT + " " * 70_000, " " * 70_000 + TEXT, TEXT.replace("stopped", "x" * 70_000),
        TEXT[:-1] + ', "status": "done"' * 5000 + "}", "[" + "0," * 40_000 + "0]",
        '{"a": "' + "b" * 70_000 + '"}',
    ],
}  # fmt: skip
ODD_BUT_RIGHT = {
    "twice the same key": TEXT[:-1] + ', "nimg": 3}',
    "escapes": TEXT.replace("stopped", "\\u0073\\ud83d\\ude00"),
    "not ASCII": TEXT.replace("stopped", "gestoppt \u00e4"),
    "running": json.dumps({**STATE, "status": "running", "exit_code": None}),
}


def _fields() -> list[Case]:
    cases = [
        Case(
            "value", f"{key} {i}: {repr(v)[:30]}", json.dumps({**STATE, key: v}).encode(), "refused"
        )
        for key, values in VALUES.items()
        for i, v in enumerate(values)
    ]
    for key in STATE:
        others = {k: v for k, v in STATE.items() if k != key}
        cases.append(Case("keys", f"without {key}", json.dumps(others).encode(), "refused"))
        renamed = {**others, key.upper(): STATE[key]}
        cases.append(Case("keys", f"{key} in capitals", json.dumps(renamed).encode(), "refused"))
    for key in ("extra", "__class__", "self", "", "\u0000"):
        surplus = json.dumps({**STATE, key: 1}).encode()
        cases.append(Case("keys", f"also {key!r}", surplus, "refused"))
    return cases


def _places() -> list[Case]:
    return [
        Case("place", "a folder", Path.mkdir, "refused"),
        Case("place", "a pipe that nobody writes to", os.mkfifo, "refused"),
        Case("place", "an endless device", lambda p: p.symlink_to("/dev/zero"), "refused"),
        Case("place", "a link to itself", lambda p: p.symlink_to(p), "valid"),
        Case("place", "a link to nothing", lambda p: p.symlink_to("absent"), "valid"),
        Case("place", "nothing", lambda p: None, "valid"),
    ]


def cases() -> list[Case]:
    texts = [
        Case(kind, f"{i}: {text[:30]!r}", text.encode(), "refused")
        for kind, texts in TEXTS.items()
        for i, text in enumerate(texts)
    ]
    odd = [Case("valid", name, text.encode(), "valid") for name, text in ODD_BUT_RIGHT.items()]
    return [*damaged((TEXT + "\n").encode(), seed=1), *_fields(), *texts, *odd, *_places()]


def read(path: Path) -> None:
    state = read_state(path.parent)
    if state is None:
        assert not path.exists()
        return
    assert type(state) is RunState and state.status in get_args(Status)
    assert type(state.nimg) is int and 0 <= state.nimg < 2**63
    assert state.exit_code is None or (type(state.exit_code) is int and abs(state.exit_code) < 256)
    assert type(state.message) is str and len(state.message) <= 64 * 1024


SUITE = Suite("state.json", "state.json", cases, read)


def test_state_json() -> None:
    assert_harmless(Path(__file__).stem)
