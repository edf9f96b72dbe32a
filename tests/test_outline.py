"""What an outline says of a page's place in the list is what a full reading says."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Event
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.decode import BrokenBody, parse_page
from worker.errors import SourceUnavailable, Transient
from worker.model import Page, Place
from worker.outline import Arrival, outline_of
from worker.page_size import PageSize
from worker.retry import Retry
from worker.source import Source
from worker.walk import Outlined, Request

ASKED_AT = datetime(2026, 11, 21, tzinfo=UTC)


def user_id(number: int) -> str:
    return f"{number:08x}-0000-4000-8000-000000000000"


odd: st.SearchStrategy[Any] = st.sampled_from([None, True, 1.5, 10**17, -(10**17), "x", [], {}])
ids = st.integers(0, 9).map(user_id) | st.integers(0, 9).map(user_id) | odd
millis = st.integers(0, 9) | st.integers(0, 9) | odd
records = st.fixed_dictionaries(
    {"id": ids, "signed_up_at_millis": millis},
    optional={"display_name": st.text() | odd, "client_metadata": odd},
)
# Most lists are in order, or hardly any would have an outline.
lists = st.lists(records | odd, max_size=6)
ordered = st.lists(st.integers(0, 99), max_size=6, unique=True).map(
    lambda numbers: [
        {"id": user_id(n), "signed_up_at_millis": n // 2, "more": "\ud800" if n == 9 else n}
        for n in sorted(numbers)
    ]
)


def body_of(items: Any, next_cursor: Any = None) -> bytes:
    return json.dumps({"items": items, "pagination": {"next_cursor": next_cursor}}).encode()


def place_of(page: Outlined) -> tuple[Any, ...]:
    """Say all that the chain is proven by, and the way back."""
    places = [page.places[number] for number in range(len(page.places))]
    return places, page.ascending, page.descending, page.next_cursor


@given(lists | ordered, st.none() | st.text() | odd)
def test_outline_says_what_a_page_says(items: list[Any], next_cursor: Any) -> None:
    body = body_of(items, next_cursor)
    outline = outline_of(body)
    if outline is not None:
        page = parse_page(body, ASKED_AT, ())
        assert place_of(outline) == place_of(page)
        assert outline.size == page.size


@given(st.binary(max_size=40), st.integers(0, 90))
def test_what_has_an_outline_can_be_read(noise: bytes, at: int) -> None:
    whole = body_of([{"id": user_id(1), "signed_up_at_millis": 1, "display_name": "A"}])
    body = whole[:at] + noise + whole[at:]
    if outline_of(body) is not None:
        parse_page(body, ASKED_AT, ())


def test_page_in_order_has_an_outline() -> None:
    outline = outline_of(body_of([{"id": user_id(1), "signed_up_at_millis": 1}], user_id(2)))
    assert outline is not None
    assert place_of(outline) == ([Place(user_id(1), 1)], True, True, user_id(2))
    assert [outline.places[n] for n in (0, -1)] == [Place(user_id(1), 1)] * 2
    with pytest.raises(IndexError):
        outline.places[1]


@pytest.mark.parametrize(
    "items",
    [
        [],
        [{"id": user_id(1), "signed_up_at_millis": 1}] * 2,
        [{"id": user_id(n), "signed_up_at_millis": 1} for n in (2, 1)],
        [{"id": user_id(10).upper(), "signed_up_at_millis": 1}],
        [{"id": user_id(1), "signed_up_at_millis": 10**18}],
        [{"id": user_id(1), "signed_up_at_millis": True}],
        [{"signed_up_at_millis": 1}],
        "users",
    ],
)
def test_odd_page_is_left_to_a_full_reading(items: Any) -> None:
    assert outline_of(body_of(items)) is None


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"items":[', b"[" * 100_000, b"\xff"])
def test_broken_body_is_left_to_a_full_reading(body: bytes) -> None:
    assert outline_of(body) is None
    with pytest.raises(BrokenBody):
        parse_page(body, ASKED_AT, ())


def test_page_has_come_before_it_is_read() -> None:
    """The next one is asked for by then: the server should not have to wait for us."""
    page = parse_page(body_of([{"id": user_id(1), "signed_up_at_millis": 1}]), ASKED_AT, ())
    reading = Event()

    class Api:
        def fetch_arrival(self, _cursor: str | None, _limit: int) -> Arrival:
            return Arrival(page, lambda: page if reading.wait(10) else page_of_nobody)

    with source_of(Api()) as source:
        arrived = source.await_answer(source.ask_page(Request()))
        assert not arrived.page.done()
        reading.set()
        assert source.await_answer(arrived.page) is page


def test_page_that_cannot_be_read_after_all_is_no_page() -> None:
    def broken() -> Page:
        raise Transient("not JSON")

    class Api:
        def fetch_arrival(self, _cursor: str | None, _limit: int) -> Arrival:
            return Arrival(page_of_nobody, broken)

    with source_of(Api()) as source:
        arrived = source.await_answer(source.ask_page(Request()))
        with pytest.raises(SourceUnavailable, match="not JSON"):
            source.await_answer(arrived.page)


page_of_nobody = parse_page(body_of([]), ASKED_AT, ())


class _Lease:
    def renew_if_due(self) -> None: ...


@contextmanager
def source_of(api: Any) -> Iterator[Source]:
    retry = Retry("Stack Auth", 0, Event(), SourceUnavailable)
    source = Source(api, retry, page_size=PageSize(10), lease=_Lease())
    try:
        yield source
    finally:
        source.close()
