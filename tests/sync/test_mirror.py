"""The mirror against the plainest model of it: a dictionary of keys and fingerprints."""

import sys
from collections.abc import Sequence
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.ids import pack
from worker.model import NO_MILLIS, UNKNOWN_FINGERPRINT, Key, User, Users
from worker.sync.mirror import Delta, Mirror, Span
from worker.sync.mirror_columns import LONGEST_STRETCH, Columns

EVERYTHING = Span(None, None)
FINGERPRINTS = [b"11111111", b"22222222"]

Model = dict[Key, bytes]


def user_id(number: int) -> str:
    """Spread ids over the whole range, so that neither their order nor their bytes are regular."""
    text = f"{number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128:032x}"
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"


def user(number: int, millis: int | None = None, fingerprint: bytes = FINGERPRINTS[0]) -> User:
    return User(user_id(number), number if millis is None else millis, fingerprint, b"{}")


def users_of(model: Model) -> list[User]:
    return [User(key[1], key[0], fingerprint, b"{}") for key, fingerprint in sorted(model.items())]


def mirror_of(model: Model) -> Mirror:
    mirror = Mirror.load((key[0], pack(key[1])) for key in sorted(model))
    mirror.accept(
        Users.of([user for user in users_of(model) if user.fingerprint != UNKNOWN_FINGERPRINT])
    )
    return mirror


def mirror_with(users: Sequence[User]) -> Mirror:
    return mirror_of({user.key: user.fingerprint for user in users})


def ids(users: Sequence[User]) -> set[str]:
    return {user.id for user in users}


def nobody_asks() -> NoReturn:
    pytest.fail("the ids on the page are not needed")


def within(key: Key, span: Span) -> bool:
    return (span.after is None or span.after < key) and (span.upto is None or key <= span.upto)


def expected_delta(model: Model, users: Sequence[User], span: Span, present: set[str]) -> Delta:
    on_page = {user.key for user in users}
    left = [key for key in sorted(model) if within(key, span) and key not in on_page]
    return Delta(
        changed=Users.of([user for user in users if model.get(user.key) != user.fingerprint]),
        missing=[key for key in left if key[1] not in present],
        moved=[key for key in left if key[1] in ids(users)],
    )


# Few ids and fewer milliseconds: most of what is drawn collides with something.
keys = st.tuples(st.integers(0, 3), st.integers(0, 11).map(user_id))
fingerprints = st.sampled_from(FINGERPRINTS)
models = st.dictionaries(keys, fingerprints | st.just(UNKNOWN_FINGERPRINT), max_size=24)
pages = st.dictionaries(keys, fingerprints, max_size=8).map(users_of)
spans = st.builds(Span, st.none() | keys, st.none() | keys)


@st.composite
def models_and_near_pages(draw: st.DrawFn) -> tuple[Model, list[User], Span]:
    """Draw a mirror, and a page that is a part of it, the chain user included, but for a few."""
    model = draw(st.dictionaries(keys, fingerprints, min_size=2, max_size=24))
    known = users_of(model)
    low = draw(st.integers(0, len(known) - 1))
    high = draw(st.integers(low + 1, len(known)))
    page = {user.key: user.fingerprint for user in known[low:high]}
    for key in draw(st.lists(st.sampled_from(sorted(page)), max_size=1)):
        del page[key]
    page |= draw(st.dictionaries(keys, fingerprints, max_size=1))
    upto = draw(st.sampled_from([known[high - 1].key, None]))
    return model, users_of(page), Span(known[low].key if low else None, upto)


def one_of_each_id(users: Sequence[User]) -> list[User]:
    return sorted({user.id: user for user in users}.values(), key=lambda user: user.key)


# Compare.


@given(models, pages, spans, st.sets(st.integers(0, 11).map(user_id)))
@settings(max_examples=100)
def test_compare_finds_exactly_what_differs(
    model: Model, users: list[User], span: Span, unreadable: set[str]
) -> None:
    users = one_of_each_id(users)
    present = ids(users) | unreadable
    delta = mirror_of(model).compare(Users.of(users), span, lambda: present)
    assert delta == expected_delta(model, users, span, present)


