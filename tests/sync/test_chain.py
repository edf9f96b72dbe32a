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

from worker.errors import SweepIncomplete
from worker.ids import pack
from worker.model import Key, Page, Place
from worker.stack_auth.careful_reader import parse_page
from worker.sync.chain import MAX_RECOVERIES, Chain, Pair, Request
from worker.sync.mirror import Mirror, Span

ASKED_AT = datetime(2026, 11, 21, tzinfo=UTC)


def user_id(number: int) -> str:
    return f"{number:08d}-0000-4000-8000-000000000000"


def key(number: int) -> Key:
    return number, user_id(number)


def place(number: int) -> Place:
    return Place(user_id(number), number)


def pair(number: int) -> Pair:
    """Give a user of this number and the one before."""
    return Pair(place(number - 1), place(number))


def behind(number: int) -> Request:
    return Request(pair(number), key(number))


def page_of(items: Sequence[tuple[str, Any]], next_cursor: str | None = None) -> Page:
    records = [{"id": id_, "signed_up_at_millis": millis} for id_, millis in items]
    answer = {"items": records, "pagination": {"next_cursor": next_cursor}}
    return parse_page(json.dumps(answer).encode(), ASKED_AT, ())


def numbered(*numbers: int, following: int | None = None) -> Page:
    """Write a page of users that signed up in the millisecond of their number."""
    next_cursor = None if following is None else user_id(following)
    return page_of([(user_id(number), number) for number in numbers], next_cursor)


APRIL, TODAY, CHANGING = "april", "today", "changing"
SERVERS = [APRIL, TODAY, CHANGING]


