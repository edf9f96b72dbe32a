"""Walks over a list that lies as the real one does, and worse."""

import gc
import json
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.decode import parse_page
from worker.errors import SweepIncomplete
from worker.ids import pack
from worker.mirror import Mirror, Span
from worker.model import Key, Page, Place, User
from worker.walk import MAX_RECOVERIES, Request, Walk

ASKED_AT = datetime(2026, 11, 21, tzinfo=UTC)


def user_id(number: int) -> str:
    return f"{number:08d}-0000-4000-8000-000000000000"


def key(number: int) -> Key:
    return number, user_id(number)


def place(number: int) -> Place:
    return Place(user_id(number), number)


def page_of(items: Sequence[tuple[str, Any]], next_cursor: str | None = None) -> Page:
    records = [{"id": id_, "signed_up_at_millis": millis} for id_, millis in items]
    answer = {"items": records, "pagination": {"next_cursor": next_cursor}}
    return parse_page(json.dumps(answer).encode(), ASKED_AT, ())


def numbered(*numbers: int, following: int | None = None) -> Page:
    """Write a page of users that signed up in the millisecond of their number."""
    next_cursor = None if following is None else user_id(following)
    return page_of([(user_id(number), number) for number in numbers], next_cursor)


@dataclass
class Listed:
    """The users API's list, with its four lies: nobody tells a lost cursor from a clean end."""

    users: dict[str, int]
    forgetful: bool = False
    asked: list[Request] = field(default_factory=list)

    @classmethod
    def of(cls, numbers: Iterable[int]) -> "Listed":
        return cls({user_id(number): number for number in numbers})

    def answer(self, request: Request, limit: int) -> Page:
        self.asked.append(request)
        listed = sorted(self.users.items(), key=lambda item: (item[1], item[0]))
        at = 0
        if request.cursor is not None:
            known = None if self.forgetful else self.users.get(request.cursor.id)
            self.forgetful = False
            if known is None:
                return page_of([])
            at = listed.index((request.cursor.id, known))
        end = at + limit * request.widen
        return page_of(listed[at:end], listed[end][0] if end < len(listed) else None)

    def lose(self, ids: Iterable[str]) -> None:
        """Delete or hide users."""
        for id_ in ids:
            self.users.pop(id_, None)

    def move(self, ids: Iterable[str]) -> None:
        """Let anonymous users sign up properly: that puts them at the end."""
        for id_ in ids:
            if id_ in self.users:
                self.users[id_] = max(self.users.values()) + 1

    def sign_up(self, numbers: Iterable[int]) -> None:
        now = max(self.users.values(), default=0)
        self.users |= {user_id(number): now + 1 for number in numbers}


Taken = list[tuple[Page, Span]]


def read(
    walk: Walk, listed: Listed, limit: int, between: Callable[[Page], None] | None = None
) -> Taken:
    """Walk to the end; `between` happens after each answer, before the next is asked for."""
    taken: Taken = []
    while not walk.ended:
        page = listed.answer(walk.request, limit)
        span = walk.take(page)
        if span is not None:
            taken.append((page, span))
        if between is not None:
            between(page)
    return taken


def once(*changes: Callable[[Page], None]) -> Callable[[Page], None]:
    """Let one change happen after each answer, in turn, and then nothing."""
    left = list(changes)

    def between(page: Page) -> None:
        if left:
            left.pop(0)(page)

    return between


def ids_of(taken: Taken) -> set[str]:
    return {user.id for page, _ in taken for user in page.users}


def no_mirror(_: Key) -> None:
    return None


def assert_covers_everything(taken: Taken) -> None:
    """See that each span begins at or before where those before it end, from start to end."""
    covered: Key | None = None
    for at, (_, span) in enumerate(taken):
        if at == 0:
            assert span.after is None
        elif span.after is not None:
            assert covered is not None
            assert span.after <= covered
        assert (span.upto is None) == (at == len(taken) - 1)
        covered = max((k for k in (covered, span.upto) if k), default=None)


def within(millis: int, id_: str, span: Span) -> bool:
    above = span.after is None or span.after < (millis, id_)
    return above and (span.upto is None or (millis, id_) <= span.upto)


# Nothing happens.


def test_empty_list_is_proven_at_once() -> None:
    listed = Listed({})
    taken = read(Walk(no_mirror), listed, 10)
    assert [span for _, span in taken] == [Span(None, None)]
    assert listed.asked == [Request()]