@given(models_and_near_pages())
@settings(max_examples=150)
def test_page_that_is_nearly_as_it_was_differs_only_where_it_does(
    drawn: tuple[Model, list[User], Span],
) -> None:
    model, users, span = drawn
    users = one_of_each_id(users)
    delta = mirror_of(model).compare(Users.of(users), span, lambda: ids(users))
    assert delta == expected_delta(model, users, span, ids(users))


def test_empty_list_and_empty_mirror_agree() -> None:
    assert Mirror().compare(Users.of([]), EVERYTHING, nobody_asks) == Delta()


def test_empty_list_misses_everybody() -> None:
    known = [user(1), user(2)]
    delta = mirror_with(known).compare(Users.of([]), EVERYTHING, set)
    assert delta == Delta(missing=[user.key for user in known])


def test_new_mirror_misses_nobody() -> None:
    assert Mirror().compare(Users.of([user(1)]), EVERYTHING, nobody_asks) == Delta(
        changed=Users.of([user(1)])
    )


def test_unchanged_page_asks_for_nothing() -> None:
    known = [user(number) for number in range(20)]
    mirror = mirror_with(known)
    assert mirror.compare(Users.of(known), EVERYTHING, nobody_asks) == Delta()
    assert (
        mirror.compare(Users.of(known[4:10]), Span(known[4].key, known[9].key), nobody_asks)
        == Delta()
    )
    assert mirror.compare(Users.of(known[9:]), Span(known[9].key, None), nobody_asks) == Delta()


def test_unknown_fingerprint_is_left_to_the_database() -> None:
    mirror = Mirror.load([(1, pack(user_id(1)))])
    assert mirror.compare(Users.of([user(1)]), EVERYTHING, nobody_asks) == Delta(
        changed=Users.of([user(1)])
    )


def test_user_before_the_span_is_compared_but_not_missed() -> None:
    known = [user(1), user(2), user(3)]
    mirror = mirror_with(known)
    edited = user(1, fingerprint=FINGERPRINTS[1])
    span = Span(known[0].key, known[2].key)
    assert mirror.compare(Users.of([edited, *known[1:]]), span, nobody_asks) == Delta(
        changed=Users.of([edited])
    )
    assert mirror.compare(Users.of(known[1:]), span, nobody_asks) == Delta()


def test_one_missing_and_one_extra_with_an_equal_rest_is_not_equal() -> None:
    known = [user(number) for number in (1, 3, 5, 7, 9)]
    extra, missing = user(2), known[1]
    page = [known[0], extra, *known[2:]]
    delta = mirror_with(known).compare(Users.of(page), Span(known[0].key, None), lambda: ids(page))
    assert delta == Delta(changed=Users.of([extra]), missing=[missing.key])


def test_extra_user_in_place_of_the_chain_user_is_not_equal() -> None:
    known = [user(number) for number in (1, 3, 5, 7)]
    page = [user(2), *known[2:]]
    delta = mirror_with(known).compare(Users.of(page), Span(known[1].key, None), lambda: ids(page))
    assert delta == Delta(changed=Users.of([user(2)]))


def test_chain_user_is_equal_though_one_behind_it_is_missing() -> None:
    known = [user(number) for number in range(4)]
    page = [known[0], known[1], known[3]]
    delta = mirror_with(known).compare(Users.of(page), Span(known[0].key, None), lambda: ids(page))
    assert delta == Delta(missing=[known[2].key])


def test_user_with_an_unreadable_record_is_neither_missing_nor_moved() -> None:
    known = [user(1), user(2)]
    delta = mirror_with(known).compare(Users.of([known[0]]), EVERYTHING, lambda: ids(known))
    assert delta == Delta()


def test_user_who_moved_within_the_page_is_changed_and_moved() -> None:
    before, after = user(1, millis=1), user(1, millis=9)
    delta = mirror_with([before]).compare(Users.of([after]), EVERYTHING, lambda: {after.id})
    assert delta == Delta(changed=Users.of([after]), moved=[before.key])


