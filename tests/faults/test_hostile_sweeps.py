"""Whatever the API answers, a sweep ends, deletes nobody who lives, and changes no text."""

import json
from collections.abc import Callable
from contextlib import suppress
from itertools import cycle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.hostile_json import RAW, TEXTS, odd, page_of, plain, records, texts
from tests.faults.test_hostile_answers import errors, headers, repeated, statuses
from tests.support.service_world import ServiceWorld, opened_service_world
from tests.support.sweep_world import World, is_list, numbered, raw_record, sign_up
from tests.support.users_apis import both_servers
from tests.support.waiting import until
from worker.errors import Misconfigured, SourceUnavailable, SweepIncomplete
from worker.sandbox.api import Reply, Request
from worker.sandbox.replies import json_reply

USERS = 12
# Sixty answers that lead nowhere in a row end a walk; every user who is met begins a new row.
MOST_REQUESTS = 60 * (USERS + 2)

names = texts.filter(lambda name: name not in {"id", "signed_up_at_millis"})
profiles = st.fixed_dictionaries(
    {"display_name": texts, "primary_email": texts, "client_metadata": plain},
    optional={"server_metadata": st.dictionaries(texts, plain, max_size=3)},
)


@pytest.mark.fault(
    "names, emails and metadata are SQL, quotes, backslashes, `__proto__`",
    held="what is in Postgres is what the API said, and a second sweep writes nothing",
    quick=12,
    thorough=400,
)
def test_hostile_texts_stay_what_they_are(quick_world: World, tries: int) -> None:
    @repeated(tries)
    @given(st.lists(st.tuples(profiles, st.dictionaries(names, plain, max_size=3)), min_size=1))
    def attempt(people: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        quick_world.forget_everything()
        for number, (profile, more) in enumerate(people):
            sign_up(quick_world.project, number, **more | profile)
        quick_world.sweep()
        assert quick_world.wanted() == quick_world.rows()
        before = quick_world.versions()
        assert quick_world.sweep().unchanged == len(people)
        assert before == quick_world.versions()

    attempt()


@pytest.mark.fault(
    "every odd value and text at once, in front of a worker that polls and sweeps",
    held="all others are rows, and their edits arrive",
    quick=len(RAW) + len(TEXTS),
    thorough=len(RAW) + len(TEXTS),
)
def test_odd_records_cost_nobody_else_anything(
    database_url: str, connection: Any, tries: int
) -> None:
    with opened_service_world(database_url, connection) as world:
        ids = sign_up(world.project, *range(9))
        values = [*RAW, *(json.dumps({text: text}).encode() for text in TEXTS)]
        assert len(values) == tries
        for number, value in enumerate(values):
            put(world, 100 + number, 1_600_000_000_001, value)
        world.start(page_size=7)
        until("the others are rows", lambda: set(ids) <= world.live())
        world.project.edit(ids[8], display_name="edited")
        put(world, 99, 1_700_000_000_000, RAW[0])  # the newest: polls meet it, too
        until("the edit arrives", lambda: ("edited",) in world.query(NAMES))
        until("the newest is a row", lambda: numbered(99) in world.live())


NAMES = "select name from neon_auth.users_sync"


def put(world: ServiceWorld, number: int, millis: int, value: bytes) -> None:
    """Put a record with this value into the list; one that is no JSON at all as a text."""
    if value in {b"", b"[1,]", b"01", b"'a'"}:
        value = json.dumps(value.decode()).encode()
    record = raw_record(numbered(number), millis)[:-1] + b',"client_metadata":%b}' % value
    world.project.put_raw(numbered(number), millis, record)


# What a list may answer instead of the truth: users in any order, and any cursor.
numbers = st.lists(st.integers(0, USERS - 1), max_size=5)
cursors = (
    st.integers(0, USERS + 2).map(lambda number: json.dumps(numbered(number)).encode())
    | st.just(b"null")
    | st.sampled_from([b'""', b"0", b"[]", b'"\\u0000"', b'"../../x"', b'"' + b"9" * 9999 + b'"'])
    | odd
)
lies = st.none() | st.tuples(st.booleans(), numbers, cursors)


@both_servers
@pytest.mark.fault(
    "the list goes round in circles, repeats itself, has cursors that are none, never ends",
    held="the sweep ends after a bounded number of requests, and no living user is deleted",
    quick=25,
    thorough=1_500,
)
def test_a_list_that_leads_anywhere_leads_to_an_end(quick_world: World, tries: int) -> None:
    world = settled(quick_world)

    @repeated(tries)
    @given(st.lists(lies, min_size=1, max_size=6))
    def attempt(story: list[tuple[bool, list[int], bytes] | None]) -> None:
        world.api.requests.clear()
        world.api.on_request(liar(world, story))
        with suppress(SweepIncomplete, SourceUnavailable):
            world.sweep(retry_minutes=0, page_size=3)
        assert len(world.api.requests) < MOST_REQUESTS
        assert not world.deleted()

    attempt()


def liar(
    world: World, story: list[tuple[bool, list[int], bytes] | None]
) -> Callable[[Request], Reply | None]:
    """Tell the story from its begin, again and again; None in it is the truth."""
    people = {user_id: json.dumps(record) for user_id, record in world.project.users().items()}
    told = cycle(story)

    def lie(request: Request) -> Reply | None:
        said = next(told) if is_list(request) else None
        if said is None:
            return None
        in_order, chosen, cursor = said
        ids = [numbered(number) for number in (sorted(set(chosen)) if in_order else chosen)]
        items = ",".join(people[user_id] for user_id in ids)
        return json_reply(200, page_of(f"[{items}]".encode(), cursor))

    return lie


def settled(world: World) -> World:
    sign_up(world.project, *range(USERS))
    world.sweep()
    return world


@both_servers
@pytest.mark.fault(
    "users vanish from the list, and the question for each is answered by anything but the proof",
    held="no user is deleted",
    quick=15,
    thorough=800,
)
def test_no_user_is_deleted_by_answers_that_prove_nothing(quick_world: World, tries: int) -> None:
    world = settled(quick_world)
    people = list(world.project.users().values())
    others = page_of(json.dumps(people[3:]).encode())
    answer = st.tuples(
        statuses, headers, errors | records | st.just(json.dumps(people[5]).encode())
    )

    @repeated(tries)
    @given(st.lists(answer, min_size=3, max_size=3))
    def attempt(answers: list[tuple[int, dict[str, str], bytes]]) -> None:
        said = cycle(answers)

        def lie(request: Request) -> Reply:
            if is_list(request):
                return json_reply(200, others)
            status, named, body = next(said)
            if status == 404:
                body = body.replace(b"USER_NOT_FOUND", b"USER_NOT_FOUNT")
            return Reply(f"{status} Whatever", list(named.items()), body)

        world.api.on_request(lie)
        with suppress(SourceUnavailable, Misconfigured):
            world.sweep(retry_minutes=0, page_size=100, max_fraction=1)
        assert not world.deleted()
        world.api.on_request(None)
        world.sweep(page_size=100)
        if world.wanted() != world.rows():  # what was asked in the moment of a write may be older
            world.sweep(page_size=100)
        assert world.wanted() == world.rows()

    attempt()
