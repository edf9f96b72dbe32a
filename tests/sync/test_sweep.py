"""What a sweep promises when nothing goes wrong, and what it costs."""

import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support.sweep_world import PLAIN, World, before_page, is_list, numbered, sign_up
from tests.support.users_apis import every_server
from worker.sandbox.api import APRIL, TODAY, Request
from worker.settings.settings import Settings
from worker.sync.state import SweepState
from worker.sync.sweep import Report

SHAPES = pytest.mark.parametrize("id_type", [None, "text", "uuid"])


def adopt(world: World, id_type: str | None) -> None:
    """Create a plain table with this type of id; None leaves it to the worker."""
    if id_type:
        world.query(PLAIN.replace("{id_type}", id_type))


def changes(report: Report) -> dict[str, int]:
    """Give what a sweep counted beside pages and users."""
    counted = {name: n for name, n in report.counts.items() if n and name not in {"pages", "users"}}
    return counted | ({"waiting": report.waiting} if report.waiting else {})


@SHAPES
def test_every_user_becomes_a_live_row_with_the_right_columns(
    world: World, id_type: str | None
) -> None:
    adopt(world, id_type)
    world.project.populate(60)

    report = world.sweep(page_size=7)

    assert world.wanted() == world.rows()
    assert (report.outcome, changes(report)) == ("complete", {"inserted": 60})
    assert world.query("select count(*) from {users_sync} where updated_at is not null") == [(0,)]


@every_server
@pytest.mark.parametrize(("users", "requests"), [(0, 1), (150, 1), (1_000, 1), (2_503, 3)])
def test_with_default_settings_each_kind_of_server_is_read_to_its_end(
    quick_world: World, users: int, requests: int
) -> None:
    quick_world.project.populate(users)

    first = quick_world.sweep(page_size=Settings().stack.page_size)

    assert (first.outcome, first.counts["inserted"]) == ("complete", users)
    assert len(quick_world.cursors()) == requests
    assert quick_world.wanted() == quick_world.rows()
    before = quick_world.versions()
    second = quick_world.sweep(page_size=Settings().stack.page_size)
    assert (second.outcome, second.unchanged, changes(second)) == ("complete", users, {})
    assert before == quick_world.versions()


@pytest.mark.parametrize("page_size", [1_000, 30_000])
def test_a_server_that_takes_500_users_a_page_is_asked_for_500(
    quick_world: World, page_size: int
) -> None:
    quick_world.project.populate(1_200)
    quick_world.api.kind = replace(TODAY, cap=500)

    report = quick_world.sweep(page_size=page_size)

    assert (report.outcome, report.counts["inserted"]) == ("complete", 1_200)
    assert limits(quick_world) == [page_size, 500, 500, 500]
    assert quick_world.wanted() == quick_world.rows()


def test_a_cap_that_appears_in_the_middle_of_a_sweep_is_learnt(quick_world: World) -> None:
    quick_world.project.populate(5_000)
    quick_world.api.kind = APRIL

    def change(_: Request) -> None:
        quick_world.api.kind = TODAY

    quick_world.api.on_request(before_page(3, change))
    report = quick_world.sweep(page_size=1_500)

    assert (report.outcome, report.counts["inserted"]) == ("complete", 5_000)
    assert limits(quick_world) == [1_500, 1_500, 1_500, 1_000, 1_000, 1_000]
    assert quick_world.wanted() == quick_world.rows()


def limits(world: World) -> list[int]:
    """Say how many users were asked for, page by page."""
    return [int(request.query["limit"]) for request in world.api.requests if is_list(request)]


@SHAPES
def test_edits_deletions_and_sign_ups_reach_the_table(world: World, id_type: str | None) -> None:
    adopt(world, id_type)
    ids = world.project.populate(40)
    world.sweep()
    world.project.edit(ids[3], display_name="Renamed", primary_email="New@Example.com")
    world.project.edit(ids[20], client_metadata={"deep": [1, {"a": None}]})
    world.project.upgrade(ids[7])
    world.project.delete(ids[30])
    sign_up(world.project, 1, 2)

    report = world.sweep()

    assert world.wanted() == world.rows()
    assert world.deleted() == {ids[30]}
    assert changes(report) == {"inserted": 2, "updated": 3, "deleted": 1}
    updated = world.query("select id::text from {users_sync} where updated_at is not null")
    assert {(ids[3],), (ids[20],), (ids[7],)} == set(updated)


@SHAPES
def test_a_second_sweep_of_an_unchanged_project_writes_no_row(
    world: World, id_type: str | None
) -> None:
    adopt(world, id_type)
    world.project.populate(40)
    world.sweep()
    before = world.versions()

    report = world.sweep()

    assert before == world.versions()
    assert (changes(report), report.unchanged, report.candidates) == ({}, 40, 0)


def test_session_refreshes_are_no_change(world: World) -> None:
    ids = world.project.populate(12)
    world.sweep()
    before = world.versions()
    for user_id in ids:
        world.project.touch(user_id)

    report = world.sweep()

    assert before == world.versions()
    assert (changes(report), report.unchanged) == ({}, 12)


