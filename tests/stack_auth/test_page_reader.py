"""The fast reader and the careful one have one result, and a fingerprint tells what changed."""

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.ids import pack
from worker.model import Page, Place, User, Users
from worker.stack_auth.careful_reader import parse_page, storable
from worker.stack_auth.page_reader import read_page
from worker.sync.mirror import Delta, Mirror, Span

ASKED_AT = datetime(2026, 11, 21, tzinfo=UTC)
IGNORED = ("last_active_at_millis",)
EVERYTHING = Span(None, None)

text = st.text(max_size=6)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(text, inner, max_size=3),
    max_leaves=6,
)
names = st.sampled_from(["display_name", "client_metadata", "last_active_at_millis", "é name"])
fields = st.dictionaries(names, values)


def user_id(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-000000000000"


def record(number: int, **more: Any) -> dict[str, Any]:
    return {"id": user_id(number), "signed_up_at_millis": 1000 + number, **more}


def body_of(records: Iterable[Any], next_cursor: str | None = None) -> bytes:
    answer = {"items": list(records), "pagination": {"next_cursor": next_cursor}}
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "surrogatepass")


def careful(body: bytes) -> Page:
    return parse_page(body, ASKED_AT, IGNORED)


def look(body: bytes) -> Page | None:
    return read_page(body, ASKED_AT, IGNORED)


def read(body: bytes) -> Page:
    page = look(body)
    assert page is not None
    return page


def places_of(page: Page) -> list[Place]:
    return [page.places[number] for number in range(len(page.places))]


def told(page: Page) -> tuple[Any, ...]:
    """Say everything that a page holds, once its records were looked into."""
    found = storable(page.users, IGNORED)
    return (
        [(user.id, user.millis, user.record) for user in found.users],
        [(bad.id, bad.payload, bad.error) for bad in (*page.unreadable, *found.unreadable)],
        (places_of(page), page.ascending, page.descending, page.next_cursor),
        (page.observed_at, sorted(page.ids), sorted([*page.cleaned, *found.cleaned])),
    )


def fingerprint(**more: Any) -> bytes:
    return read(body_of([record(1, **more)])).users.fingerprint(0)


records = st.lists(st.tuples(st.integers(0, 30), fields), unique_by=lambda pair: pair[0])
odd: st.SearchStrategy[Any] = st.sampled_from([None, True, 1.5, 10**17, -(10**17), "x", [], {}])
odd_records = st.fixed_dictionaries(
    {"id": st.integers(0, 9).map(user_id) | odd, "signed_up_at_millis": st.integers(0, 9) | odd},
    optional={"display_name": text | odd, "client_metadata": odd},
)


@given(records, st.booleans(), st.none() | text)
def test_both_readers_have_one_result(
    pairs: list[tuple[int, dict[str, Any]]],
    newest_first: bool,  # noqa: FBT001
    next_cursor: str | None,
) -> None:
    ordered = sorted(pairs, key=lambda pair: pair[0], reverse=newest_first)
    body = body_of([record(number, **more) for number, more in ordered], next_cursor)
    page = look(body)
    if page is not None:
        assert told(page) == told(careful(body))


@given(st.lists(odd_records | odd, max_size=6), st.none() | text | odd)
def test_what_is_read_fast_is_never_odd(items: list[Any], next_cursor: Any) -> None:
    body = body_of(items, next_cursor)
    page = look(body)
    if page is not None:
        assert told(page) == told(careful(body))


@given(st.lists(fields, min_size=1, max_size=6))
def test_equal_fingerprints_mean_equal_records(profiles: list[dict[str, Any]]) -> None:
    body = body_of(record(number, **more) for number, more in enumerate(profiles))
    page = look(body)
    seen: dict[bytes, tuple[Any, ...]] = {}
    for user in page.users if page else ():
        kept = {name: value for name, value in user.record.items() if name not in IGNORED}
        form = (json.dumps(kept, sort_keys=True),)
        assert seen.setdefault(user.fingerprint, form) == form


def test_order_of_the_names_does_not_matter() -> None:
    one = record(1, display_name="Ada", client_metadata={"b": 1, "a": 2})
    other = dict(reversed(one.items()))
    prints = [read(body_of([each])).users.fingerprint(0) for each in (one, other)]
    assert prints[0] == prints[1]


@pytest.mark.parametrize(
    "change",
    [
        {"display_name": "Eda"},
        {"display_name": None},
        {"client_metadata": {"a": 1}},
        {"client_metadata": {"a": 1.0}},
    ],
)
def test_change_has_another_fingerprint(change: dict[str, Any]) -> None:
    whole = {"display_name": "Ada", "client_metadata": {}}
    absent = {name: value for name, value in whole.items() if name not in change}
    assert len({fingerprint(**each) for each in (whole, whole | change, absent)}) == 3


def test_name_and_value_do_not_change_places() -> None:
    assert fingerprint(a="b", c="d") != fingerprint(a="d", c="b") != fingerprint(b="b", c="d")
    assert fingerprint(a=1, b=2) != fingerprint(a=1, c=2)
    assert fingerprint() != fingerprint(a=None)