@dataclass
class Listed:
    """The users API's list, with its lies: nobody tells a lost cursor from a clean end.

    The server is of April, of today, or changes from one to the other after each third answer.
    With `newest_first` its list is asked for in this order.
    """

    users: dict[str, int]
    server: str = TODAY
    newest_first: bool = False
    forgetful: bool = False
    asked: list[Request] = field(default_factory=list)

    @classmethod
    def of(cls, numbers: Iterable[int], server: str = TODAY) -> "Listed":
        return cls({user_id(number): number for number in numbers}, server)

    @property
    def inclusive(self) -> bool:
        """Whether the next page begins with the cursor's user."""
        changed = self.server == CHANGING and len(self.asked) % 6 < 3
        return self.server == APRIL or changed

    def answer(self, request: Request, limit: int) -> Page:
        self.asked.append(request)
        listed = sorted(self.users.items(), key=lambda item: (item[1], item[0]))
        if self.newest_first:
            listed.reverse()
        at = 0
        if request.cursor is not None:
            known = None if self.forgetful else self.users.get(request.cursor)
            self.forgetful = False
            if known is None:
                return page_of([])
            at = listed.index((request.cursor, known)) + (not self.inclusive)
        end = at + limit * request.widen
        following = listed[end if self.inclusive else end - 1][0] if end < len(listed) else None
        return page_of(listed[at:end], following)

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
    chain: Chain, listed: Listed, limit: int, between: Callable[[Page], None] | None = None
) -> Taken:
    """Walk to the end; `between` happens after each answer, before the next is asked for."""
    taken: Taken = []
    while not chain.ended:
        page = listed.answer(chain.request, limit)
        span = chain.take(page)
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
    taken = read(Chain(), listed, 10)
    assert [span for _, span in taken] == [Span(None, None)]
    assert listed.asked == [Request()]


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("limit", [3, 7, 10, 11, 50])
def test_quiet_list_is_read_once_without_a_gap(limit: int, server: str) -> None:
    listed = Listed.of(range(10), server)
    chain = Chain()
    taken = read(chain, listed, limit)
    assert_covers_everything(taken)
    assert ids_of(taken) == set(listed.users)
    assert chain.recoveries == 0
    met_again = {APRIL: 2, TODAY: 1}
    if server in met_again:
        behind_the_first = -(-(10 - limit) // (limit - met_again[server]))
        assert len(taken) == 1 + max(0, behind_the_first)


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("limit", [3, 7, 50])
def test_list_is_read_from_its_end_likewise(limit: int, server: str) -> None:
    listed = Listed.of(range(10), server)
    listed.newest_first = True
    chain = Chain(newest_first=True)
    taken = read(chain, listed, limit)
    assert (ids_of(taken), chain.recoveries) == (set(listed.users), 0)


def test_each_page_is_asked_for_with_the_second_last_user_of_the_page_before() -> None:
    listed = Listed.of(range(7), TODAY)
    taken = read(Chain(), listed, 3)
    assert listed.asked == [Request(), behind(2), behind(4)]
    assert [request.cursor for request in listed.asked] == [None, user_id(1), user_id(3)]
    assert [span for _, span in taken] == [
        Span(None, key(2)),
        Span(key(2), key(4)),
        Span(key(4), None),
    ]


def test_both_kinds_of_server_prove_the_same() -> None:
    for page in (numbered(1, 2, 3, following=4), numbered(2, 3, following=3)):
        chain = Chain()
        chain.take(numbered(1, 2, following=3))
        assert chain.take(page) == Span(key(2), key(3))
        assert chain.request == behind(3)


# The lies.


def around(listed: Listed, page: Page) -> dict[str, list[str]]:
    """Name the users around the end of a page."""
    before, last = page.places[-2].id, page.places[-1].id
    behind_it = sorted(key for key in zip(listed.users.values(), listed.users, strict=True))
    later = [id_ for _, id_ in behind_it if (listed.users[id_], id_) > (page.places[-1].key or ())]
    return {
        "the one before": [before],
        "last": [last],
        "behind": later[:1],
        "all three": [before, last, *later[:1]],
    }


LIES: dict[str, Callable[[Listed, Sequence[str]], None]] = {
    "deleted": Listed.lose,
    "moved": Listed.move,
    "forgotten": lambda listed, _: setattr(listed, "forgetful", True),
}


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize("limit", [3, 8, 30])
@pytest.mark.parametrize("whom", ["the one before", "last", "behind", "all three"])
def test_lost_cursor_neither_ends_the_walk_nor_skips_anybody(
    lie: str, limit: int, whom: str, server: str
) -> None:
    listed = Listed.of(range(100), server)
    touched: set[str] = set()
    lies = iter(range(8))

    def between(page: Page) -> None:
        if next(lies, None) is not None and len(page.users) > 1 and page.next_cursor:
            ids = around(listed, page)[whom]
            LIES[lie](listed, ids)
            touched.update(ids)

    taken = read(Chain(), listed, limit, between)
    assert_covers_everything(taken)
    assert {user_id(number) for number in range(100)} - touched <= ids_of(taken)


def test_empty_answer_to_a_cursor_proves_nothing() -> None:
    chain = Chain()
    chain.take(numbered(1, 2, following=3))
    assert chain.take(page_of([])) is None
    assert not chain.ended


def test_moved_cursor_with_a_clean_end_proves_nothing() -> None:
    chain = Chain()
    chain.take(numbered(1, 2, following=3))
    assert chain.take(page_of([(user_id(1), 900)])) is None
    assert not chain.ended


@pytest.mark.parametrize("numbers", [(3, 4), (1, 3, 4), (1,), (0, 1, 2, 3), (2, 1)])
def test_page_that_does_not_begin_with_the_pair_or_its_last_proves_nothing(
    numbers: tuple[int, ...],
) -> None:
    """A server may count the place of a hidden cursor, and drop the first user behind it."""
    chain = Chain()
    chain.take(numbered(1, 2, following=3))
    assert chain.take(numbered(*numbers)) is None
    assert not chain.ended


def test_last_user_at_another_place_proves_nothing() -> None:
    for items in ([(user_id(2), 5)], [(user_id(1), 1), (user_id(2), 5)], [(user_id(2), True)]):
        chain = Chain()
        chain.take(numbered(1, 2, following=3))
        assert chain.take(page_of(items)) is None


def test_page_that_does_not_ascend_proves_nothing() -> None:
    chain = Chain()
    chain.take(numbered(1, 2, following=3))
    assert chain.take(numbered(2, 5, 4)) is None
    assert not chain.ended


@pytest.mark.parametrize("server", [APRIL, TODAY])
def test_recovery_after_a_whole_page_was_deleted(server: str) -> None:
    listed = Listed.of(range(1_000), server)
    chain = Chain()
    change = once(lambda page: listed.lose([user.id for user in page.users[-120:]]))
    taken = read(chain, listed, 200, change)
    assert_covers_everything(taken)
    assert set(listed.users) <= ids_of(taken)
    # It asked behind the last one, and then 1, 2, 4, ..., 128 before it.
    assert chain.recoveries == 8


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("gone", [3, 120, 400])
def test_recovery_finds_the_way_back_through_the_mirror(server: str, gone: int) -> None:
    """Some pages were deleted; the list is not read from its start again for that."""
    listed = Listed.of(range(2_000), server)
    mirror = Mirror.load((number, pack(user_id(number))) for number in range(2_000))
    chain, left = Chain(mirror.pairs_before), [gone]

    def between(page: Page) -> None:
        if left and page.users and page.users[-1].millis >= 1_000:
            end, count = page.users[-1].millis + 1, left.pop()
            listed.lose([user_id(number) for number in range(end - count, end)])

    taken = read(chain, listed, 100, between)
    assert_covers_everything(taken)
    assert set(listed.users) <= ids_of(taken)
    assert 1 <= chain.recoveries <= 20
    assert listed.asked.count(Request()) == 1


@dataclass(frozen=True)
class Change:
    """What befalls the list between two answers; `nth` picks users, `count` says how many."""

    kind: str
    nth: int
    count: int

    def befall(self, listed: Listed, page: Page) -> list[str]:
        """Change the list; returns who is not where they were."""
        tail = [page.places[n] for n in range(len(page.places))][-2:]
        chosen = {
            "last": [place.id for place in tail[-1:]],
            "before": [place.id for place in tail[:1]],
            "both": [place.id for place in tail],
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
    "lose before",
    "lose both",
    "move last",
    "move before",
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
    server=st.sampled_from(SERVERS),
    users=st.integers(0, 120),
    a_millisecond=st.sampled_from([1, 3, 200]),
    limit=st.integers(3, 50),
    history=st.lists(changes, max_size=40),
    live_rows=st.sets(st.integers(0, 119)),
)
@settings(max_examples=300)
def test_every_walk_sees_whoever_stays_and_suspects_none_of_them(  # noqa: PLR0917
    server: str,
    users: int,
    a_millisecond: int,
    limit: int,
    history: list[Change],
    live_rows: set[int],
) -> None:
    listed = Listed({user_id(n): n // a_millisecond for n in range(users)}, server)
    before = dict(listed.users)
    rows = sorted((number // a_millisecond, pack(user_id(number))) for number in live_rows)
    touched: set[str] = set()
    left = list(history)

    def between(page: Page) -> None:
        if left:
            touched.update(left.pop(0).befall(listed, page))

    taken = read(Chain(Mirror.load(rows).pairs_before), listed, limit, between)
    assert_covers_everything(taken)
    stayed = {id_: millis for id_, millis in before.items() if id_ not in touched}
    assert set(stayed) <= ids_of(taken)
    for page, span in taken:
        expected = {id_ for id_, millis in stayed.items() if within(millis, id_, span)}
        assert expected <= page.ids


# The way back.


def test_way_back_leads_through_the_page_then_the_mirror_then_to_the_start() -> None:
    rows = [0, 1, 2, 3, 4, 6, 7, 50]
    mirror = Mirror.load((number, pack(user_id(number))) for number in rows)
    chain = Chain(mirror.pairs_before)
    chain.take(numbered(*range(10, 30), following=30))
    asked = []
    for _ in range(10):
        asked.append(chain.request)
        chain.take(page_of([]))
    through = [behind(n) for n in (29, 28, 27, 25, 21, 13, 7)]
    rows_before = [Request(Pair(place(4), place(6)), key(6)), behind(3)]
    assert asked == [*through, *rows_before, Request()]


def test_way_back_from_the_start_is_the_start() -> None:
    chain = Chain()
    chain.take(numbered(3, 2, 1))
    assert chain.request == Request()


def test_span_after_a_step_back_begins_where_it_stepped_to() -> None:
    chain = Chain()
    chain.take(numbered(1, 2, 3, following=4))
    chain.take(page_of([]))
    assert chain.request == behind(2)
    assert chain.take(numbered(2, 4, 5, following=6)) == Span(key(2), key(5))


def test_step_back_leads_behind_the_cursor_of_a_user_without_a_readable_sign_up() -> None:
    chain = Chain()
    span = chain.take(page_of([(user_id(1), 1), (user_id(2), 2), (user_id(3), "x")], user_id(4)))
    assert span == Span(None, key(2))
    assert chain.request == Request(Pair(place(2), Place(user_id(3), "x")), key(2))
    following = page_of([(user_id(3), "x"), (user_id(4), 4)])
    assert chain.take(following) == Span(key(2), None)


# From a checkpoint.


def mirror_of(numbers: Iterable[int]) -> Mirror:
    return Mirror.load((number, pack(user_id(number))) for number in numbers)


@pytest.mark.parametrize("server", SERVERS)
def test_resumed_walk_begins_behind_the_checkpoint(server: str) -> None:
    listed = Listed.of(range(20), server)
    taken = read(Chain(mirror_of(range(12)).pairs_before, resume_at=key(11)), listed, 5)
    assert listed.asked[0] == behind(11)
    assert taken[0][1].after == key(11)
    assert {user_id(n) for n in range(11, 20)} <= ids_of(taken)
    assert user_id(9) not in ids_of(taken)


def test_checkpoint_at_a_user_without_a_row_is_gone_on_from_as_well() -> None:
    """One whose record was refused, say."""
    listed = Listed.of(range(20))
    taken = read(Chain(mirror_of(range(11)).pairs_before, resume_at=key(11)), listed, 5)
    assert listed.asked[0] == behind(11)
    assert taken[0][1].after == key(11)


def test_resumed_walk_whose_user_is_gone_begins_behind_the_nearest_rows() -> None:
    listed = Listed.of(n for n in range(20) if n != 11)
    taken = read(Chain(mirror_of(range(20)).pairs_before, resume_at=key(11)), listed, 5)
    assert listed.asked[1] == behind(10)
    assert taken[0][1] == Span(key(10), key(15))


@pytest.mark.parametrize("rows", [[], [7]])
def test_resumed_walk_without_two_rows_begins_at_the_start(rows: list[int]) -> None:
    listed = Listed.of(range(5, 20))
    taken = read(Chain(mirror_of(rows).pairs_before, resume_at=key(12)), listed, 50)
    assert listed.asked == [Request()]
    assert ids_of(taken) == set(listed.users)


def test_resumed_walk_of_a_list_that_is_empty_now_ends_with_nobody() -> None:
    chain = Chain(mirror_of(range(20)).pairs_before, resume_at=key(11))
    taken = read(chain, Listed({}), 5)
    assert [span for _, span in taken] == [Span(None, None)]


# No progress.


@pytest.mark.parametrize("numbers", [(2,), (1, 2)])
def test_nobody_but_the_pair_with_a_next_cursor_asks_for_twice_as_many(
    numbers: tuple[int, ...],
) -> None:
    chain = Chain()
    chain.take(numbered(1, 2, following=3))
    widened = []
    for _ in range(3):
        assert chain.take(numbered(*numbers, following=3)) is None
        widened.append(chain.request)
    assert widened == [Request(pair(2), key(2), widen) for widen in (2, 4, 8)]


def test_one_user_with_a_next_cursor_asks_for_twice_as_many() -> None:
    """There is no pair yet to go on behind."""
    chain = Chain()
    assert chain.take(numbered(1, following=2)) is None
    assert chain.request == Request(widen=2)


def test_first_page_without_any_key_covers_no_user() -> None:
    """Such a page says nothing about who is missing."""
    chain = Chain()
    odd = [(user_id(number), number + 0.5) for number in range(3)]
    assert chain.take(page_of(odd, user_id(3))) is None
    assert (chain.request, chain.ended) == (Request(widen=2), False)


def test_widened_request_is_narrow_again_after_progress() -> None:
    chain = Chain()
    chain.take(numbered(1, 2, following=3))
    chain.take(numbered(2, following=3))
    assert chain.take(numbered(2, 3, following=4)) == Span(key(2), key(3))
    assert chain.request == behind(3)


@pytest.mark.parametrize("numbers", [(2,), (1, 2)])
def test_nobody_but_the_pair_without_a_next_cursor_is_the_end(numbers: tuple[int, ...]) -> None:
    chain = Chain()
    chain.take(numbered(1, 2, following=3))
    assert chain.take(numbered(*numbers)) == Span(key(2), None)
    assert chain.ended


def test_first_page_of_records_without_ids_asks_for_twice_as_many() -> None:
    chain = Chain()
    assert chain.take(page_of([("x", 1), ("y", 2)], user_id(3))) is None
    assert chain.request == Request(widen=2)


def insist(chain: Chain, answer: Callable[[Request], Page]) -> None:
    for _ in range(3 * MAX_RECOVERIES):
        chain.take(answer(chain.request))


def repeated(request: Request) -> list[tuple[str, Any]]:
    """Give the pair that a page must begin with."""
    assert request.pair is not None
    return [(place.id, place.millis) for place in request.pair]


CIRCLE = [(user_id(1), "x"), (user_id(2), "x")]
STUBBORN: dict[str, Callable[[Request], Page]] = {
    "nothing": lambda _: page_of([], user_id(1)),
    "lost": lambda request: page_of([]) if request.cursor else numbered(1, 2, following=3),
    "repeating": lambda _: numbered(1, 2, following=3),
    "one user": lambda _: numbered(1, following=2),
    "repeating the pair": lambda request: (
        page_of(repeated(request), user_id(2)) if request.pair else numbered(1, 2, following=3)
    ),
    "repeating the last": lambda request: (
        page_of(repeated(request)[1:], user_id(2)) if request.pair else numbered(1, 2, following=3)
    ),
    "descending": lambda _: numbered(2, 1, following=3),
    "descending behind the cursor": lambda request: (
        numbered(5, 4, following=6) if request.cursor else numbered(5, following=6)
    ),
    "circling": lambda request: numbered(
        *((2, 3) if request.cursor == user_id(3) else (1, 3)), following=4
    ),
    "circling without a key": lambda request: (
        page_of([*repeated(request), CIRCLE[0]], user_id(1))
        if request.pair and request.pair.last.id == user_id(2)
        else page_of(CIRCLE, user_id(1))
    ),
}


@pytest.mark.parametrize("server", STUBBORN)
def test_server_that_leads_nowhere_ends_in_an_incomplete_sweep(server: str) -> None:
    chain = Chain()
    with pytest.raises(SweepIncomplete):
        insist(chain, STUBBORN[server])
    assert not chain.ended
    assert chain.recoveries == MAX_RECOVERIES + 1


def test_incomplete_walk_says_behind_whom_it_stuck() -> None:
    chain = Chain()
    chain.take(numbered(1, 2, following=3))
    with pytest.raises(SweepIncomplete, match=user_id(2)):
        insist(chain, STUBBORN["lost"])


@pytest.mark.parametrize("server", SERVERS)
def test_recoveries_with_progress_between_them_are_never_too_many(server: str) -> None:
    listed = Listed.of(range(800), server)
    chain = Chain()
    taken = read(chain, listed, 6, lambda page: listed.lose(u.id for u in page.users[-1:]))
    assert_covers_everything(taken)
    assert chain.recoveries > 2 * MAX_RECOVERIES


def test_long_way_from_the_start_after_a_recovery_is_no_lack_of_progress() -> None:
    listed = Listed.of(range(1_000))
    chain = Chain(mirror_of([988, 989]).pairs_before, resume_at=key(990))
    listed.lose([user_id(988), user_id(989), user_id(990)])
    taken = read(chain, listed, 3)
    assert len(taken) > 5 * MAX_RECOVERIES
    assert chain.recoveries == 2


class Records(list[bytes]):
    """A list that can be watched."""


def test_walk_keeps_no_page_longer_than_itself() -> None:
    """Nor until the next garbage collection, which may be long in coming."""
    gc.disable()
    try:
        chain = Chain()
        records = Records([b"{}"] * 3)
        page = numbered(1, 2, 3)
        page = replace(page, users=replace(page.users, records=records))
        watched = weakref.ref(records)
        chain.take(page)
        del page, records, chain
        assert watched() is None
    finally:
        gc.enable()
