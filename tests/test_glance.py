"""What is seen at a glance is what a full reading sees."""

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.decode import BrokenBody, parse_page
from worker.glance import MOST_FIELDS, Glance
from worker.ids import pack
from worker.mirror import Delta, Mirror, Span
from worker.model import Page, Place, Seen, User, are_readable

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


def in_full(body: bytes) -> Page:
    return parse_page(body, ASKED_AT, IGNORED)


def bodies(body: bytes) -> list[bytes]:
    return [user.json for user in in_full(body).users]


def taught(*records: dict[str, Any]) -> Glance:
    """Make one that knows the names of these records."""
    glance = Glance(IGNORED)
    glance.learn(bodies(body_of(records)))
    return glance


KNOWING = taught(
    record(
        1,
        **{"display_name": "", "client_metadata": 1, "last_active_at_millis": 1, "é name": 1},
    )
)


def look(body: bytes, glance: Glance = KNOWING) -> Page | None:
    return glance.read_page(body, ASKED_AT, lambda: in_full(body))


def seen(body: bytes, glance: Glance = KNOWING) -> Page:
    page = look(body, glance)
    assert page is not None
    return page


def places_of(page: Page) -> list[Place]:
    return [page.places[number] for number in range(len(page.places))]


def told(page: Page) -> tuple[Any, ...]:
    """Say everything that a page holds."""
    users = [(user.id, user.millis, user.digest, user.record) for user in page.users]
    return (
        users,
        page.unreadable,
        (places_of(page), page.ascending, page.descending, page.next_cursor),
        (page.observed_at, page.size, sorted(page.ids), sorted(page.cleaned)),
    )


records = st.lists(st.tuples(st.integers(0, 30), fields), unique_by=lambda pair: pair[0])


@given(records, st.booleans(), st.none() | text)
def test_page_holds_the_same_as_one_that_was_read_in_full(
    pairs: list[tuple[int, dict[str, Any]]],
    newest_first: bool,  # noqa: FBT001
    next_cursor: str | None,
) -> None:
    ordered = sorted(pairs, key=lambda pair: pair[0], reverse=newest_first)
    body = body_of([record(number, **more) for number, more in ordered], next_cursor)
    page = look(body)
    if page is not None and are_readable(page.users):
        assert told(page) == told(in_full(body))


@given(st.lists(fields, min_size=1, max_size=4), st.lists(fields, min_size=1, max_size=4))
def test_equal_marks_mean_equal_records(
    before: list[dict[str, Any]], after: list[dict[str, Any]]
) -> None:
    """Whatever the glance learnt in between."""
    glance = Glance(IGNORED)
    marks: dict[tuple[int, bytes], bytes] = {}
    for stage in (before, after):
        body = body_of(record(number, **more) for number, more in enumerate(stage))
        full = in_full(body)
        glance.learn(user.json for user in full.users)
        page = look(body, glance)
        for user in page.users if page else ():
            assert marks.setdefault((user.millis, user.mark), user.digest) == user.digest


def test_order_of_the_keys_does_not_matter() -> None:
    one = record(1, display_name="Ada", client_metadata={"b": 1, "a": 2})
    other = dict(reversed(one.items()))
    marks = [seen(body_of([each])).users[0].mark for each in (one, other)]
    assert marks[0] == marks[1]


@pytest.mark.parametrize(
    "change",
    [
        {"display_name": "Eda"},
        {"display_name": None},
        {"client_metadata": {"a": 1}},
        {"client_metadata": {"a": 1.0}},
    ],
)
def test_change_has_another_mark(change: dict[str, Any]) -> None:
    whole = record(1, display_name="Ada", client_metadata={})
    absent = {name: value for name, value in whole.items() if name not in change}
    marks = {seen(body_of([each])).users[0].mark for each in (whole, whole | change, absent)}
    assert len(marks) == 3


def test_ignored_field_has_no_part_in_the_mark_but_is_stored() -> None:
    pages = [seen(body_of([record(1, last_active_at_millis=at)])) for at in (1, 2)]
    assert pages[0].users[0].mark == pages[1].users[0].mark
    assert pages[1].users[0].record["last_active_at_millis"] == 2


DEEP = "[" * 250 + "]" * 250


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
        body_of([{"id": user_id(1), "signed_up_at_millis": True}]),
        body_of([{"id": user_id(1), "signed_up_at_millis": 1.0}]),
        body_of([{"id": user_id(1), "signed_up_at_millis": 2**63}]),
        body_of([record(1), record(1)]),
        body_of([record(2), record(1), record(3)]),
        body_of([record(1, unheard_of=1)]),
        body_of(record(number) for number in range(30_001)),
        body_of([record(1, client_metadata="RAW")]).replace(b"RAW", b"\\ud800"),
    ],
    ids=lambda body: body[:60],
)
def test_whatever_is_odd_needs_a_closer_look(body: bytes) -> None:
    assert look(body) is None