def test_ignored_field_has_no_part_in_the_fingerprint_but_is_stored() -> None:
    pages = [read(body_of([record(1, last_active_at_millis=at)])) for at in (1, 2)]
    assert pages[0].users.fingerprints == pages[1].users.fingerprints
    assert pages[1].users[0].record["last_active_at_millis"] == 2


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b'{"items":[]',
        body_of([]),
        body_of([{"id": 7, "signed_up_at_millis": 1}]),
        body_of([{"id": user_id(10).upper(), "signed_up_at_millis": 1}]),
        body_of([{"id": "0000", "signed_up_at_millis": 1}]),
        body_of([{"id": user_id(1)}]),
        body_of([{"signed_up_at_millis": 1}]),
        body_of([{"id": user_id(1), "signed_up_at_millis": True}]),
        body_of([{"id": user_id(1), "signed_up_at_millis": "1"}]),
        body_of([{"id": user_id(1), "signed_up_at_millis": 1.0}]),
        body_of([{"id": user_id(1), "signed_up_at_millis": 2**63}]),
        body_of([record(1), record(1)]),
        body_of([record(2), record(1), record(3)]),
        body_of(record(number) for number in range(30_001)),
        body_of([record(1, client_metadata="RAW")]).replace(b"RAW", b"\\ud800"),
        body_of([record(1)]).replace(b"00000001-", b"\\u0030000001-"),
        b"[" * 100_000,
        b"\xff",
    ],
    ids=lambda body: body[:60],
)
def test_whatever_is_odd_is_left_to_the_careful_reader(body: bytes) -> None:
    assert look(body) is None


@given(st.binary(max_size=80))
def test_noise_is_left_to_the_careful_reader(noise: bytes) -> None:
    assert look(b'{"items":[' + noise) is None


DEEP = b"[" * 250 + b"]" * 250


@pytest.mark.parametrize("raw", [DEEP, b"9" * 5000], ids=["deep", "long number"])
@pytest.mark.parametrize("name", ["client_metadata", "last_active_at_millis"])
def test_record_that_cannot_be_stored_is_put_aside_before_it_is_written(
    name: str, raw: bytes
) -> None:
    body = body_of([record(1), record(2, **{name: "RAW"}), record(3)]).replace(b'"RAW"', raw)
    page = read(body)
    found = storable(page.users, IGNORED)
    assert (found.users.ids, list(found.cleaned)) == ([user_id(1), user_id(3)], [])
    [bad] = found.unreadable
    assert (bad.id, bad.fingerprint) == (user_id(2), page.users.fingerprint(1))


@pytest.mark.parametrize("raw", [b'"a\\u0000b"', b'"a\xffb"'], ids=["NUL", "no UTF-8"])
def test_what_postgres_does_not_take_is_cleaned_and_known_the_next_time(raw: bytes) -> None:
    body = body_of([record(1, client_metadata="RAW"), record(2)]).replace(b'"RAW"', raw)
    page = read(body)
    found = storable(page.users, IGNORED)
    assert list(found.cleaned) == [user_id(1)]
    assert found.users[0].record["client_metadata"] == "a\ufffdb"
    mirror = mirror_of(page)
    mirror.accept(found.users)
    assert mirror.compare(read(body).users, EVERYTHING, unasked) == Delta()


def test_long_strings_are_nothing_odd() -> None:
    users = read(body_of([record(1, display_name="(" * 5000)])).users
    assert storable(users, IGNORED).users[0].record["display_name"] == "(" * 5000


# With the mirror


def mirror_of(page: Page) -> Mirror:
    mirror = Mirror.load((user.millis, pack(user.id)) for user in page.users)
    mirror.accept(page.users)
    return mirror


def unasked() -> set[str]:
    pytest.fail("nothing differs")


def test_unchanged_page_is_recognized() -> None:
    body = body_of(record(number, display_name=f"{number}") for number in range(50))
    assert mirror_of(read(body)).compare(read(body).users, EVERYTHING, unasked) == Delta()


def test_only_what_has_another_fingerprint_is_changed() -> None:
    all_of_them = [record(number, display_name=f"{number}") for number in range(50)]
    mirror = mirror_of(read(body_of(all_of_them)))
    all_of_them[7]["display_name"] = "Changed"
    delta = mirror.compare(read(body_of(all_of_them)).users, EVERYTHING, unasked)
    assert delta.changed.ids == [user_id(7)]


def test_new_users_are_changed_until_the_mirror_accepts_them() -> None:
    page = read(body_of(record(number) for number in range(5)))
    mirror = mirror_of(read(body_of([record(0)])))
    delta = mirror.compare(page.users, Span(page.users.key(0), page.users.key(4)), unasked)
    assert delta == Delta(page.users[1:])
    mirror.accept(delta.changed)
    assert mirror.compare(page.users, EVERYTHING, unasked) == Delta()


# Users in columns


def test_users_are_a_sequence() -> None:
    users = read(body_of(record(number) for number in range(5))).users
    assert [user.id for user in users[1:3]] == [user_id(1), user_id(2)]
    assert (users[-1].id, len(users), users[3:1].ids) == (user_id(4), 5, [])
    with pytest.raises(IndexError):
        users[5]
    assert isinstance(users[0], User)
    assert list(users[1:][2:]) == list(users)[3:]
    assert users[::2].ids == users.only([0, 2, 4]).ids
    assert users.without([user_id(1)]).ids == users.only([0, 2, 3, 4]).ids
    assert [users.count_upto(key) for key in (None, users.key(1), (9_999, ""))] == [0, 2, 5]


def test_users_are_put_into_the_order_of_their_keys() -> None:
    users = list(read(body_of(record(number) for number in range(5))).users)
    assert list(Users.of(reversed(users))) == users


def test_records_are_written_as_they_came() -> None:
    users = read(body_of(record(number, display_name=f"{number}") for number in range(5))).users
    assert json.loads(users.json) == [user.record for user in users]
    assert json.loads(users[1:][1:2].json) == [users[2].record]
    assert users.size == sum(len(user.json) for user in users)
