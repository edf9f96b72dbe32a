"""What differs between two records: exactly what Postgres finds, and where."""

import json
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.cli.plan.json_diff import ABSENT, as_json, differences, read_exactly, readable


def told(old: Any, new: Any, *ignored: str) -> list[tuple[str, Any, Any]]:
    return [(each.path, each.old, each.new) for each in differences(old, new, ignored)]


def test_equal_records_have_no_differences() -> None:
    record = {"a": [1, {"b": None}], "c": {"d": 1.5}}
    assert told(record, json.loads(json.dumps(record))) == []
    assert told({}, {}) == []


def test_paths_lead_into_objects_and_stop_at_lists() -> None:
    old = {"a": {"b": {"c": 1, "d": 2}}, "e": [1, {"f": 2}], "g": 1}
    new = {"a": {"b": {"c": 3, "d": 2}}, "e": [1, {"f": 3}], "g": 1}
    assert told(old, new) == [("a.b.c", 1, 3), ("e", [1, {"f": 2}], [1, {"f": 3}])]


def test_what_is_not_there_is_not_null() -> None:
    new = {"b": {"c": None}, "d": {"e": 1}}
    assert told({"a": None, "b": {}}, new) == [
        ("a", None, ABSENT),
        ("b.c", ABSENT, None),
        ("d", ABSENT, {"e": 1}),
    ]


def test_an_object_that_was_something_else_is_one_change() -> None:
    assert told({"a": None}, {"a": {"b": 1}}) == [("a", None, {"b": 1})]
    assert told({"a": {"b": 1}}, {"a": []}) == [("a", {"b": 1}, [])]


def test_ignored_fields_are_no_difference_but_their_names_deeper_down_are() -> None:
    old, new = {"seen": 1, "a": {"seen": 1}}, {"seen": 2, "a": {"seen": 2}}
    assert told(old, new, "seen") == [("a.seen", 1, 2)]


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("theme", "m.theme"),
        ("_x9", "m._x9"),
        ("9x", 'm."9x"'),
        ("my key", 'm."my key"'),
        ("a.b", 'm."a.b"'),
        ("", 'm.""'),
        ('say "hi"', r'm."say \"hi\""'),
        ("Zoë", 'm."Zoë"'),
        ("a\nb\x1b[2J\u202e\x9b", r'm."a\nb\u001b[2J\u202e\u009b"'),
    ],
)
def test_keys_that_are_no_identifiers_are_quoted(key: str, path: str) -> None:
    """Nothing of them may act upon a terminal."""
    assert [each[0] for each in told({"m": {}}, {"m": {key: 1}})] == [path]


@pytest.mark.parametrize(("old", "new"), [("true", "1"), ("0", "false"), ("[true]", "[1]")])
def test_truth_is_no_number(old: str, new: str) -> None:
    assert len(told({"a": read_exactly(old)}, {"a": read_exactly(new)})) == 1


@pytest.mark.parametrize(
    ("text", "written"),
    [
        ("1.5", "1.5"),
        ("0.1", "0.1"),
        ('{"a":[1.25,null]}', '{"a": [1.25, null]}'),
        ("0.12345678901234567890123", '"0.12345678901234567890123"'),
        ('"Zo\\u00eb\\u0007"', '"Zoë\\u0007"'),
        ("1" * 5000, f'"{"1" * 5000}"'),
    ],
)
def test_values_are_written_as_they_are(text: str, written: str) -> None:
    """What no double holds is written as text."""
    value = read_exactly(text)
    assert readable(value) == written
    assert json.loads(as_json(value)) == json.loads(written)


numbers = st.integers(-(10**20), 10**20) | st.floats(allow_nan=False, allow_infinity=False)
exact = st.sampled_from(["1", "1.0", "1e2", "100", "-0.0", "0", "0.1", "0.10000000000000000001"])
values = st.recursive(
    st.none()
    | st.booleans()
    | numbers
    | st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from("ab"), inner),
    max_leaves=4,
)
texts = exact | values.map(json.dumps)


EQUAL = "select array(select a::jsonb = b::jsonb from unnest(%s::text[], %s::text[]) t (a, b))"


@pytest.fixture(scope="module")
def asking(postgres_url: str) -> Iterator[psycopg.Connection]:
    with psycopg.connect(postgres_url) as conn:
        yield conn


@given(st.lists(st.tuples(texts, texts), min_size=1, max_size=9))
def test_nothing_differs_exactly_where_postgres_finds_nothing(
    asking: psycopg.Connection, pairs: list[tuple[str, str]]
) -> None:
    equal = [not told({"a": read_exactly(a)}, {"a": read_exactly(b)}) for a, b in pairs]
    assert asking.execute(EQUAL, list(map(list, zip(*pairs, strict=True)))).fetchone() == (equal,)