@pytest.mark.parametrize("raw", [DEEP.encode(), b"9" * 5000], ids=["deep", "long number"])
@pytest.mark.parametrize("name", ["client_metadata", "last_active_at_millis"])
def test_record_that_cannot_be_stored_is_found_out_before_it_is_written(
    name: str, raw: bytes
) -> None:
    body = body_of([record(1), record(2, **{name: "RAW"})]).replace(b'"RAW"', raw)
    page = seen(body)
    changed = mirror_of(seen(body_of([record(1)]))).compare(page.users, EVERYTHING, set).changed
    assert [are_readable(users) for users in (changed, page.users)] == [False, False]
    assert are_readable(page.users[:1])
    assert page.in_full is not None
    assert [bad.id for bad in page.in_full().unreadable] == [user_id(2)]


@given(st.binary(max_size=80))
def test_noise_needs_a_closer_look(noise: bytes) -> None:
    assert look(b'{"items":[' + noise) is None


@pytest.mark.parametrize("raw", [b'"a\\u0000b"', b'"a\xffb"'], ids=["NUL", "no UTF-8"])
def test_what_postgres_does_not_take_is_cleaned_once_it_is_unpacked(raw: bytes) -> None:
    body = body_of([record(1, client_metadata="RAW"), record(2)]).replace(b'"RAW"', raw)
    page = seen(body)
    assert page.cleaned == []
    assert page.users[0].record["client_metadata"] == "a\ufffdb"
    assert page.cleaned == [user_id(1)]
    assert [user.digest for user in page.users] == [user.digest for user in in_full(body).users]


def test_long_strings_are_nothing_odd() -> None:
    page = seen(body_of([record(1, display_name="(" * 5000)]))
    assert are_readable(page.users)
    assert page.users[0].record["display_name"] == "(" * 5000


def test_new_names_are_learnt_and_none_is_forgotten() -> None:
    glance = taught(record(1, display_name="Ada"))
    body = body_of([record(1, company="X")])
    assert look(body, glance) is None
    glance.learn(bodies(body))
    for more in ({"company": "X"}, {"display_name": "Ada"}, {}):
        assert look(body_of([record(1, **more)]), glance) is not None


def test_flag_that_becomes_something_else_needs_a_closer_look_and_is_learnt() -> None:
    glance = taught(record(1, has_password=True))
    for value in (True, False, None):
        assert look(body_of([record(1, has_password=value)]), glance) is not None
    marks = {seen(body_of([record(1, has_password=v)]), glance).users[0].mark for v in (True, None)}
    odd = body_of([record(1, has_password="yes")])
    assert look(odd, glance) is None
    glance.learn(bodies(odd))
    marks |= {seen(body_of([record(1, has_password=v)]), glance).users[0].mark for v in ("yes", 1)}
    assert len(marks) == 4


def test_missing_flag_is_not_null() -> None:
    glance = taught(record(1, has_password=True))
    pages = [seen(body_of([each]), glance) for each in (record(1), record(1, has_password=None))]
    assert pages[0].users[0].mark != pages[1].users[0].mark


@pytest.mark.parametrize("name", ['"', "\\", "\n", "a\0"])
def test_names_that_are_escaped_are_not_learnt(name: str) -> None:
    glance = Glance(IGNORED)
    body = body_of([record(1, **{name: 1})])
    glance.learn(bodies(body))
    assert look(body, glance) is None


@pytest.mark.parametrize("raw", [b"1e400", b'"\xff"', b'"\xed\xa0\x80"'])
def test_record_that_orjson_refuses_keeps_no_other_from_being_learnt(raw: bytes) -> None:
    glance = Glance(IGNORED)
    records = [body.replace(b'"RAW"', raw) for body in bodies(body_of([record(1, odd="RAW")]))]
    glance.learn([*records, *bodies(body_of([record(2, company="X")]))])
    assert look(body_of([record(2, company="X")]), glance) is not None
    assert look(body_of([record(1, odd=1)]), glance) is None


def test_names_without_end_are_not_learnt() -> None:
    glance = Glance(IGNORED)
    many = record(1, **{f"name {number}": 1 for number in range(MOST_FIELDS + 1)})
    glance.learn(bodies(body_of([many])))
    assert look(body_of([many]), glance) is None


# With the mirror


def mirror_of(page: Page) -> Mirror:
    mirror = Mirror.load((user.millis, pack(user.id)) for user in page.users)
    mirror.accept(list(page.users))
    return mirror


