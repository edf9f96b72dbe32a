"""Whatever an answer holds, it is read or refused: no bug, no endless memory, no false proof."""

import json
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from threading import Event
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.faults.hostile_json import answers, damaged, odd, page_of, records, user_id, written
from worker.clock import Clock
from worker.errors import Misconfigured, Transient
from worker.model import Page, Unreadable, User
from worker.stack_auth.careful_reader import BrokenBody, parse_page, storable
from worker.stack_auth.client import Access, StackApi

ASKED_AT = datetime(2026, 11, 21, tzinfo=UTC)
IGNORED = ("last_active_at_millis",)
ID = user_id(1)
MEGABYTE = 2**20

codes = st.sampled_from(["USER_NOT_FOUND", "TEAM_NOT_FOUND", "SCHEMA_ERROR", "", "A" * 70])
errors = st.builds(
    lambda code, error: written({"code": json.dumps(code).encode(), "error": error}),
    codes,
    odd | st.just(b'"query contains unknown properties: a@b.example"'),
)
statuses = st.sampled_from([200, 206, 302, 400, 401, 404, 404, 410, 429, 500, 503, 599])
headers = st.dictionaries(
    st.sampled_from(
        [
            "retry-after",
            "x-stack-known-error",
            "x-hexclave-known-error",
            "content-type",
            "location",
            "date",
            "etag",
        ]
    ),
    codes | st.sampled_from(["1e99", "text/html", "http://[", "Sat, 21 Nov 2026 00:44:12 GMT"]),
)


def repeated(times: int) -> settings:
    return settings(
        max_examples=times, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )


@contextmanager
def asking(answer: Callable[[], httpx.Response]) -> Iterator[StackApi]:
    access = Access("https://stack.example.com", "p1", "ssk_very_secret")
    transport = httpx.MockTransport(lambda _: answer())
    with StackApi(access, clock=Clock(), stop=Event(), transport=transport) as api:
        yield api


def what_it_says(page: Page) -> tuple[Any, ...]:
    """Say everything that a walk makes of a page."""
    places = [page.places[number] for number in range(len(page.places))]
    place = places, page.ascending, page.next_cursor
    return storable(page.users, IGNORED).users.ids, place, page.ids


def judged_by_database(page: Page) -> bool:
    """Whether a record is unreadable in full, and goes into the table's own hands as it came."""
    return any(bad.error.startswith("a number") for bad in page.unreadable)


@pytest.mark.fault(
    "the list answers anything, three times in a row",
    held="each is a page or none, the same whichever way it is read",
    quick=40,
    thorough=3_000,
)
def test_any_answer_is_a_page_or_none(tries: int) -> None:
    @repeated(tries)
    @given(st.lists(answers | damaged(), min_size=1, max_size=3))
    def attempt(bodies: list[bytes]) -> None:
        left = list(bodies)
        with asking(lambda: httpx.Response(200, content=left.pop(0))) as api:
            for body in bodies:
                careful = page_or_none(parse_page, body, ASKED_AT, IGNORED)
                page = page_or_none(api.fetch_page, None, 2)
                if page is None:
                    assert careful is None or body.lstrip().startswith(b"<")
                    continue
                assert careful is not None
                users = storable(page.users, IGNORED).users
                assert all(json.loads(user.json, strict=False)["id"] for user in users)
                if not judged_by_database(careful):
                    assert what_it_says(page) == what_it_says(careful)

    attempt()


def page_or_none(read: Callable[..., Page], *arguments: Any) -> Page | None:
    try:
        return read(*arguments)
    except (BrokenBody, Transient):
        return None


@pytest.mark.fault(
    "the question for a user is answered by anything, with any status",
    held="only 404 USER_NOT_FOUND is a proof, and no answer about another user counts",
    quick=40,
    thorough=3_000,
)
def test_nothing_but_the_proof_proves_that_a_user_is_gone(tries: int) -> None:
    @repeated(tries)
    @given(statuses, headers, errors | records | answers | damaged(errors) | st.binary())
    def attempt(status: int, said: dict[str, str], body: bytes) -> None:
        with asking(lambda: httpx.Response(status, headers=said, content=body)) as api:
            found = user_or_error(api)
        match found:
            case None:
                assert (status, json.loads(body)["code"]) == (404, "USER_NOT_FOUND")
                assert set(said) & {"x-stack-known-error", "x-hexclave-known-error"}
            case Transient() | Misconfigured():
                assert "@" not in str(found)
            case _:
                assert status < 300
                assert found.id in {None, ID}

    attempt()


