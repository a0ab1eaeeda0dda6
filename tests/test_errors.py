"""Messages: one printable line, whatever a file or a user put into them."""

import json

import pytest

from fastgan.common.errors import UserError, one_line, shown
from fastgan.common.files import MAX_LEVELS, parse_object


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a\n  b\tc\r\nd ", "a b c d"),
        ("clear \x1b[2J", "clear \\x1b[2J"),
        ("turned \u202e round \ud800", "turned \\u202e round \\ud800"),
        ("gr\u00fcn", "gr\u00fcn"),
    ],
)
def test_a_message_is_one_printable_line(message: str, line: str) -> None:
    assert one_line(message) == str(UserError(message)) == line and line.isprintable()


def test_a_long_message_keeps_its_start_and_its_end() -> None:
    line = one_line("what " + "x" * 100_000 + " is right")
    assert len(line) < 1500 and line.startswith("what x") and line.endswith("x is right")
    assert one_line("x" * 1000) == "x" * 1000


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", "a"),
        ("", ""),
        ("\x1b", "\\x1b"),
        ("x" * 200, "x" * 97 + "..."),
        (ValueError("first\nsecond"), "first"),
        (1.5, "1.5"),
        ([[]], "a list"),
    ],
)
def test_what_is_shown_of_a_value(value: object, text: str) -> None:
    assert shown(value) == text


def test_a_number_of_thousands_of_digits_is_not_shown() -> None:
    assert shown(10**10_000) == "a huge integer" and shown(10**50) == f"{10**50}"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "malformed"),
        (b"\xff", "malformed"),
        ("[" * 100_000, "malformed"),
        ("9" * 5000, "malformed"),
        ("[1]", "no JSON object"),
        (json.dumps({"a": [[]] * 3}).replace("[]", "[" * MAX_LEVELS + "]" * MAX_LEVELS), "levels"),
    ],
)
def test_other_texts_than_objects_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_object(text)


def test_objects_of_many_levels_are_read() -> None:
    levels = MAX_LEVELS - 1
    value = parse_object('{"a": ' + "[" * levels + "]" * levels + "}")
    assert json.dumps(value).count("[") == levels and parse_object('{"a": 1}') == {"a": 1}