def test_an_edit_alone_is_written_and_its_neighbours_are_left_alone(world: World) -> None:
    ids = world.project.populate(30)
    world.sweep()
    before = world.versions()
    world.project.edit(ids[11], display_name="Other")

    report = world.sweep()

    assert {ids[11]} == {row[0] for row in before ^ world.versions()}
    assert (changes(report), report.unchanged) == ({"updated": 1}, 29)


def test_an_empty_project_leaves_an_empty_table(world: World) -> None:
    report = world.sweep()

    assert (report.outcome, changes(report), report.counts["users"]) == ("complete", {}, 0)
    assert world.query("select * from {users_sync}") == []


@pytest.mark.parametrize("size", [3, 4, 41, 42, 43, 30_000])
def test_every_page_size_sees_each_user_once(quick_world: World, size: int) -> None:
    sign_up(quick_world.project, *range(42))

    report = quick_world.sweep(page_size=size)

    assert quick_world.wanted() == quick_world.rows()
    assert report.counts["users"] == 42


def test_restricted_and_anonymous_users_are_rows_too(quick_world: World) -> None:
    sign_up(quick_world.project, 1, 2)
    sign_up(quick_world.project, 3, is_restricted=True)
    sign_up(quick_world.project, 4, is_anonymous=True)

    quick_world.sweep(include_anonymous=True)

    assert {numbered(n) for n in (1, 2, 3, 4)} == quick_world.live()


def test_without_include_anonymous_hidden_users_are_no_rows(quick_world: World) -> None:
    sign_up(quick_world.project, 1, 2)
    sign_up(quick_world.project, 3, is_restricted=True)
    sign_up(quick_world.project, 4, is_anonymous=True)

    quick_world.sweep(include_anonymous=False)

    assert {numbered(1), numbered(2)} == quick_world.live()
    assert all("include_anonymous" not in request.query for request in quick_world.api.requests)


def test_another_schema_is_another_target(world: World) -> None:
    world.project.populate(9)
    world.schema = 'Odd "schema"'
    world.sweep(schema='Odd "schema"')

    report = world.sweep(schema='Odd "schema"')

    assert world.wanted() == world.rows()
    assert (changes(report), report.sweep) == ({}, 2)


def test_rows_whose_id_is_no_uuid_are_never_touched(world: World) -> None:
    adopt(world, "text")
    world.query("insert into {users_sync} (id, raw_json) values ('somebody', '{{}}')")
    before = world.versions()
    world.project.populate(3)

    world.sweep()

    assert before <= world.versions()
    assert "somebody" in world.live()


def test_rows_that_are_right_already_are_adopted_without_a_write(world: World) -> None:
    world.project.populate(20)
    world.sweep()
    world.query("drop schema users_sync_worker cascade")
    before = world.versions()

    report = world.sweep()

    assert before == world.versions()
    assert (changes(report), report.unchanged) == ({}, 20)


def test_a_row_that_is_newer_than_the_answer_is_left_alone(world: World) -> None:
    """Another writer changes a user after the page was asked for: the next sweep looks again."""
    ids = sign_up(world.project, 1, 2, 3)
    world.sweep()
    world.project.edit(ids[1], display_name="Ours")

    def write(_: Request) -> None:
        world.query(
            "update {users_sync} set updated_at = clock_timestamp(),"
            " raw_json = jsonb_set(raw_json, array['display_name'], '\"Theirs\"') where id = %s",
            ids[1],
        )

    world.api.on_request(write)
    report = world.sweep(page_size=100)

    assert changes(report) == {"stale": 1}
    assert world.rows()[ids[1]][1] == "Theirs"
    world.api.on_request(None)
    assert changes(world.sweep()) == {"updated": 1}
    assert world.wanted() == world.rows()


def test_each_sweep_leaves_a_row_and_no_checkpoint(world: World) -> None:
    world.project.populate(20)
    world.sweep()
    world.sweep()

    assert world.sweeps() == [(1, "complete", 0), (2, "complete", 0)]
    assert world.query("select * from users_sync_worker.checkpoint") == []


def test_the_lease_is_given_back(world: World) -> None:
    world.sweep()

    assert world.query(
        "select holder, expires_at < clock_timestamp() from users_sync_worker.lease"
    ) == [(None, True)]


def test_progress_is_told_after_each_page(world: World) -> None:
    sign_up(world.project, *range(9))
    seen = []

    world.sweep(lambda state: seen.append(state.counts["users"]), page_size=4)

    assert seen == [4, 7, 9]


APPLICATION = """
create table public.posts (
    id int primary key, author text not null references neon_auth.users_sync (id)
)
"""