@pytest.mark.parametrize("limit", [2, 3, 7, 10, 11, 50])
def test_quiet_list_is_read_once_without_a_gap(limit: int) -> None:
    listed = Listed.of(range(10))
    walk = Walk(no_mirror)
    taken = read(walk, listed, limit)
    assert_covers_everything(taken)
    assert ids_of(taken) == set(listed.users)
    assert walk.recoveries == 0
    assert len(taken) == max(1, -(-9 // (limit - 1)))


def test_each_page_begins_with_the_last_user_of_the_page_before() -> None:
    listed = Listed.of(range(7))
    taken = read(Walk(no_mirror), listed, 3)
    cursors = [None, place(2), place(4)]
    assert [request.cursor for request in listed.asked] == cursors
    assert [span for _, span in taken] == [
        Span(None, key(2)),
        Span(key(2), key(4)),
        Span(key(4), None),
    ]


# The four lies.

LIES: dict[str, Callable[[Listed, Sequence[str]], None]] = {
    "deleted": Listed.lose,
    "moved": Listed.move,
    "forgotten": lambda listed, _: setattr(listed, "forgetful", True),
}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("limit", [2, 3, 8, 30])
@pytest.mark.parametrize("whom", ["last", "next", "both"])
def test_lost_cursor_neither_ends_the_walk_nor_skips_anybody(
    lie: str, limit: int, whom: str
) -> None:
    listed = Listed.of(range(100))
    touched: set[str] = set()
    lies = iter(range(8))

    def between(page: Page) -> None:
        if next(lies, None) is not None and page.last and page.next_cursor:
            both = [page.last.id, page.next_cursor]
            ids = {"last": both[:1], "next": both[1:], "both": both}[whom]
            LIES[lie](listed, ids)
            touched.update(ids)

    taken = read(Walk(no_mirror), listed, limit, between)
    assert_covers_everything(taken)
    assert {user_id(number) for number in range(100)} - touched <= ids_of(taken)


def test_empty_answer_to_a_cursor_proves_nothing() -> None:
    walk = Walk(no_mirror)
    walk.take(numbered(1, 2, following=3))
    assert walk.take(page_of([])) is None
    assert not walk.ended


def test_moved_cursor_with_a_clean_end_proves_nothing() -> None:
    walk = Walk(no_mirror)
    walk.take(numbered(1, 2, following=3))
    assert walk.take(page_of([(user_id(2), 900)])) is None
    assert not walk.ended


def test_page_that_does_not_begin_with_the_cursor_proves_nothing() -> None:
    walk = Walk(no_mirror)
    walk.take(numbered(1, 2, following=3))
    assert walk.take(numbered(3, 4)) is None
    assert not walk.ended


def test_page_that_does_not_ascend_proves_nothing() -> None:
    walk = Walk(no_mirror)
    walk.take(numbered(1, 2, following=3))
    assert walk.take(numbered(2, 5, 4)) is None
    assert not walk.ended


def test_recovery_after_a_whole_page_was_deleted() -> None:
    listed = Listed.of(range(1_000))
    walk = Walk(no_mirror)
    change = once(lambda page: listed.lose([user.id for user in page.users[-120:]]))
    taken = read(walk, listed, 200, change)
    assert_covers_everything(taken)
    assert set(listed.users) <= ids_of(taken)
    # It asked for the last one, and then 1, 2, 4, ..., 128 before it.
    assert walk.recoveries == 8


@dataclass(frozen=True)
class Change:
    """What befalls the list between two answers; `nth` picks users, `count` says how many."""

    kind: str
    nth: int
    count: int

    def befall(self, listed: Listed, page: Page) -> list[str]:
        """Change the list; returns who is not where they were."""
        chosen = {
            "last": [page.last.id] if page.last else [],
            "both": [id_ for id_ in (page.last and page.last.id, page.next_cursor) if id_],
            "page": [user.id for user in page.users][-self.count :],
            "somebody": sorted(listed.users)[self.nth :: 7][: self.count],
        }
        what, _, whom = self.kind.partition(" ")
        ids = chosen.get(whom, [])
        if what == "lose":
            listed.lose(ids)
        elif what == "move":
            listed.move(ids)
        elif what == "sign-up":
            listed.sign_up(range(1_000 + self.nth, 1_000 + self.nth + self.count))
        elif what == "forget":
            listed.forgetful = True
        return ids


KINDS = [
    "lose last",
    "lose both",
    "move last",
    "move both",
    "move page",
    "lose page",
    "lose somebody",
    "move somebody",
    "sign-up",
    "forget",
    "nothing",
]
changes = st.builds(Change, st.sampled_from(KINDS), st.integers(0, 50), st.integers(1, 30))


@given(
    users=st.integers(0, 120),
    a_millisecond=st.sampled_from([1, 3, 200]),
    limit=st.integers(2, 50),
    history=st.lists(changes, max_size=40),
    live_rows=st.sets(st.integers(0, 119)),
)
@settings(max_examples=200)
def test_every_walk_sees_whoever_stays_and_suspects_none_of_them(
    users: int, a_millisecond: int, limit: int, history: list[Change], live_rows: set[int]
) -> None:
    listed = Listed({user_id(number): number // a_millisecond for number in range(users)})
    before = dict(listed.users)
    rows = sorted((number // a_millisecond, pack(user_id(number))) for number in live_rows)
    touched: set[str] = set()
    left = list(history)

    def between(page: Page) -> None:
        if left:
            touched.update(left.pop(0).befall(listed, page))

    taken = read(Walk(Mirror.load(rows).below), listed, limit, between)
    assert_covers_everything(taken)
    stayed = {id_: millis for id_, millis in before.items() if id_ not in touched}
    assert set(stayed) <= ids_of(taken)
    for page, span in taken:
        expected = {id_ for id_, millis in stayed.items() if within(millis, id_, span)}
        assert expected <= page.ids


# The way back.


def test_way_back_leads_through_the_page_then_the_mirror_then_to_the_start() -> None:
    mirror = Mirror.load((number, pack(user_id(number))) for number in (3, 5, 50))
    walk = Walk(mirror.below)
    walk.take(numbered(*range(10, 30), following=30))
    asked = []
    for _ in range(8):
        asked.append(walk.request)
        walk.take(page_of([]))
    back = [Request(place(n), key(n)) for n in (29, 28, 27, 25, 21, 13, 5)]
    assert asked == [*back, Request()]


def test_way_back_from_the_start_is_the_start() -> None:
    walk = Walk(no_mirror)
    walk.take(numbered(3, 2, 1))
    assert walk.request == Request()


def test_span_after_a_step_back_begins_where_it_stepped_to() -> None:
    walk = Walk(no_mirror)
    walk.take(numbered(1, 2, 3, following=4))
    walk.take(page_of([]))
    assert walk.take(numbered(2, 4, 5, following=6)) == Span(key(2), key(5))


def test_step_back_leads_behind_the_cursor_of_a_user_without_a_readable_sign_up() -> None:
    walk = Walk(no_mirror)
    span = walk.take(page_of([(user_id(1), 1), (user_id(2), 2), (user_id(3), "x")], user_id(4)))
    assert span == Span(None, key(2))
    assert walk.request == Request(Place(user_id(3), "x"), key(2))
    following = page_of([(user_id(3), "x"), (user_id(4), 4)])
    assert walk.take(following) == Span(key(2), None)


# From a checkpoint.


def test_resumed_walk_begins_behind_the_checkpoint() -> None:
    listed = Listed.of(range(20))
    taken = read(Walk(no_mirror, resume_at=key(11)), listed, 5)
    assert listed.asked[0] == Request(place(11), key(11))
    assert taken[0][1] == Span(key(11), key(15))
    assert ids_of(taken) == {user_id(number) for number in range(11, 20)}


def test_resumed_walk_whose_user_is_gone_begins_behind_the_nearest_row() -> None:
    listed = Listed.of(n for n in range(20) if n != 11)
    mirror = Mirror.load((number, pack(user_id(number))) for number in range(20))
    taken = read(Walk(mirror.below, resume_at=key(11)), listed, 5)
    assert listed.asked[1] == Request(place(10), key(10))
    assert taken[0][1] == Span(key(10), key(15))


def test_resumed_walk_without_any_row_begins_at_the_start() -> None:
    listed = Listed.of(range(5, 20))
    taken = read(Walk(no_mirror, resume_at=key(2)), listed, 50)
    assert_covers_everything(taken)
    assert ids_of(taken) == set(listed.users)


def test_resumed_walk_of_a_list_that_is_empty_now_ends_with_nobody() -> None:
    mirror = Mirror.load((number, pack(user_id(number))) for number in range(20))
    taken = read(Walk(mirror.below, resume_at=key(11)), Listed({}), 5)
    assert [span for _, span in taken] == [Span(None, None)]


# No progress.


def test_only_the_chain_user_with_a_next_cursor_asks_for_twice_as_many() -> None:
    walk = Walk(no_mirror)
    walk.take(numbered(1, 2, following=3))
    widened = []
    for _ in range(3):
        assert walk.take(numbered(2, following=3)) is None
        widened.append(walk.request)
    assert widened == [Request(place(2), key(2), widen) for widen in (2, 4, 8)]


def test_widened_request_is_narrow_again_after_progress() -> None:
    walk = Walk(no_mirror)
    walk.take(numbered(1, 2, following=3))
    walk.take(numbered(2, following=3))
    assert walk.take(numbered(2, 3, following=4)) == Span(key(2), key(3))
    assert walk.request == Request(place(3), key(3))


def test_only_the_chain_user_without_a_next_cursor_is_the_end() -> None:
    walk = Walk(no_mirror)
    walk.take(numbered(1, 2, following=3))
    assert walk.take(numbered(2)) == Span(key(2), None)
    assert walk.ended


def test_first_page_of_records_without_ids_asks_for_twice_as_many() -> None:
    walk = Walk(no_mirror)
    assert walk.take(page_of([("x", 1), ("y", 2)], user_id(3))) is None
    assert walk.request == Request(widen=2)


def insist(walk: Walk, answer: Callable[[Request], Page]) -> None:
    for _ in range(3 * MAX_RECOVERIES):
        walk.take(answer(walk.request))


CIRCLE = [(user_id(1), "x"), (user_id(2), "x")]
STUBBORN: dict[str, Callable[[Request], Page]] = {
    "nothing": lambda _: page_of([], user_id(1)),
    "lost": lambda request: page_of([]) if request.cursor else numbered(1, 2, following=3),
    "repeating": lambda _: numbered(1, 2, following=3),
    "repeating the chain user": lambda request: page_of(
        [(request.cursor.id, request.cursor.millis)] if request.cursor else [(user_id(1), 1)],
        user_id(2),
    ),
    "descending": lambda _: numbered(2, 1, following=3),
    "descending behind the cursor": lambda request: page_of(
        [(user_id(5), 5), (user_id(4), 4)] if request.cursor else [(user_id(5), 5)], user_id(6)
    ),
    "circling": lambda request: numbered(
        *((2, 3) if request.cursor == place(3) else (1, 3)), following=4
    ),
    "circling without a key": lambda request: page_of(
        CIRCLE[::-1] if request.cursor == Place(user_id(2), "x") else CIRCLE, user_id(1)
    ),
}


@pytest.mark.parametrize("server", STUBBORN)
def test_server_that_leads_nowhere_ends_in_an_incomplete_sweep(server: str) -> None:
    walk = Walk(no_mirror)
    with pytest.raises(SweepIncomplete):
        insist(walk, STUBBORN[server])
    assert not walk.ended
    assert walk.recoveries == MAX_RECOVERIES + 1


def test_incomplete_walk_says_behind_whom_it_stuck() -> None:
    walk = Walk(no_mirror)
    walk.take(numbered(1, 2, following=3))
    with pytest.raises(SweepIncomplete, match=user_id(2)):
        insist(walk, STUBBORN["lost"])


def test_recoveries_with_progress_between_them_are_never_too_many() -> None:
    listed = Listed.of(range(400))
    walk = Walk(no_mirror)
    taken = read(walk, listed, 3, lambda page: listed.lose([page.last.id] if page.last else []))
    assert_covers_everything(taken)
    assert walk.recoveries > 2 * MAX_RECOVERIES


def test_long_way_from_the_start_after_a_recovery_is_no_lack_of_progress() -> None:
    listed = Listed.of(range(1_000))
    walk = Walk(no_mirror, resume_at=key(990))
    listed.lose([user_id(990)])
    taken = read(walk, listed, 2)
    assert len(taken) > 10 * MAX_RECOVERIES
    assert walk.recoveries == 1


class Users(list[User]):
    """A list that can be watched."""


def test_walk_keeps_no_page_longer_than_itself() -> None:
    """Nor until the next garbage collection, which may be long in coming."""
    gc.disable()
    try:
        walk = Walk(lambda _key: None)
        page = replace(numbered(1, 2, 3), users=Users(numbered(1, 2, 3).users))
        users = weakref.ref(page.users)
        walk.take(page)
        del page, walk
        assert users() is None
    finally:
        gc.enable()
