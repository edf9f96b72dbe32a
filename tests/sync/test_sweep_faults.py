"""What goes wrong on the way to either side: over real sockets, and what it leaves behind."""

import socket
from collections.abc import Callable, Container, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.support.faulty_server import Behaviour, FaultyServer, send, serving
from tests.support.sweep_world import World, before_page, delete_all, is_list, numbered, sign_up
from tests.support.waiting import PATIENCE_SECONDS, until
from worker.errors import (
    DatabaseUnavailable,
    LeaseLost,
    Misconfigured,
    SourceUnavailable,
    UsersSyncError,
)
from worker.sandbox.api import (
    APRIL,
    Project,
    Reply,
    Request,
    bad_gateway_html,
    cut_off,
    html_ok,
    serve,
    server_error,
    too_many_requests,
)

FAULTS = {
    "500": server_error(),
    "429": too_many_requests(),
    "429 with Retry-After": too_many_requests(0.1),
    "502 HTML": bad_gateway_html(),
    "200 HTML": html_ok(),
    "cut off": cut_off(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_sweep_outlives_a_fault_on_any_page_and_of_a_proof(
    quick_world: World, fault: str
) -> None:
    ids = sign_up(quick_world.project, *range(14))
    quick_world.sweep()
    quick_world.project.delete(ids[6])
    left = {"first", "middle", "proof"} if fault == "500" else {"middle"}

    def fail(request: Request) -> Reply | None:
        cursor = request.query.get("cursor", "none")
        place = {"none": "first", ids[3]: "middle"}.get(cursor) if is_list(request) else "proof"
        if place not in left:
            return None
        left.remove(place)
        return FAULTS[fault]

    quick_world.api.on_request(fail)
    with serve(quick_world.api) as api_url:
        report = quick_world.sweep(api_url=api_url)

    assert (report.outcome, report.counts["deleted"], left) == ("complete", 1, set())
    assert quick_world.wanted() == quick_world.rows()


@contextmanager
def relayed(url: str, behave: Behaviour, numbers: Container[int]) -> Iterator[FaultyServer]:
    """Pass each request on to `url`; those with these numbers, from 1, get `behave` instead."""

    def relay(connection: socket.socket, server: FaultyServer) -> None:
        if len(server.requests) in numbers:
            behave(connection, server)
            return
        host, port = url.removeprefix("http://").split(":")
        request = server.requests[-1].replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
        with socket.create_connection((host, int(port))) as upstream:
            upstream.sendall(request.replace(b"Connection: keep-alive\r\n", b""))
            while part := upstream.recv(65536):
                connection.sendall(part)

    with serving(relay) as server:
        yield server


HALF = (
    b'HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 500\r\n\r\n{"items":[{'
)


def _wait_until_given_up(connection: socket.socket) -> None:
    connection.recv(1)


DROPS: dict[str, Behaviour] = {
    "dropped": send(b""),
    "cut off": send(HALF),
    "no HTTP": send(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "hanging": lambda connection, _: _wait_until_given_up(connection),
}


def patience_with(fault: str) -> float:
    """Give the time-out in seconds: short only where nothing but time ends the request."""
    return 2 if fault == "hanging" else 30


@pytest.mark.parametrize("fault", DROPS)
@pytest.mark.parametrize("number", [1, 2, 3], ids=["first page", "last page", "proof"])
def test_a_sweep_outlives_a_broken_connection(quick_world: World, fault: str, number: int) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    quick_world.project.delete(ids[6])

    with serve(quick_world.api) as url, relayed(url, DROPS[fault], {number}) as server:
        report = quick_world.sweep(
            api_url=server.url, timeout_seconds=patience_with(fault), page_size=9
        )

    # After a page that failed the next ones are half as large, and so there are two more.
    assert len(server.requests) == (6 if number == 1 else 4)
    assert (report.outcome, report.counts["deleted"]) == ("complete", 1)
    assert quick_world.wanted() == quick_world.rows()


@pytest.mark.parametrize("fault", DROPS)
def test_a_proof_that_never_arrives_deletes_nobody(quick_world: World, fault: str) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    quick_world.project.delete(ids[6])

    with serve(quick_world.api) as url, relayed(url, DROPS[fault], range(3, 100)) as server:
        expect(
            quick_world,
            SourceUnavailable,
            api_url=server.url,
            timeout_seconds=patience_with(fault),
            retry_minutes=0,
            page_size=7,
        )

    assert set(ids) == quick_world.live()
    assert {ids[6]} == quick_world.suspects("candidate")


def test_users_may_go_while_a_page_is_asked_for_again(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(20))
    quick_world.sweep()

    def go(request: Request) -> Reply:
        quick_world.project.delete(request.query["cursor"])
        return server_error()

    quick_world.api.on_request(before_page(3, go))
    report = quick_world.sweep()

    assert (report.outcome, report.counts["deleted"]) == ("complete", 1)
    assert quick_world.wanted() == quick_world.rows()
    assert len(quick_world.deleted() & set(ids)) == 1


def expect(world: World, error: type[UsersSyncError], **options: Any) -> str:
    """Sweep in vain, and give the reason, which is one line."""
    with pytest.raises(error) as failure:
        world.sweep(**options)
    assert "\n" not in str(failure.value)
    return str(failure.value)


def test_an_api_that_is_down_ends_the_sweep_when_the_retries_are_used_up(
    quick_world: World,
) -> None:
    sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    before = quick_world.versions()
    with socket.create_server(("127.0.0.1", 0)) as unused:
        api_url = f"http://127.0.0.1:{unused.getsockname()[1]}"

    reason = expect(quick_world, SourceUnavailable, api_url=api_url, retry_minutes=0.001)

    assert "could not be reached" in reason
    assert before == quick_world.versions()
    assert quick_world.sweeps()[-1] == (2, "failed", 0)
    assert quick_world.query("select error from users_sync_worker.sweep where number = 2") == [
        (reason,)
    ]


def fail_from(page: int, reply: Reply) -> Callable[[Request], Reply | None]:
    """Make a hook that answers this page and all later ones in the same way."""
    pages = iter(range(1, 10_000))
    return lambda request: reply if is_list(request) and next(pages) >= page else None


@pytest.mark.parametrize("reply", [server_error(), bad_gateway_html(), too_many_requests(60)])
def test_an_api_that_goes_down_leaves_a_checkpoint_and_deletes_nobody(
    quick_world: World, reply: Reply
) -> None:
    ids = sign_up(quick_world.project, *range(20))
    quick_world.sweep()
    delete_all(quick_world.project, ids[1:3])
    quick_world.api.on_request(fail_from(3, reply))

    expect(quick_world, SourceUnavailable, retry_minutes=0)

    assert set(ids) == quick_world.live()
    assert set(ids[1:3]) == quick_world.suspects("candidate")
    assert quick_world.sweeps()[-1] == (2, "failed", 0)
    checkpoint = quick_world.query("select sweep, last_id from users_sync_worker.checkpoint")
    quick_world.api.on_request(None)
    quick_world.api.requests.clear()
    report = quick_world.sweep()
    [(sweep, last_id)] = checkpoint
    assert (report.sweep, quick_world.cursors()[0]) == (sweep, ids[ids.index(last_id) - 1])
    assert quick_world.wanted() == quick_world.rows()


def test_a_wrong_key_is_said_at_once_and_nothing_is_written(quick_world: World) -> None:
    sign_up(quick_world.project, *range(3))

    reason = expect(quick_world, Misconfigured, secret_server_key="wrong")

    assert "STACK_SECRET_SERVER_KEY" in reason
    assert "wrong" not in reason.replace("is wrong", "")
    assert quick_world.live() == set()
    assert quick_world.query("select project from users_sync_worker.lease") == [(None,)]


def test_a_key_that_is_revoked_leaves_everything_as_it_is(quick_world: World) -> None:
    sign_up(quick_world.project, *range(3))
    quick_world.sweep()
    before = quick_world.versions()

    expect(quick_world, Misconfigured, secret_server_key="revoked")

    assert before == quick_world.versions()
    assert quick_world.sweeps()[-1] == (2, "failed", 0)


def test_a_key_that_is_revoked_in_the_middle_deletes_nobody(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(20))
    quick_world.sweep()
    quick_world.project.delete(ids[1])

    def revoke(_: Request) -> None:
        quick_world.project.secret_server_key = "another"

    quick_world.api.on_request(before_page(4, revoke))
    expect(quick_world, Misconfigured)

    assert set(ids) == quick_world.live()
    assert quick_world.sweeps()[-1] == (2, "failed", 0)


@pytest.mark.parametrize("live", [0, 3])
def test_a_target_bound_to_another_project_is_refused_before_anything_is_read(
    quick_world: World, live: int
) -> None:
    sign_up(quick_world.project, *range(live))
    quick_world.sweep()
    before = quick_world.versions()
    quick_world.project.project_id = "22222222-2222-4222-8222-222222222222"
    quick_world.api.requests.clear()

    reason = expect(quick_world, Misconfigured)

    assert "11111111-1111-4111-8111-111111111111" in reason
    assert (before, []) == (quick_world.versions(), quick_world.api.requests)


def adopt_table_of(world: World, *numbers: int) -> None:
    """Leave a table that no worker has ever written to, with these users."""
    sign_up(world.project, *numbers)
    world.sweep()
    world.query("drop schema users_sync_worker cascade")
    delete_all(world.project, world.project.ids())


@pytest.mark.parametrize("users", [1, 50])
def test_another_projects_table_is_refused_before_the_first_write(world: World, users: int) -> None:
    adopt_table_of(world, *range(users))
    sign_up(world.project, *range(100, 110))
    before = world.versions()
    world.api.requests.clear()

    reason = expect(world, Misconfigured)

    assert "another project's table" in reason
    assert before == world.versions()
    assert min(users, 10) <= len(world.api.requests) <= 20
    assert world.query("select project from users_sync_worker.lease") == [(None,)]


def test_a_table_with_one_known_user_in_the_sample_is_adopted(world: World) -> None:
    adopt_table_of(world, *range(20))
    sign_up(world.project, 7)

    report = world.sweep(max_fraction=0.2)

    assert (report.outcome, report.counts["held"]) == ("held", 19)
    assert world.deleted() == set()


def test_an_empty_table_is_bound_only_to_a_project_that_is_there(quick_world: World) -> None:
    expect(quick_world, Misconfigured, project_id="33333333-3333-4333-8333-333333333333")

    assert quick_world.query("select project from users_sync_worker.lease") == [(None,)]
    assert quick_world.sweep().outcome == "complete"


def test_a_server_that_is_too_old_is_named_with_the_setting_to_change(quick_world: World) -> None:
    sign_up(quick_world.project, *range(3))
    quick_world.api.kind = replace(APRIL, knows_include_anonymous=False)

    assert "include_anonymous" in expect(quick_world, Misconfigured)
    assert quick_world.sweep(include_anonymous=False).counts["inserted"] == 3


def test_a_database_that_is_down_ends_the_sweep_when_the_retries_are_used_up(
    quick_world: World,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    quick_world = World(make_conninfo(host="127.0.0.1", port=port), quick_world.conn, Project())

    expect(quick_world, DatabaseUnavailable, retry_minutes=0.001)

    assert quick_world.api.requests == []


def cut(world: World) -> None:
    """End every connection of the worker, as a server does that goes down."""
    world.query(
        "select pg_terminate_backend(pid, 5000) from pg_stat_activity"
        " where application_name = 'users-sync' and datname = current_database()"
    )


def allow_connections(world: World, database: str, *, allowed: bool) -> None:
    """Let new connections in, or not; a database cannot do that to itself."""
    with psycopg.connect(make_conninfo(world.url, dbname="postgres"), autocommit=True) as conn:
        conn.execute(f"alter database {database} allow_connections {allowed}".encode())


def test_a_sweep_outlives_a_lost_database_connection(quick_world: World) -> None:
    sign_up(quick_world.project, *range(20))
    quick_world.sweep()
    sign_up(quick_world.project, *range(20, 40))

    quick_world.api.on_request(before_page(4, lambda _: cut(quick_world)))
    report = quick_world.sweep()

    assert report.outcome == "complete"
    assert quick_world.wanted() == quick_world.rows()


def test_a_database_that_goes_down_leaves_the_table_and_the_checkpoint_agreeing(
    world: World,
) -> None:
    sign_up(world.project, *range(20))
    name = world.query("select current_database()")[0][0]

    def shut(_: Request) -> None:
        allow_connections(world, name, allowed=False)
        cut(world)

    world.api.on_request(before_page(4, shut))
    expect(world, DatabaseUnavailable, retry_minutes=0.001)
    allow_connections(world, name, allowed=True)

    last = world.query("select last_id from users_sync_worker.checkpoint")[0][0]
    assert {user_id for user_id in world.project.ids() if user_id <= last} == world.live()
    world.api.on_request(None)
    world.query("update users_sync_worker.lease set expires_at = 'epoch'")
    assert world.sweep().outcome == "complete"
    assert world.wanted() == world.rows()


def test_wrong_database_credentials_are_said_at_once(quick_world: World) -> None:
    url = make_conninfo(quick_world.url, dbname="no_such_database")

    assert "database" in expect(World(url, quick_world.conn, quick_world.project), Misconfigured)


def test_a_table_of_no_known_shape_is_refused_before_anything_is_written(world: World) -> None:
    world.query("create schema neon_auth; create table {users_sync} (id text primary key)")

    assert "raw_json" in expect(world, Misconfigured)
    assert world.query("select to_regnamespace('users_sync_worker')") == [(None,)]


@pytest.mark.parametrize("page", [2, 4])
def test_a_worker_that_loses_the_lease_writes_not_one_more_row(
    quick_world: World, page: int
) -> None:
    sign_up(quick_world.project, *range(20))
    left: list[object] = []

    def take(_: Request) -> None:
        quick_world.query(
            "update users_sync_worker.lease set epoch = epoch + 1, holder = 'somebody',"
            " expires_at = clock_timestamp() + interval '1 minute'"
        )
        left.append(quick_world.versions())

    quick_world.api.on_request(before_page(page, take))
    expect(quick_world, LeaseLost)

    assert left == [quick_world.versions()]
    assert quick_world.query("select holder from users_sync_worker.lease") == [("somebody",)]


def test_a_worker_that_loses_the_lease_before_the_deletions_deletes_nobody(
    quick_world: World,
) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    quick_world.project.delete(ids[3])

    def take(request: Request) -> None:
        if not is_list(request):
            quick_world.query("update users_sync_worker.lease set epoch = epoch + 1")

    quick_world.api.on_request(take)
    expect(quick_world, LeaseLost)

    assert set(ids) == quick_world.live()


def test_a_lease_that_is_held_by_a_living_worker_is_not_taken(quick_world: World) -> None:
    quick_world.sweep()
    quick_world.query(
        "update users_sync_worker.lease set holder = 'somebody', epoch = epoch + 1,"
        " expires_at = clock_timestamp() + interval '0.2 s'"
    )
    sign_up(quick_world.project, 1)

    report = quick_world.sweep()

    assert quick_world.live() == {numbered(1)}
    assert report.outcome == "complete"


def test_another_writer_in_the_middle_makes_the_sweep_look_again(quick_world: World) -> None:
    """A command beside the holder moved `writes`: what was believed of the table is thrown away."""
    ids = sign_up(quick_world.project, *range(20))
    quick_world.sweep()
    quick_world.project.edit(ids[15], display_name="Other")

    def write(_: Request) -> None:
        quick_world.query("delete from {users_sync} where id = any(%s)", [ids[2], ids[18]])
        quick_world.query("update users_sync_worker.lease set writes = writes + 1")

    quick_world.api.on_request(before_page(4, write))
    quick_world.sweep()
    quick_world.api.on_request(None)

    assert set(ids) - {ids[2]} <= quick_world.live()
    assert quick_world.sweep().outcome == "complete"
    assert quick_world.wanted() == quick_world.rows()


@pytest.mark.parametrize("page", [1, 2, 4])
def test_a_sweep_that_began_anew_keeps_its_number_and_counts(quick_world: World, page: int) -> None:
    sign_up(quick_world.project, *range(20))

    def write(_: Request) -> None:
        quick_world.query("update users_sync_worker.lease set writes = writes + 1")

    quick_world.api.on_request(before_page(page, write))
    report = quick_world.sweep()

    assert (report.sweep, report.counts["users"], report.counts["inserted"]) == (1, 20, 20)
    assert quick_world.wanted() == quick_world.rows()
    assert quick_world.sweeps() == [(1, "complete", 0)]


def test_somebody_who_writes_all_the_time_makes_the_sweep_incomplete(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(6))
    quick_world.sweep()
    quick_world.project.delete(ids[2])

    def write(_: Request) -> None:
        quick_world.query("update users_sync_worker.lease set writes = writes + 1")

    quick_world.api.on_request(write)
    with pytest.raises(UsersSyncError):
        quick_world.sweep()

    assert set(ids) == quick_world.live()


CANCEL_WAITING = """
select pg_cancel_backend(pid) from pg_stat_activity
where datname = current_database() and wait_event_type = 'Lock'
"""


def test_cancelled_reading_of_the_keys_is_tried_again(quick_world: World) -> None:
    quick_world.project.populate(20)
    quick_world.sweep()
    with ThreadPoolExecutor() as pool, psycopg.connect(quick_world.url) as other:
        other.execute("lock table neon_auth.users_sync")
        sweep = pool.submit(quick_world.sweep)
        for _ in range(2):
            until("the waiting sweep was cancelled", lambda: quick_world.query(CANCEL_WAITING))
        other.rollback()
        assert sweep.result(PATIENCE_SECONDS).outcome == "complete"
    assert quick_world.wanted() == quick_world.rows()