def unasked() -> set[str]:
    pytest.fail("nothing differs")


class Packed:
    """Records none of which may be unpacked."""

    def json(self, _number: int) -> bytes:
        pytest.fail("marks are enough")

    def joined(self, _low: int, _high: int) -> bytes:
        pytest.fail("marks are enough")

    def digest(self, _number: int) -> bytes:
        pytest.fail("marks are enough")

    def are_readable(self, _numbers: Iterable[int]) -> bool:
        pytest.fail("marks are enough")


def never_unpacked(page: Page) -> Seen:
    """Give the users of a page, none of whom may be unpacked."""
    assert isinstance(page.users, Seen)
    return replace(page.users, records=Packed())


def changed(mirror: Mirror, page: Page) -> list[str]:
    return [user.id for user in mirror.compare(page.users, EVERYTHING, unasked_or(page)).changed]


def unasked_or(page: Page) -> Callable[[], set[str]]:
    return lambda: page.ids


def test_unchanged_page_is_recognized_without_unpacking() -> None:
    body = body_of(record(number, display_name=f"{number}") for number in range(50))
    mirror = mirror_of(seen(body))
    assert mirror.compare(never_unpacked(seen(body)), EVERYTHING, unasked) == Delta()


def test_only_what_has_another_mark_is_unpacked() -> None:
    all_of_them = [record(number, display_name=f"{number}") for number in range(50)]
    mirror = mirror_of(seen(body_of(all_of_them)))
    all_of_them[7]["display_name"] = "Changed"
    assert changed(mirror, seen(body_of(all_of_them))) == [user_id(7)]


def test_mark_is_learnt_where_the_digest_is_the_same() -> None:
    body = body_of(record(number, client_metadata={"a": 1, "b": 2}) for number in range(5))
    mirror = mirror_of(in_full(body))
    assert changed(mirror, seen(body)) == []
    page = seen(body)
    assert mirror.compare(page.users, EVERYTHING, unasked).changed == []
    turned = body_of(record(number, client_metadata={"b": 2, "a": 1}) for number in range(5))
    assert changed(mirror, seen(turned)) == []


def test_user_whose_digest_is_unknown_is_left_to_the_database() -> None:
    page = seen(body_of([record(1)]))
    mirror = mirror_of(page)
    mirror.forget_digest(page.users[0].key)
    assert changed(mirror, page) == [user_id(1)]


@pytest.mark.parametrize("known", [range(5), (0, 1, 2, 4), (0, 2, 4)])
def test_last_one_accepted_is_known_when_the_next_page_begins_with_it(known: Iterable[int]) -> None:
    """Also where it stands apart from the others, and nobody gets a mark."""
    users = seen(body_of(record(number) for number in range(5))).users
    assert isinstance(users, Seen)
    unmarked = replace(users, marks=b"")
    mirror = Mirror.load((users[number].millis, pack(users[number].id)) for number in known)
    mirror.accept([unmarked[1], unmarked[3]])
    chain = unmarked[3:4]
    assert mirror.compare(chain, Span(users[3].key, users[3].key), unasked) == Delta()


def test_users_are_a_sequence() -> None:
    users = seen(body_of(record(number) for number in range(5))).users
    assert isinstance(users, Seen)
    assert [user.id for user in users[1:3]] == [user_id(1), user_id(2)]
    assert (users[-1].id, len(users)) == (user_id(4), 5)
    with pytest.raises(IndexError):
        users[5]
    assert isinstance(users[0], User)
    assert list(users[1:][2:]) == list(users)[3:]
    with pytest.raises(ValueError, match="order"):
        users[::-1]


def test_slice_knows_its_records() -> None:
    body = body_of(
        record(number, display_name=f"{number}\u0000" * (number == 4)) for number in range(5)
    )
    users = seen(body).users
    assert isinstance(users, Seen)
    assert json.loads(users.json) == [user.record for user in users]
    assert json.loads(users[1:][1:2].json) == [users[2].record]
    assert (users[2:].ids, users[2:].packed) == ([u.id for u in users][2:], users.packed[32:])


def test_newcomers_are_a_slice_behind_whom_the_mirror_knows() -> None:
    page = seen(body_of(record(number) for number in range(5)))
    mirror = mirror_of(seen(body_of([record(0)])))
    delta = mirror.compare(page.users, Span(page.users[0].key, page.users[-1].key), unasked)
    assert (delta, delta.newcomers) == (Delta(page.users[1:]), True)
    mirror.accept(delta.changed)
    assert mirror.compare(never_unpacked(page), EVERYTHING, unasked) == Delta()


def test_broken_body_is_broken_in_full() -> None:
    with pytest.raises(BrokenBody):
        in_full(b"{")