def user_or_error(api: StackApi) -> User | Unreadable | Transient | Misconfigured | None:
    try:
        return api.fetch_user(ID).found
    except (Transient, Misconfigured) as error:
        return error


def about(value: bytes) -> bytes:
    """Write a page of one user, who holds this, and one ordinary user."""
    users = [
        {"id": b'"%b"' % user_id(number).encode(), "signed_up_at_millis": b"%d" % number, "m": held}
        for number, held in ((1, value), (2, b"null"))
    ]
    return page_of(b"[%b]" % b",".join(map(written, users)))


HEAVY: dict[str, Callable[[int], bytes]] = {
    "nesting": lambda size: about(b"[" * (size // 2) + b"]" * (size // 2)),
    "nested objects": lambda size: about(b'{"a":' * (size // 6) + b"1" + b"}" * (size // 6)),
    "nesting that is never closed": lambda size: b"[" * size,
    "a number of so many digits": lambda size: about(b"7" * size),
    "long numbers": lambda size: about(b"[%b]" % b",".join([b"7" * 4300] * (size // 4301))),
    "a fraction of so many digits": lambda size: about(b"0." + b"7" * size),
    "an exponent of so many digits": lambda size: about(b"1e" + b"7" * size),
    "long numbers in a text": lambda size: about(
        b'"%b"' % (b" 7777777777777777777" * (size // 20))
    ),
    "backslashes": lambda size: about(b'"%b"' % (b"\\\\" * (size // 2))),
    "a text that is never closed": lambda size: about(b'"' + b'\\"' * (size // 2)),
    "lone surrogates": lambda size: about(b'"%b"' % (b"\\ud800" * (size // 6))),
    "bytes that are no UTF-8": lambda size: about(b'"%b"' % (b"\xff" * size)),
    "one key again and again": lambda size: about(b"{%b}" % b",".join([b'"":0'] * (size // 5))),
    "many keys": lambda size: about(
        b"{%b}" % b",".join(b'"%d":"\\u0000"' % number for number in range(size // 18))
    ),
    "many records that are none": lambda size: page_of(
        b"[%b]" % b",".join(b"%d" % number for number in range(min(size // 8, 30_000)))
    ),
    "more records than anybody asks for": lambda size: page_of(b"[%b0]" % (b"{}," * (size // 3))),
    "a cursor of so many letters": lambda size: page_of(b"[]", b'"%b"' % (b"a" * size)),
    "an id of so many letters": lambda size: page_of(b'[{"id":"%b"}]' % (b"0" * size)),
}


@pytest.mark.fault(
    "an answer that is hard to read: nesting, numbers, keys, texts, records without end",
    held="read or refused within seconds a megabyte, and within eighty times its size",
)
@pytest.mark.parametrize("form", HEAVY)
def test_heavy_answer_takes_time_and_memory_like_its_length(
    form: str, request: pytest.FixtureRequest
) -> None:
    size = MEGABYTE if request.config.getoption("--thorough") else MEGABYTE // 8
    body = HEAVY[form](size)
    # What grows with the square of the length takes minutes: even Python's own int() does.
    assert seconds_of(body) < 12 * size / MEGABYTE
    assert memory_of(body) < 80 * size


def seconds_of(body: bytes) -> float:
    began = time.thread_time()
    read_whole(body)
    return time.thread_time() - began


def memory_of(body: bytes) -> int:
    tracemalloc.start()
    try:
        read_whole(body)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read_whole(body: bytes) -> None:
    with asking(lambda: httpx.Response(200, content=body)) as api:
        page = page_or_none(api.fetch_page, None, 2)
        if page is not None:
            assert all(user.json for user in storable(page.users, IGNORED).users)