def test_many_users_of_one_millisecond_are_told_apart_by_id() -> None:
    known = one_of_each_id([user(number, millis=5) for number in range(1_000)])
    mirror = mirror_with(known)
    page = [*known[300:350], *known[351:400]]
    delta = mirror.compare(Users.of(page), Span(known[300].key, known[399].key), lambda: ids(page))
    assert delta == Delta(missing=[known[350].key])
    assert mirror.below(known[350].key) == known[349].key


def test_row_without_a_sign_up_is_missing_or_moved_on_the_first_page() -> None:
    mirror = Mirror.load([(NO_MILLIS, pack(user_id(1))), (NO_MILLIS, pack(user_id(3)))])
    page = [user(1)]
    delta = mirror.compare(Users.of(page), Span(None, user(1).key), lambda: ids(page))
    assert delta == Delta(
        Users.of(page), missing=[(NO_MILLIS, user_id(3))], moved=[(NO_MILLIS, user_id(1))]
    )


# Accept, remove, forget.


@given(
    models,
    st.lists(
        st.one_of(
            st.tuples(st.just("accept"), pages),
            st.tuples(st.just("remove"), st.lists(keys, max_size=6)),
            st.tuples(st.just("forget"), keys),
        ),
        max_size=8,
    ),
)
@settings(max_examples=100)
def test_mirror_holds_what_was_accepted_and_not_removed(model: Model, steps: list[object]) -> None:
    mirror, model = mirror_of(model), dict(model)
    for step in steps:
        match step:
            case ("accept", list(users)):
                mirror.accept(Users.of(users))
                model |= {user.key: user.fingerprint for user in users}
            case ("remove", list(keys)):
                mirror.remove(keys)
                model = {key: known for key, known in model.items() if key not in keys}
            case ("forget", (int(millis), str(id_))):
                mirror.forget_fingerprint((millis, id_))
                model |= {(millis, id_): UNKNOWN_FINGERPRINT} if (millis, id_) in model else {}
    assert_same(mirror, model)


def assert_same(mirror: Mirror, model: Model) -> None:
    assert list(mirror.keys()) == sorted(model)
    assert len(mirror) == len(model)
    assert all(key in mirror for key in model)
    # Asked for one fingerprint and for the other, what is unknown differs from both.
    for fingerprint in FINGERPRINTS:
        asked = [User(key[1], key[0], fingerprint, b"{}") for key in sorted(model)]
        changed = mirror.compare(Users.of(asked), EVERYTHING, nobody_asks).changed
        assert list(changed) == [user for user in asked if model[user.key] != user.fingerprint]


@given(models, keys)
def test_below_is_the_nearest_key_of_all_that_are_smaller(model: Model, key: Key) -> None:
    assert mirror_of(model).below(key) == max((k for k in model if k < key), default=None)


def test_below_skips_rows_without_a_sign_up() -> None:
    mirror = Mirror.load([(NO_MILLIS, pack(user_id(1)))])
    assert mirror.below((5, user_id(2))) is None


def test_nothing_accepted_and_nothing_removed_changes_nothing() -> None:
    mirror = mirror_with([user(1)])
    mirror.accept(Users.of([]))
    mirror.remove([])
    mirror.remove([user(2).key])
    mirror.forget_fingerprint(user(2).key)
    assert_same(mirror, {user(1).key: FINGERPRINTS[0]})


def test_new_users_far_apart_find_their_places() -> None:
    even = [user(number) for number in range(0, 3 * LONGEST_STRETCH, 2)]
    new = [user(number) for number in (1, 3, LONGEST_STRETCH + 1, 3 * LONGEST_STRETCH + 1)]
    mirror = mirror_with(even)
    mirror.accept(Users.of(new))
    expected = sorted([*even, *new], key=lambda user: user.key)
    assert mirror.compare(Users.of(expected), EVERYTHING, nobody_asks) == Delta()


# What was inserted lately.