def test_an_application_that_refers_to_unchanged_users_never_waits(world: World) -> None:
    """Neither for the sweep nor the sweep for it, though both are in the middle of their work."""
    ids = sign_up(world.project, *range(20))
    world.sweep()
    world.query(APPLICATION)
    world.project.edit(ids[12], display_name="Other")
    before = world.versions()
    world.query("set lock_timeout = '50ms'")

    def refer(state: SweepState) -> None:
        world.query("insert into public.posts values (%s, %s)", state.counts["users"], ids[1])

    with psycopg.connect(world.url) as application:
        application.execute("insert into public.posts values (-1, %s)", (ids[0],))
        application.execute("insert into public.posts values (-2, %s)", (ids[19],))
        report = world.sweep(refer, page_size=5)

    assert (report.outcome, changes(report)) == ("complete", {"updated": 1})
    assert {ids[12]} == {row[0] for row in before ^ world.versions()}


@pytest.mark.usefixtures("short_lock_waits")
def test_a_row_that_an_application_keeps_locked_is_left_for_the_next_sweep(world: World) -> None:
    locked, free = sign_up(world.project, 1, 2)
    world.sweep()
    world.project.edit(locked, display_name="Locked")
    world.project.edit(free, display_name="Free")

    with psycopg.connect(world.url) as application:
        application.execute("select from neon_auth.users_sync where id = %s for update", (locked,))
        report = world.sweep()

    assert (report.outcome, changes(report)) == ("complete", {"updated": 1, "stale": 1})
    assert changes(world.sweep()) == {"updated": 1}
    assert world.wanted() == world.rows()


@dataclass
class Traffic:
    """What went to the server, by kind of message, and how often it said it was ready again."""

    sent: Counter[bytes] = field(default_factory=Counter)
    ready: int = 0


@contextmanager
def counting_proxy(url: str) -> Iterator[tuple[str, Traffic]]:
    """Stand between the worker and Postgres, and count the messages of the protocol."""
    given = conninfo_to_dict(url)
    traffic = Traffic()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)
        over = threading.Event()
        thread = threading.Thread(target=_accept, args=(listener, given, traffic, over))
        thread.start()
        port = listener.getsockname()[1]
        try:
            yield (
                make_conninfo(
                    url, host="127.0.0.1", port=port, sslmode="disable", gssencmode="disable"
                ),
                traffic,
            )
        finally:
            over.set()
            thread.join()


def _accept(
    listener: socket.socket,
    given: dict[str, str | int | None],
    traffic: Traffic,
    over: threading.Event,
) -> None:
    threads = []
    while not over.is_set():
        with suppress(TimeoutError):
            client = listener.accept()[0]
            server = _connect(str(given["host"]), int(given["port"] or 5432))
            pumps = (
                (client, server, lambda kind: traffic.sent.update([kind]), 1),
                (server, client, lambda kind: _count_ready(traffic, kind), 0),
            )
            for pump in pumps:
                threads.append(threading.Thread(target=_pump, args=pump))
                threads[-1].start()
    for thread in threads:
        thread.join()


def _connect(host: str, port: int) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_connection((host, port))
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"{host}/.s.PGSQL.{port}")
    return server


def _count_ready(traffic: Traffic, kind: bytes) -> None:
    traffic.ready += kind == b"Z"


def _pump(
    fetcher: socket.socket, target: socket.socket, tell: Callable[[bytes], None], untyped: int
) -> None:
    """Pass bytes on; `untyped` messages at the start have a length but no letter."""
    buffer = b""
    with fetcher:
        while part := fetcher.recv(65536):
            buffer += part
            while len(buffer) >= 5:
                letter = 0 if untyped else 1
                length = letter + int.from_bytes(buffer[letter : letter + 4])
                if len(buffer) < length:
                    break
                if not untyped:
                    tell(buffer[:1])
                untyped = 0
                buffer = buffer[length:]
            target.sendall(part)
        with suppress(OSError):
            target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("change", ["sign-ups", "edits", "nothing"])
def test_a_page_costs_at_most_four_round_trips_however_many_users_are_on_it(
    world: World, change: str
) -> None:
    """Two sweeps differ in their pages alone, so the difference between them is what pages cost."""
    costs = []
    for pages, size in ((2, 20), (10, 20), (10, 40)):
        world.forget_everything()
        ids = sign_up(world.project, *range(pages * (size - 1) + 1))
        if change != "sign-ups":
            world.sweep(page_size=size)
        for user_id in ids if change == "edits" else ():
            world.project.edit(user_id, display_name="Other")
        with counting_proxy(world.url) as (url, traffic):
            report = World(url, world.conn, world.project).sweep(page_size=size)
        assert (report.counts["pages"], report.outcome) == (pages, "complete")
        costs.append((traffic.ready, traffic.sent[b"Q"] + traffic.sent[b"P"]))

    assert costs[1][0] - costs[0][0] <= 4 * 8
    # Time limits, fence, users, checkpoint, and begin and commit.
    assert costs[1][1] - costs[0][1] <= 6 * 8
    assert costs[1] == costs[2]


def test_the_next_page_is_asked_for_while_one_is_applied(world: World) -> None:
    """One page ahead, no more."""
    sign_up(world.project, *range(13))
    ahead = []

    def look(state: SweepState) -> None:
        asked = len([request for request in world.api.requests if is_list(request)])
        ahead.append(asked - state.counts["pages"])

    world.sweep(look, page_size=4)

    assert max(ahead) <= 1
