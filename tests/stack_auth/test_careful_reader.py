"""How answers are read: one odd record never costs the page it stands on."""

import json
import re
from collections.abc import Callable
from datetime import UTC, datetime
from random import Random
from traceback import format_exception
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.places import SAMPLES
from worker.model import (
    LARGEST_PAGE,
    MAX_MILLIS,
    MIN_MILLIS,
    Page,
    Place,
    Unreadable,
    User,
    last_key,
)
from worker.stack_auth.careful_reader import (
    MAX_RECORDS,
    BrokenBody,
    parse_page,
    parse_user,
)
from worker.stack_auth.fingerprint import fingerprint

ASKED_AT = datetime(2026, 11, 21, tzinfo=UTC)
IGNORED = ["last_active_at_millis"]
SIGN_UP = 1795220657790
ID = "637a92dd-1790-4469-81a9-9c88e077a18f"
NEIGHBOUR_ID = "44431c56-ab7d-440f-935e-58f237ec991b"
NEIGHBOUR = {"id": NEIGHBOUR_ID, "signed_up_at_millis": SIGN_UP + 1, "display_name": '[{"\\}]'}
SURROGATE_NEIGHBOUR = NEIGHBOUR | {"display_name": "\ud800"}

UNSTORABLE = "\0\ud800\udbff\udc00\udfff"
text = st.text(st.characters(exclude_categories=()) | st.sampled_from(UNSTORABLE), max_size=8)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=10,
)


def body_of(*items: Any, next_cursor: str | None = None) -> bytes:
    answer = {"items": items, "is_paginated": True, "pagination": {"next_cursor": next_cursor}}
    return json.dumps(answer).encode()


def parse(body: bytes) -> Page:
    return parse_page(body, ASKED_AT, IGNORED)


def record(**fields: Any) -> dict[str, Any]:
    return {"id": ID, "signed_up_at_millis": SIGN_UP} | fields


def with_raw(raw: bytes, *neighbours: Any) -> bytes:
    """Write a page whose first user has these bytes as client_metadata."""
    return body_of(record(client_metadata="RAW"), *neighbours).replace(b'"RAW"', raw, 1)


def read_user(body: bytes) -> User:
    """Read the one user that is on the page beside the neighbour."""
    (user,) = [user for user in parse(body).users if user.id != NEIGHBOUR_ID]
    return user


def read_unreadable(body: bytes) -> Unreadable:
    page = parse(body)
    assert [user.id for user in page.users] == [NEIGHBOUR_ID]
    (bad,) = page.unreadable
    return bad


def sample_body(name: str) -> bytes:
    return (SAMPLES / name).read_bytes().partition(b"\n\n")[2]


def storable(value: Any) -> Any:
    """Say what a value must be after cleaning, character by character."""
    match value:
        case str():
            return "".join(
                "\ufffd" if char == "\0" or "\ud800" <= char <= "\udfff" else char for char in value
            )
        case list():
            return [storable(item) for item in value]
        case dict():
            return {storable(name): storable(value[name]) for name in sorted(value)}
        case _:
            return value


def nested_arrays(levels: int) -> bytes:
    return b"[" * levels + b"]" * levels


def nested_objects(levels: int) -> bytes:
    return b'{"a":' * (levels - 1) + b"{}" + b"}" * (levels - 1)


# Answers of a real server.


def test_whole_list_of_a_real_server_is_read() -> None:
    body = sample_body("list-everything.http")
    page = parse(body)
    items = json.loads(body)["items"]
    assert [user.record for user in page.users] == items
    assert page.places[0] == Place(items[0]["id"], items[0]["signed_up_at_millis"])
    assert page.places[-1] == Place(items[-1]["id"], items[-1]["signed_up_at_millis"])
    assert last_key(page.places) == (items[-1]["signed_up_at_millis"], items[-1]["id"])
    assert page.ascending
    assert page.next_cursor is None
    assert page.observed_at == ASKED_AT
    assert (page.unreadable, page.cleaned) == ((), ())


@pytest.mark.parametrize(
    "name", ["list-second-page-by-last-user.http", "list-second-page-by-next-cursor.http"]
)
def test_pages_of_a_real_server_continue_one_another(name: str) -> None:
    first = parse(sample_body("list-first-page-limit-3.http"))
    second = parse(sample_body(name))
    assert len(first.users) == 3
    assert second.ascending
    assert {first.places[-1], Place(str(first.next_cursor), second.users[0].millis)} & {
        second.places[0]
    }


