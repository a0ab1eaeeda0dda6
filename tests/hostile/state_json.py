"""A run's state.json, which schedulers and the next start read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from fastgan.common.run_state import RunState, Status, read_state
from tests.hostile.damage import damaged, each, places
from tests.hostile.harness import Case, Suite

STATE = {"status": "preempted", "nimg": 48_000, "exit_code": 75, "message": "stopped by SIGTERM"}
TEXT = json.dumps(STATE)
BIG = 10**4000
VALUES: dict[str, list[Any]] = {
    "status": ["", "Done", "running ", None, 1, True, [], {}, ["done"], {"done": 1}, "done\n", 0.5],
    "nimg": [-1, 1.0, 1.5, "48000", None, True, [], {}, 2**63, BIG, -BIG, float("nan")],
    "exit_code": ["75", 75.0, True, [], {}, [75], float("inf"), 256, -1000, BIG, -BIG],
    "message": [None, 0, [], {}, True, ["x"], 1.5],
}
# Instead of the number of images.
NUMBERS = [
    "4_8", "048000", "+48000", "0xbb80", "4e4", "NaN", "Infinity", "9" * 5000, "1" + "0" * 60_000,
    "1e999999999", "[" * 20_000 + "]" * 20_000, '{"a":' * 9000 + "1" + "}" * 9000,
]  # fmt: skip
TEXTS = {
    "no object": ["null", "true", "3", "[]", '"running"', "[" + TEXT + "]", "NaN", "-Infinity"],
    "syntax": [
        "{", "}", TEXT[:-1], TEXT + "}", TEXT + TEXT, TEXT.replace('"', "'"), "{status: done}",
        TEXT.replace(":", "="), TEXT[:-1] + ",}", "/* c */" + TEXT,
        *(TEXT.replace("stopped", t) for t in ("\\ud8zz", "\\u", "a\nb", "a\x1b[31m")),
        *(TEXT.replace("48000", number) for number in NUMBERS),
    ],
    "nesting": ["[" * 100_000, "[" * 990, "[" * 2000 + "]" * 2000, '{"status":' * 10_000],
    "size": [
        TEXT + " " * 70_000, " " * 70_000 + TEXT, TEXT.replace("stopped", "x" * 70_000),
        TEXT[:-1] + ', "status": "done"' * 5000 + "}", "[" + "0," * 40_000 + "0]",
    ],
}  # fmt: skip
ODD_BUT_RIGHT = [
    TEXT[:-1] + ', "nimg": 3}', TEXT.replace("stopped", "\\u0073\\ud83d\\ude00"),
    TEXT.replace("stopped", "gestoppt \u00e4"),
    json.dumps({**STATE, "status": "running", "exit_code": None}),
]  # fmt: skip


def cases() -> list[Case]:
    values = [json.dumps({**STATE, key: v}) for key, vs in VALUES.items() for v in vs]
    without = [{k: v for k, v in STATE.items() if k != key} for key in STATE]
    other = [{**others, "NIMG": 1} for others in without]
    surplus = [{**STATE, key: 1} for key in ("extra", "__class__", "self", "", "\0")]
    keys = [json.dumps(state) for state in (*without, *other, *surplus)]
    groups = {**TEXTS, "value": values, "keys": keys}
    links: dict[str, Callable[[Path], None]] = {
        "a link to itself": lambda p: p.symlink_to(p),
        "a link to nothing": lambda p: p.symlink_to("absent"),
    }
    return [
        *damaged((TEXT + "\n").encode(), seed=1),
        *each("valid", ODD_BUT_RIGHT, str.encode, "valid"),
        *(case for kind, texts in groups.items() for case in each(kind, texts, str.encode)),
        *(Case("place", name, make, "valid") for name, make in links.items()),
        *places(nothing="valid"),
    ]


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