def test_nobody_was_inserted_into_a_new_mirror() -> None:
    assert not Mirror().inserted_since(user_id(1), 0.0)


def test_row_counts_as_inserted_until_the_moment_has_passed() -> None:
    mirror = Mirror()
    mirror.note_inserted(Users.of([user(1), user(2)]), at=10.0)
    mirror.note_inserted(Users.of([user(3)]), at=20.0)
    mirror.note_inserted(Users.of([]), at=30.0)
    assert [mirror.inserted_since(user_id(number), 10.0) for number in (1, 2, 3, 4)] == [
        True,
        True,
        True,
        False,
    ]
    assert [mirror.inserted_since(user_id(number), 15.0) for number in (1, 3)] == [False, True]
    assert not mirror.inserted_since(user_id(3), 20.5)


def test_halves_of_two_neighbours_are_not_an_inserted_row() -> None:
    first = "00000000-0000-0000-0000-000000000001"
    second = "00000000-0000-0000-0000-000000000000"
    between = "00000000-0000-0000-0100-000000000000"
    mirror = Mirror()
    mirror.note_inserted(
        Users.of([User(first, 1, bytes(8), b"{}"), User(second, 2, bytes(8), b"{}")]), at=10.0
    )
    assert not mirror.inserted_since(between, 5.0)
    assert mirror.inserted_since(second, 5.0)


# Size.


@pytest.mark.parametrize("page_size", [10, 1_000])
def test_a_user_costs_at_most_80_bytes(page_size: int) -> None:
    users = [user(number) for number in range(100_000)]
    mirror = Mirror()
    for at in range(0, len(users), page_size):
        page = users[at : at + page_size]
        mirror.accept(Users.of(page))
        mirror.note_inserted(Users.of(page), at=float(at))
    held = vars(mirror).values()
    columns = [
        column
        for each in held
        for column in (vars(each).values() if isinstance(each, Columns) else [each])
    ]
    assert len(mirror) == len(users)
    size = sum(sys.getsizeof(column) for column in columns)
    inserted = [part for column in columns for part in parts(column)]
    assert size + sum(sys.getsizeof(part) for part in inserted) <= 80 * len(users)


def parts(column: object) -> list[object]:
    """Give the objects that a column of objects holds; arrays hold none."""
    if isinstance(column, bytearray) or hasattr(column, "typecode"):
        return []
    assert hasattr(column, "__iter__")
    return [part for entry in column for part in (entry, *entry)]


@given(st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)), st.sets(st.integers(0, 30)))
def test_replaced_users_are_known_by_what_is_given_alone(
    there: set[int], asked: set[int], moved: set[int]
) -> None:
    """Of the users that are asked for, those that moved are live, at another place."""
    model = {user(number).key: FINGERPRINTS[0] for number in there}
    mirror = mirror_of(model)
    now = {user(number, millis=100 - number).key: UNKNOWN_FINGERPRINT for number in asked & moved}
    mirror.replace([user_id(number) for number in asked], [(k[0], pack(k[1])) for k in now])
    kept = {user(number).key: FINGERPRINTS[0] for number in there - asked}
    assert list(mirror.keys()) == sorted(kept | now)
    shown = users_of(dict.fromkeys(kept | now, FINGERPRINTS[0]))
    changed = mirror.compare(Users.of(shown), EVERYTHING, set).changed
    assert {user.key for user in changed} == now.keys()


def test_id_is_found_where_two_neighbours_look_like_it() -> None:
    """The end of one id and the beginning of the next are no id."""
    halves = [f"{'a' * 8}-aaaa-4aaa-8aaa-{'b' * 12}", f"{'c' * 8}-cccc-4ccc-8ccc-{'d' * 12}"]
    mirror = mirror_with([User(id_, at, FINGERPRINTS[0], b"") for at, id_ in enumerate(halves)])
    between = (pack(halves[0]) + pack(halves[1]))[8:24].hex()
    seam = f"{between[:8]}-{between[8:12]}-{between[12:16]}-{between[16:20]}-{between[20:]}"
    mirror.replace([seam], [])
    assert len(mirror) == 2