def test_newest_first_does_not_ascend() -> None:
    page = parse(sample_body("list-newest-first-limit-2.http"))
    assert not page.ascending
    assert [user.key for user in page.users] == sorted(user.key for user in page.users)


def test_user_of_a_real_server_is_read() -> None:
    body = sample_body("user-rich.http")
    single = parse_user(body, ASKED_AT, IGNORED)
    assert isinstance(single.found, User)
    assert single.found.record == json.loads(body)
    assert single.observed_at == ASKED_AT
    assert not single.cleaned


def test_empty_list_is_an_empty_page() -> None:
    page = parse(sample_body("list-cursor-of-deleted-user.http"))
    assert (len(page.users), page.unreadable, page.ids) == (0, (), set())
    assert (len(page.places), page.next_cursor) == (0, None)
    assert page.ascending


# Digests.


@given(st.dictionaries(text, json_values, max_size=6), st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_order_of_names_does_not_change_the_fingerprint(
    metadata: dict[str, Any], random: Random
) -> None:
    fields = list(record(client_metadata=metadata).items())
    names = list(metadata)
    random.shuffle(fields)
    random.shuffle(names)
    shuffled = dict(fields) | {"client_metadata": {name: metadata[name] for name in names}}
    plain = read_user(body_of(record(client_metadata=metadata)))
    assert read_user(body_of(shuffled)).fingerprint == plain.fingerprint


@given(json_values)
@example(2**64 + 1)
@example(2.0**70)
@example(-0.0)
@example("\0")
@settings(max_examples=100)
def test_fingerprint_is_the_same_whichever_parser_read_the_page(metadata: Any) -> None:
    alone = read_user(body_of(record(client_metadata=metadata)))
    beside = read_user(body_of(record(client_metadata=metadata), SURROGATE_NEIGHBOUR))
    assert alone.fingerprint == beside.fingerprint
    assert alone.record == beside.record


@pytest.mark.parametrize("name", ["list-everything.http", "list-first-page-limit-3.http"])
def test_real_users_have_the_same_fingerprint_whichever_parser_read_them(name: str) -> None:
    body = sample_body(name)
    items = json.loads(body)["items"]
    slow = parse(
        body_of(*items, {"id": "f" * 8 + ID[8:], "signed_up_at_millis": 2 * SIGN_UP, "n": "\ud800"})
    )
    assert len(slow.cleaned) == 1
    assert [user.fingerprint for user in slow.users[:-1]] == [
        user.fingerprint for user in parse(body).users
    ]


def test_ignored_field_does_not_change_the_fingerprint_but_stays_in_the_record() -> None:
    one = read_user(body_of(record(last_active_at_millis=1)))
    other = read_user(body_of(record(last_active_at_millis=2)))
    assert one.fingerprint == other.fingerprint
    assert other.record["last_active_at_millis"] == 2


def test_any_other_change_changes_the_fingerprint() -> None:
    bodies = [
        body_of(record()),
        body_of(record(display_name=None)),
        body_of(record(display_name="Ada")),
        body_of(record(client_metadata={"last_active_at_millis": 1})),
        body_of(record(client_metadata={"last_active_at_millis": 2})),
        body_of(record(client_metadata=1)),
        body_of(record(client_metadata=True)),
        body_of(record(signed_up_at_millis=SIGN_UP + 1)),
    ]
    assert len({read_user(body).fingerprint for body in bodies}) == len(bodies)


# Characters that Postgres does not take.


@given(json_values)
@settings(max_examples=100)
def test_any_metadata_comes_through_as_it_is_but_for_unstorable_characters(metadata: Any) -> None:
    body = body_of(record(client_metadata=metadata))
    sent = json.loads(body)["items"][0]
    page = parse(body)
    assert [user.record for user in page.users] == [storable(sent)]
    assert page.cleaned == ((ID,) if storable(sent) != sent else ())


@given(text, text, st.integers(0, 150))
def test_unstorable_characters_are_replaced_at_any_depth(name: str, value: str, depth: int) -> None:
    metadata: Any = {name: value}
    for _ in range(depth):
        metadata = [metadata]
    user = read_user(body_of(record(client_metadata=metadata, display_name="\0")))
    assert not re.search("[\0\ud800-\udfff]", json.dumps(user.record, ensure_ascii=False))


@pytest.mark.parametrize("escaped", [rb"\u0000", rb"\ud800", rb"\uDFFF", rb"\udc00\ud800"])
@pytest.mark.parametrize(
    "form", [b'"a%bz"', b'{"a%bz":1}', b'[[{"k":["a%bz"]}]]', b'{"a":{"a%bz":{}}}']
)
def test_unstorable_character_becomes_a_replacement_and_the_id_is_told(
    escaped: bytes, form: bytes
) -> None:
    page = parse(with_raw(form.replace(b"%b", escaped), NEIGHBOUR))
    user = page.users[0]
    clean = form.decode().replace("%b", "\ufffd" * (len(escaped) // 6))
    assert user.record["client_metadata"] == json.loads(clean)
    assert page.cleaned == (ID,)
    assert [user.id for user in page.users] == [ID, NEIGHBOUR_ID]


def test_surrogate_pair_is_an_ordinary_character() -> None:
    page = parse(with_raw(rb'"\ud83d\ude00\u0000"'))
    assert page.users[0].record["client_metadata"] == "\N{GRINNING FACE}\ufffd"


@pytest.mark.parametrize(
    "raw", [rb'"\\u0000"', rb'"\\ud800"', rb'{"\\u0000":"C:\\u0000\\\\u0000"}', '"�"'.encode()]
)
@pytest.mark.parametrize("neighbours", [(), (SURROGATE_NEIGHBOUR,)])
def test_text_that_only_looks_like_an_escape_is_left_alone(
    raw: bytes, neighbours: tuple[Any, ...]
) -> None:
    page = parse(with_raw(raw, *neighbours))
    assert page.users[0].record["client_metadata"] == json.loads(raw)
    assert ID not in page.cleaned


@pytest.mark.parametrize("raw", [b'"a\xffz"', b'"a\xc3z"', b'"a\x80z"', b'{"a\xffz":1}'])
def test_bytes_that_are_no_utf8_become_a_replacement(raw: bytes) -> None:
    page = parse(with_raw(raw, NEIGHBOUR))
    assert page.users[0].record["client_metadata"] in ("a\ufffdz", {"a\ufffdz": 1})
    assert page.cleaned == (ID,)
    assert page.users[1].record == NEIGHBOUR


def test_bare_control_characters_in_a_string_cost_nobody_the_page() -> None:
    page = parse(with_raw(b'"a\x00b\x01c"', NEIGHBOUR))
    assert [user.record.get("client_metadata") for user in page.users] == ["a\ufffdb\x01c", None]


def test_surrogate_written_as_utf8_becomes_replacements() -> None:
    user = read_user(with_raw(b'"\xed\xa0\x80"'))
    assert set(user.record["client_metadata"]) == {"\ufffd"}


def test_names_that_become_one_are_the_same_in_every_order() -> None:
    one = read_user(with_raw(rb'{"\u0000":1,"\ud800":2}'))
    other = read_user(with_raw(rb'{"\ud800":2,"\u0000":1}'))
    assert one.fingerprint == other.fingerprint
    assert one.record == other.record


def test_single_user_tells_that_it_was_cleaned() -> None:
    single = parse_user(json.dumps(record(display_name="\0")).encode(), ASKED_AT, IGNORED)
    assert isinstance(single.found, User)
    assert single.found.record["display_name"] == "\ufffd"
    assert single.cleaned


# Records that the table cannot hold.


@pytest.mark.parametrize(
    "millis", ["1.5", "1e3", '"5"', '"x"', "null", "true", "[]", "{}", "1e5000"]
)
def test_sign_up_that_is_no_integer_is_unreadable(millis: str) -> None:
    body = body_of(record(signed_up_at_millis="RAW"), NEIGHBOUR).replace(b'"RAW"', millis.encode())
    bad = read_unreadable(body)
    assert bad.id == ID
    assert bad.error == "signed_up_at_millis is not an integer"


def test_missing_sign_up_is_unreadable() -> None:
    assert read_unreadable(body_of({"id": ID}, NEIGHBOUR)).id == ID


@pytest.mark.parametrize("millis", [MIN_MILLIS - 1, MAX_MILLIS + 1, 2**63, -(2**63), 2**64, 10**30])
def test_sign_up_out_of_the_range_of_timestamptz_is_unreadable(millis: int) -> None:
    bad = read_unreadable(body_of(record(signed_up_at_millis=millis), NEIGHBOUR))
    assert (bad.id, bad.error) == (ID, "signed_up_at_millis is out of the range of timestamptz")


@pytest.mark.parametrize("millis", [MIN_MILLIS, -1, 0, MAX_MILLIS])
def test_sign_up_within_the_range_of_timestamptz_is_read(millis: int) -> None:
    assert read_user(body_of(record(signed_up_at_millis=millis))).millis == millis


@pytest.mark.parametrize("user_id", [ID.upper(), ID[:-1], f"{ID}\n", "", "x", None, 5, [ID], "\0"])
def test_id_that_is_no_lower_case_uuid_is_unreadable(user_id: object) -> None:
    bad = read_unreadable(body_of(record(id=user_id), NEIGHBOUR))
    assert (bad.id, bad.error) == (None, "id is not a lower-case UUID")


@pytest.mark.parametrize("item", [None, 5, "x", [], [ID], True])
def test_item_that_is_no_object_is_unreadable(item: object) -> None:
    bad = read_unreadable(body_of(item, NEIGHBOUR))
    assert (bad.id, bad.error) == (None, "not a JSON object")


def test_user_with_an_unreadable_record_is_present_and_has_its_place() -> None:
    page = parse(body_of(record(signed_up_at_millis="x"), NEIGHBOUR))
    assert page.ids == {ID, NEIGHBOUR_ID}
    assert page.places[0] == Place(ID, "x")
    assert last_key(page.places) == (SIGN_UP + 1, NEIGHBOUR_ID)


def test_place_is_that_of_the_last_record_with_a_readable_id() -> None:
    last = record(signed_up_at_millis=None)
    page = parse(body_of({"id": "x"}, NEIGHBOUR, last, {"id": None}))
    assert page.places[0] == Place(NEIGHBOUR_ID, SIGN_UP + 1)
    assert page.places[-1] == Place(ID, None)
    assert last_key(page.places) == (SIGN_UP + 1, NEIGHBOUR_ID)


def test_page_of_unreadable_ids_has_no_place() -> None:
    page = parse(body_of({"id": "x"}, 5, next_cursor=ID))
    assert len(page.places) == 0
    assert len(page.unreadable) == 2


def test_unreadable_payload_is_ascii_json_of_the_whole_record() -> None:
    sent = record(signed_up_at_millis="é\0\ud800", last_active_at_millis=5)
    bad = read_unreadable(body_of(sent, NEIGHBOUR))
    assert bad.payload.isascii()
    assert "\0" not in bad.payload
    assert json.loads(bad.payload) == sent


def test_fingerprint_of_an_unreadable_record_ignores_what_that_of_a_user_ignores() -> None:
    one, other, changed = (
        read_unreadable(body_of({"id": ID, "last_active_at_millis": seen, "n": n}, NEIGHBOUR))
        for seen, n in [(1, 1), (2, 1), (2, 2)]
    )
    assert one.fingerprint == other.fingerprint != changed.fingerprint


@pytest.mark.parametrize("nested", [nested_arrays, nested_objects])
@pytest.mark.parametrize("neighbour", [NEIGHBOUR, SURROGATE_NEIGHBOUR])
def test_nesting_of_200_levels_is_read(
    nested: Callable[[int], bytes], neighbour: dict[str, Any]
) -> None:
    user = read_user(with_raw(nested(199), neighbour))  # the record itself is a level
    assert user.record["client_metadata"] == json.loads(nested(199))


@pytest.mark.parametrize("levels", [201, 256, 300, 1_020, 1_100, 5_000, 100_000])
@pytest.mark.parametrize("nested", [nested_arrays, nested_objects])
@pytest.mark.parametrize("neighbour", [NEIGHBOUR, SURROGATE_NEIGHBOUR])
def test_deeper_nesting_is_unreadable_and_the_rest_of_the_page_is_read(
    levels: int, nested: Callable[[int], bytes], neighbour: dict[str, Any]
) -> None:
    body = with_raw(nested(levels - 1), neighbour)
    bad = read_unreadable(body)
    assert bad.id == ID
    assert bad.error == "nested deeper than 200 levels"
    assert bad.payload.isascii()
    assert parse(body).users[0].record == storable(neighbour)


def test_many_deep_records_leave_the_others_readable() -> None:
    deep = [
        record(id=f"{at:08d}-0000-4000-8000-000000000000", client_metadata=f"RAW{at}")
        for at in range(3)
    ]
    body = body_of(deep[0], NEIGHBOUR, deep[1], deep[2])
    for at in range(3):
        body = body.replace(b'"RAW%d"' % at, b'["]",' + nested_arrays(3_000) + b',"["]')
    page = parse(body)
    assert [user.record for user in page.users] == [NEIGHBOUR]
    assert [bad.id for bad in page.unreadable] == [item["id"] for item in deep]


@pytest.mark.parametrize("neighbours", [(), (SURROGATE_NEIGHBOUR,)])
@pytest.mark.parametrize(
    "number",
    [
        2**53 + 1,
        2**63 - 1,
        2**63,
        2**64 - 1,
        2**64,
        -(2**63) - 1,
        10**18,
        10**19,
        pytest.param(10**4299, id="4300 digits"),
        pytest.param(-(10**4299), id="4300 digits below zero"),
    ],
)
def test_integers_come_through_exactly(number: int, neighbours: tuple[Any, ...]) -> None:
    user = read_user(body_of(record(client_metadata={"n": [number]}), *neighbours))
    assert user.record["client_metadata"] == {"n": [number]}
    assert str(number).encode() in user.json
    assert user.fingerprint == fingerprint(user.json)


@pytest.mark.parametrize("form", [b"%b", b"[%b]", b" [ 1,%b ] ", b'{"n":%b}', b'{"n": %b}'])
@pytest.mark.parametrize("number", [b"1" * 20, b"-" + b"1" * 20])
def test_long_integers_are_found_wherever_they_stand(form: bytes, number: bytes) -> None:
    raw = form.replace(b"%b", number)
    assert read_user(with_raw(raw)).record["client_metadata"] == json.loads(raw)


@pytest.mark.parametrize(
    "raw",
    [
        pytest.param(b"1" * 4301, id="4301 digits"),
        pytest.param(b"-" + b"1" * 4301, id="4301 digits below zero"),
        pytest.param(b"1" * 100_000, id="100000 digits"),
        b"NaN",
        b"Infinity",
        b"-Infinity",
        b"1e5000",
        b"-1e4301",
        b"1e1000000000000000000",
        b'{"deep":[[NaN]]}',
    ],
)
def test_number_that_is_none_or_has_no_end_is_unreadable(raw: bytes) -> None:
    bad = read_unreadable(with_raw(raw, NEIGHBOUR))
    assert bad.id == ID
    assert "number" in bad.error


@pytest.mark.parametrize(("raw", "number"), [(b"1e400", 10**400), (b"-25e399", -25 * 10**399)])
def test_number_that_no_float_holds_stays_the_number_it_is(raw: bytes, number: int) -> None:
    assert read_user(with_raw(raw)).record["client_metadata"] == number


def test_error_of_an_unreadable_record_quotes_nothing_of_it() -> None:
    secret = record(signed_up_at_millis="ada@example.com", primary_email="ada@example.com")
    assert "ada" not in read_unreadable(body_of(secret, NEIGHBOUR)).error


def test_digits_in_a_string_are_no_number() -> None:
    account = {"id": "google", "account_id": "113245678901234567890", "email": "x@example.com"}
    sent = record(oauth_providers=[account])
    user = read_user(body_of(sent))
    assert user.record == sent
    assert user.fingerprint == read_user(body_of(sent, SURROGATE_NEIGHBOUR)).fingerprint


def test_metadata_of_three_megabytes_is_read() -> None:
    sent = record(client_metadata={"blob": 'aé"[{' * 500_000})
    page = parse(body_of(sent, NEIGHBOUR))
    assert [user.record for user in page.users] == [sent, NEIGHBOUR]


# An id twice on a page.


def test_later_record_of_an_id_counts_at_the_first_place() -> None:
    page = parse(body_of(record(n=1), NEIGHBOUR, record(n=2)))
    assert [user.record for user in page.users] == [record(n=2), NEIGHBOUR]
    assert page.places[0] == Place(ID, SIGN_UP)
    assert page.places[-1] == Place(NEIGHBOUR_ID, SIGN_UP + 1)
    assert page.ascending


def test_user_who_moved_while_the_page_was_read_leaves_it_ascending() -> None:
    moved = record(signed_up_at_millis=SIGN_UP + 9)
    page = parse(body_of(record(), NEIGHBOUR, moved))
    assert [user.record for user in page.users] == [NEIGHBOUR, moved]
    assert page.ascending
    assert last_key(page.places) == (SIGN_UP + 1, NEIGHBOUR_ID)


def test_later_record_counts_even_if_it_is_unreadable() -> None:
    page = parse(body_of(record(), record(signed_up_at_millis=None)))
    assert len(page.users) == 0
    assert [bad.id for bad in page.unreadable] == [ID]


def test_descending_records_do_not_ascend() -> None:
    page = parse(body_of(NEIGHBOUR, record()))
    assert not page.ascending
    assert [user.id for user in page.users] == [ID, NEIGHBOUR_ID]


def test_of_one_millisecond_the_ids_must_ascend() -> None:
    same = {"id": NEIGHBOUR_ID, "signed_up_at_millis": SIGN_UP}
    assert parse(body_of(same, record())).ascending
    assert not parse(body_of(record(), same)).ascending


# Bodies that are no answer.

WHOLE = body_of(record(primary_email="ada@example.com"))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"<html><body>502 Bad Gateway ada@example.com</body></html>",
        WHOLE[:-1],
        WHOLE[: len(WHOLE) // 2],
        WHOLE + b"x",
        b"\xff\xfe",
        b"null",
        b"5",
        b'"ada@example.com"',
        b"[]",
        b"{}",
        b'{"items":[]}',
        b'{"items":[],"pagination":null}',
        b'{"items":[],"pagination":{}}',
        b'{"items":[],"pagination":{"next_cursor":5}}',
        b'{"items":{},"pagination":{"next_cursor":null}}',
        b'{"items":null,"pagination":{"next_cursor":null}}',
        b'{"pagination":{"next_cursor":null}}',
        b'{"code":"SCHEMA_ERROR","error":"ada@example.com"}',
        WHOLE.replace(b'"is_paginated"', b"is_paginated"),
        b"[" * 100_000,
        b'{"items":' * 100_000,
        b"]" * 100_000,
        pytest.param(b"[" * 249 + b"[1]," + b"[" * 5_000, id="cut off while deep again"),
        pytest.param(b"[" * 5_000 + b'"' + b'\\"' * 50_000, id="cut off in a deep string"),
    ],
)
def test_what_is_no_page_is_a_broken_body_and_not_quoted(body: bytes) -> None:
    with pytest.raises(BrokenBody) as caught:
        parse(body)
    assert "ada@" not in "".join(format_exception(caught.value))


def test_more_records_than_anybody_asks_for_are_a_broken_body() -> None:
    assert MAX_RECORDS == LARGEST_PAGE
    parse(body_of(*[0] * MAX_RECORDS))
    with pytest.raises(BrokenBody, match="more than 30,000 records"):
        parse(body_of(*[0] * (MAX_RECORDS + 1)))


@pytest.mark.parametrize(
    "body", [b"", b"<html>ada</html>", b"[]", b"{}", b'"ada"', b'{"code":"X"}']
)
def test_what_is_no_user_is_a_broken_body_and_not_quoted(body: bytes) -> None:
    with pytest.raises(BrokenBody) as caught:
        parse_user(body, ASKED_AT, IGNORED)
    assert "ada" not in str(caught.value)


@given(st.binary() | st.text().map(str.encode) | json_values.map(json.dumps).map(str.encode))
def test_arbitrary_bytes_are_a_page_or_a_broken_body(body: bytes) -> None:
    assert read_or_none(body) is None or isinstance(parse(body), Page)


@given(st.data())
def test_damaged_page_is_a_page_or_a_broken_body(data: st.DataObject) -> None:
    body = sample_body("list-first-page-limit-3.http")
    at = data.draw(st.integers(0, len(body)))
    end = data.draw(st.integers(at, min(len(body), at + 40)))
    piece = data.draw(
        st.binary(max_size=12) | st.sampled_from([b'"', b"\\", b"[", b"}", b"9" * 25])
    )
    read_or_none(body[:at] + piece + body[end:])


@given(st.lists(json_values | st.builds(record, id=json_values, signed_up_at_millis=json_values)))
@settings(max_examples=50)
def test_page_of_arbitrary_items_loses_none(items: list[Any]) -> None:
    page = parse(body_of(*items, NEIGHBOUR))
    assert NEIGHBOUR_ID in page.ids
    assert bool(page.unreadable) == bool(items)


def read_or_none(body: bytes) -> Page | None:
    try:
        return parse(body)
    except BrokenBody:
        return None
