import json
from datetime import UTC, datetime
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.ids import is_user_id
from worker.model import FINGERPRINT_BYTES, UNKNOWN_FINGERPRINT, Page, Unreadable, User, Users
from worker.stack_auth.canonical_json import canonical, dump, whole
from worker.stack_auth.fingerprint import fingerprint

ID = "637a92dd-1790-4469-81a9-9c88e077a18f"
OTHER_ID = "44431c56-ab7d-440f-935e-58f237ec991b"

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
records = st.dictionaries(st.text(max_size=3), json_values, max_size=6)
alike = st.dictionaries(st.sampled_from("ab"), st.sampled_from([None, 0, 1, 1.0, True, "1", [1]]))


def user(user_id: str, millis: int = 0) -> User:
    return User(user_id, millis, b"01234567", b"{}")


def unreadable(user_id: str | None) -> Unreadable:
    return Unreadable(user_id, b"01234567", "{}", "not as it should be")


def page(users: tuple[User, ...] = (), bad: tuple[Unreadable, ...] = ()) -> Page:
    return Page(
        users=Users.of(users),
        unreadable=bad,
        places=(),
        ascending=True,
        descending=True,
        next_cursor=None,
        observed_at=datetime(2026, 1, 1, tzinfo=UTC),
    )


def test_key_is_sign_up_then_id() -> None:
    assert user(ID, 5).key == (5, ID)


def test_canonical_lower_case_uuid_is_a_user_id() -> None:
    assert is_user_id(ID)


@pytest.mark.parametrize(
    "text",
    [
        ID.upper(),
        ID.replace("-", ""),
        f"{{{ID}}}",
        f"urn:uuid:{ID}",
        f"{ID}\n",
        f" {ID}",
        ID[:-1],
        ID.replace("9", "\N{ARABIC-INDIC DIGIT NINE}"),
        "",
        None,
        5,
        [ID],
    ],
)
def test_another_spelling_is_no_user_id(text: object) -> None:
    assert not is_user_id(text)


def test_empty_page_has_no_ids() -> None:
    assert page().ids == set()


def test_unreadable_user_with_a_readable_id_is_present() -> None:
    both = page((user(ID),), (unreadable(OTHER_ID), unreadable(None)))
    assert both.ids == {ID, OTHER_ID}


def test_nothing_has_a_fingerprint_too() -> None:
    assert len(fingerprint(canonical({}, ()))) == FINGERPRINT_BYTES


def test_ignored_fields_are_not_in_the_canonical_form() -> None:
    record = {"b": 1, "a": None, "last_active_at_millis": 7}
    assert canonical(record, ["last_active_at_millis"]) == b'{"a":null,"b":1}'


@pytest.mark.parametrize(
    "record", [{"b": 1, "a": None, "seen": 2**70}, {"seen": 1, "other": 2}, {"b": 1}, {}]
)
def test_whole_record_is_its_canonical_form_and_what_is_ignored(record: dict[str, Any]) -> None:
    ignored = ["seen", "other", "absent"]
    assert json.loads(whole(record, canonical(record, ignored), ignored)) == record


def test_ignored_field_counts_where_it_is_nested() -> None:
    assert canonical({"meta": {"seen": 1}}, ["seen"]) == b'{"meta":{"seen":1}}'


def test_integers_over_64_bits_are_written_exactly() -> None:
    assert dump({"b": 2**80, "a": -(2**70)}) == f'{{"a":{-(2**70)},"b":{2**80}}}'.encode()


@given(st.binary())
def test_fingerprint_is_short_and_never_the_unknown_one(canonical_json: bytes) -> None:
    assert len(fingerprint(canonical_json)) == FINGERPRINT_BYTES
    assert fingerprint(canonical_json) != UNKNOWN_FINGERPRINT


@given(records, st.randoms(use_true_random=False))
@settings(max_examples=50)
def test_order_of_names_does_not_change_the_fingerprint(
    record: dict[str, object], random: Random
) -> None:
    names = sorted(record)
    random.shuffle(names)
    shuffled = {name: record[name] for name in names}
    assert fingerprint(canonical(shuffled, ())) == fingerprint(canonical(record, ()))


@given(alike, alike)
def test_fingerprints_are_equal_exactly_if_the_canonical_forms_are(
    one: dict[str, object], other: dict[str, object]
) -> None:
    same_form = canonical(one, ()) == canonical(other, ())
    assert (fingerprint(canonical(one, ())) == fingerprint(canonical(other, ()))) == same_form


@pytest.mark.parametrize(("one", "other"), [(1, True), (0, False), (1, "1"), (None, "null")])
def test_values_that_only_look_alike_have_different_fingerprints(
    one: object, other: object
) -> None:
    assert fingerprint(canonical({"v": one}, ())) != fingerprint(canonical({"v": other}, ()))
