"""What others do to the table while a worker is at work, and how it becomes right again."""

import itertools
from collections.abc import Callable, Iterator, MutableMapping
from threading import Event
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from tests.support.service_world import ServiceWorld, Worker, opened_service_world
from tests.support.sweep_world import PLAIN
from tests.support.waiting import until
from worker.cli.session import opened_session
from worker.errors import Misconfigured
from worker.sandbox.api import Request
from worker.service.once import sweep_once
from worker.store.invalidations import MOST_TOUCHED
from worker.store.migrate import creation_sql

Logs = list[MutableMapping[str, Any]]

USERS = 60
TABLE = "neon_auth.users_sync"
OLDEST = "where id in (select id from neon_auth.users_sync order by created_at limit 5)"
DROPPED = "drop table neon_auth.users_sync"
# Nothing finds it by chance.
RENEWS_ONLY = {"poll_seconds": 3600, "sweep_seconds": 3600}
COUNTS_OFTEN = {"census_minutes": 0}

PARTITIONED = """
drop table neon_auth.users_sync;
create table neon_auth.users_sync (
    id text primary key, raw_json jsonb, name text, email text, created_at timestamptz,
    deleted_at timestamptz, updated_at timestamptz
) partition by range (id);
create table neon_auth.low partition of neon_auth.users_sync for values from (minvalue) to ('8');
create table neon_auth.high partition of neon_auth.users_sync for values from ('8') to (maxvalue)
"""
FORGE = 'update neon_auth.users_sync set raw_json = raw_json || \'{"display_name": "Forged"}\''
NAMES = """
select id::text, name, raw_json->>'display_name' from neon_auth.users_sync where deleted_at is null
"""


@pytest.fixture(params=["generated", "plain", "plain, id uuid"])
def any_shape(
    request: pytest.FixtureRequest, database_url: str, connection: psycopg.Connection
) -> Iterator[ServiceWorld]:
    if request.param != "generated":
        make_plain(connection, "uuid" if "uuid" in request.param else "text")
    with opened_service_world(database_url, connection) as world:
        world.project.populate(USERS)
        yield world


@pytest.fixture
def world(database_url: str, connection: psycopg.Connection) -> Iterator[ServiceWorld]:
    with opened_service_world(database_url, connection) as world:
        world.project.populate(USERS)
        yield world


@pytest.fixture
def logs() -> Iterator[Logs]:
    """Return what is logged, as it comes."""
    with capture_logs() as logs:
        yield logs


def events(logs: Logs) -> list[str]:
    return [str(line["event"]) for line in logs]


def newest(worker: Worker) -> int:
    """Give the number of the newest sweep that ended."""
    return worker.service.health.read().sweeps[0].number


def make_plain(conn: psycopg.Connection[Any], id_type: str) -> None:
    for statement in PLAIN.format(id_type=id_type).split(";"):
        conn.execute(statement.replace("schema", "schema if not exists", 1).encode())


def init(world: ServiceWorld) -> None:
    """Run what `users-sync init` runs."""
    psycopg.Cursor(world.conn).execute(creation_sql("neon_auth").encode())


def dropped_and_made_again(world: ServiceWorld, what: str) -> None:
    world.query(f"drop {what}")
    init(world)


def names(world: ServiceWorld) -> dict[str, tuple[str, str]]:
    try:
        return {row[0]: row[1:] for row in world.query(NAMES)}
    except psycopg.errors.UndefinedTable:
        return {}


def is_right(world: ServiceWorld) -> bool:
    users = world.project.users().items()
    return names(world) == {i: (user["display_name"], user["display_name"]) for i, user in users}


def emptied_and_rewritten(world: ServiceWorld) -> None:
    with world.conn.transaction():
        world.query("delete from neon_auth.users_sync")
        world.query("alter table neon_auth.users_sync set unlogged")


def copied(world: ServiceWorld, *schemas: str) -> dict[str, str]:
    """Copy the tables of these schemas; returns the copy of each, those referred to first."""
    tables = world.query(
        "select format('%%I.%%I', schemaname, tablename) from pg_tables where schemaname = any(%s)"
        " order by tablename <> 'lease'",
        list(schemas),
    )
    copies = {table: f"copy_{number}" for number, (table,) in enumerate(tables)}
    for table, copy in copies.items():
        world.query(f"create table {copy} as table {table}")
    return copies


def put_back(world: ServiceWorld, copies: dict[str, str]) -> None:
    """Put the copies in the place of what is there, as a restore does."""
    with world.conn.transaction():
        world.query(f"truncate {', '.join(copies)} cascade")
        for table, copy in copies.items():
            columns = "raw_json, updated_at, deleted_at" if table == TABLE else "*"
            names = f"({columns})" if columns != "*" else ""
            world.query(f"insert into {table} {names} select {columns} from {copy}")  # noqa: S608


@pytest.mark.parametrize(
    "act",
    [
        lambda world: world.query("truncate neon_auth.users_sync"),
        emptied_and_rewritten,
        lambda world: dropped_and_made_again(world, "table neon_auth.users_sync"),
        lambda world: dropped_and_made_again(world, "schema neon_auth cascade"),
        lambda world: dropped_and_made_again(world, "schema neon_auth, users_sync_worker cascade"),
    ],
    ids=["truncated", "emptied and rewritten", "dropped", "schema dropped", "all dropped"],
)
def test_table_that_was_emptied_or_replaced_is_filled_again(
    any_shape: ServiceWorld, act: Callable[[ServiceWorld], object]
) -> None:
    world = any_shape
    worker = world.at_work(**RENEWS_ONLY)
    act(world)
    until("the table is right", lambda: is_right(world))
    until("it is ready", lambda: worker.not_ready == ())
    worker.stop()


@pytest.mark.parametrize(
    "statement",
    [
        f"delete from neon_auth.users_sync {OLDEST}",  # noqa: S608  both are written above
        "delete from neon_auth.users_sync",
        f"update neon_auth.users_sync set deleted_at = now() {OLDEST}",  # noqa: S608
        f"{FORGE} {OLDEST}",
        FORGE,
    ],
    ids=["some removed", "all removed", "some deleted", "some changed", "all changed"],
)
def test_rows_that_others_wrote_become_right_again(any_shape: ServiceWorld, statement: str) -> None:
    worker = any_shape.at_work(**COUNTS_OFTEN)
    any_shape.query(statement)
    until("the table is right", lambda: is_right(any_shape))
    until("it is ready", lambda: worker.not_ready == ())
    worker.stop()


def test_many_rows_that_others_wrote_are_all_read_again(world: ServiceWorld, logs: Logs) -> None:
    world.project.populate(MOST_TOUCHED)
    worker = world.at_work(**COUNTS_OFTEN)
    world.query(FORGE)
    until("the table is right", lambda: is_right(world))
    assert "mirror.discarded" in events(logs)
    worker.stop()


def test_own_writes_are_not_taken_for_those_of_others(world: ServiceWorld, logs: Logs) -> None:
    worker = world.at_work(**COUNTS_OFTEN)
    ids = world.project.ids()
    for number in range(10):
        created = world.project.create()
        world.project.edit(ids[number], display_name=f"Edited {number}")
        world.project.delete(ids[-1 - number])
        until("the table is right", lambda: is_right(world))
        assert created in world.live()
    sweeps = newest(worker)
    until("it has counted since", lambda: newest(worker) > sweeps + 3)
    assert {"mirror.discarded", "mirror.amended"}.isdisjoint(events(logs))
    worker.stop()


def test_rows_without_an_id_of_stack_auth_change_nothing(world: ServiceWorld, logs: Logs) -> None:
    worker = world.at_work(**COUNTS_OFTEN)
    world.query('insert into neon_auth.users_sync (raw_json) values (\'{"id": "strange"}\')')
    sweeps = newest(worker)
    until("it has counted since", lambda: newest(worker) > sweeps + 3)
    assert events(logs).count("mirror.discarded") <= 1
    assert "strange" in world.live()
    worker.stop()


def test_quiet_worker_counts_when_it_writes_anyway(world: ServiceWorld) -> None:
    worker = world.at_work(quiet=True, **COUNTS_OFTEN)
    first = newest(worker)
    until("it has nothing left to write", lambda: newest(worker) > first + 2)
    until("it rests", lambda: not world.connections())
    [(victim,)] = world.query(
        "delete from neon_auth.users_sync where id = %s returning id", world.project.ids()[3]
    )
    sweeps = newest(worker)
    until("it sweeps", lambda: newest(worker) > sweeps + 3)
    assert victim not in world.live()
    world.project.create()
    until("the table is right", lambda: is_right(world))
    until("it rests", lambda: not world.connections())
    worker.stop()


def test_quiet_worker_finds_another_table_when_it_writes(world: ServiceWorld) -> None:
    worker = world.at_work(quiet=True)
    world.query("truncate neon_auth.users_sync")
    world.project.create()
    until("the table is right", lambda: is_right(world))
    worker.stop()


@pytest.mark.parametrize("own_tables_too", [False, True])
def test_table_that_was_set_back_is_brought_up_to_date(
    world: ServiceWorld, *, own_tables_too: bool
) -> None:
    schemas = ["neon_auth", "users_sync_worker"] if own_tables_too else ["neon_auth"]
    first = world.at_work()
    first.stop()
    copies = copied(world, *schemas)
    ids = world.project.ids()
    worker = world.at_work(**RENEWS_ONLY)
    for user_id in ids[:5]:
        world.project.delete(user_id)
    for user_id in ids[5:12]:
        world.project.edit(user_id, display_name="Edited")
    world.project.create()
    with opened_session(world.settings(), world.url, Event()) as session:
        for user_id in {*ids[:12], *world.project.ids()}:
            session.sync(user_id)
    assert is_right(world)
    put_back(world, copies)
    assert not is_right(world)
    until("the table is right", lambda: is_right(world))
    worker.stop()


def test_dropped_table_makes_the_worker_unready_until_it_is_back(world: ServiceWorld) -> None:
    worker = world.at_work(**RENEWS_ONLY)
    world.query(DROPPED)
    until("it is not ready", lambda: worker.not_ready)
    assert "neon_auth.users_sync does not exist" in worker.not_ready[0]
    init(world)
    until("the table is right", lambda: is_right(world))
    until("it is ready", lambda: worker.not_ready == ())
    worker.stop()


@pytest.mark.parametrize("quiet", [False, True])
def test_dropped_table_is_told_by_a_worker_that_polls(world: ServiceWorld, *, quiet: bool) -> None:
    worker = world.at_work(quiet=quiet)
    world.query(DROPPED)
    if quiet:  # it has to have something to write
        world.project.create()
    until("it is not ready", lambda: worker.not_ready)
    assert "neon_auth.users_sync does not exist" in worker.not_ready[0]
    init(world)
    until("the table is right", lambda: is_right(world))
    until("it is ready", lambda: worker.not_ready == ())
    worker.stop()


def test_table_that_cannot_be_used_makes_the_worker_unready(world: ServiceWorld) -> None:
    worker = world.at_work(**RENEWS_ONLY)
    world.query("alter table neon_auth.users_sync add column tenant int not null default 1")
    world.query("alter table neon_auth.users_sync alter column tenant drop default")
    until("it is not ready", lambda: worker.not_ready)
    assert "column tenant is not ours" in worker.not_ready[0]
    world.query("alter table neon_auth.users_sync drop column tenant")
    until("it is ready", lambda: worker.not_ready == ())
    worker.stop()


@pytest.mark.parametrize("id_type", ["text", "uuid"])
@pytest.mark.parametrize("settings", [RENEWS_ONLY, {}], ids=["only renews", "polls and sweeps"])
def test_table_of_another_shape_is_filled_in_its_shape(
    world: ServiceWorld, id_type: str, settings: dict[str, Any]
) -> None:
    worker = world.at_work(**settings)
    with world.conn.transaction():
        world.query("drop schema neon_auth cascade")
        make_plain(world.conn, id_type)
        world.query("alter table neon_auth.users_sync alter raw_json set not null")
        world.query("alter table neon_auth.users_sync alter created_at set not null")
        world.project.create()
    until("the table is right", lambda: is_right(world))
    assert world.query("select * from users_sync_worker.quarantine") == []
    until("it is ready", lambda: worker.not_ready == ())
    worker.stop()


def test_worker_that_stood_by_finds_the_table_as_it_is_then(world: ServiceWorld) -> None:
    first = world.at_work()
    second = world.start()
    until("it stands by", lambda: second.state == "standing by")
    with world.conn.transaction():
        world.query("drop schema neon_auth cascade")
        make_plain(world.conn, "text")
    until("the table is right", lambda: is_right(world))
    first.stop()
    world.project.create()
    until("the table is right", lambda: is_right(world))
    until("it is ready", lambda: second.not_ready == ())
    second.stop()


def test_sweep_begins_again_when_the_table_is_emptied_in_the_middle(world: ServiceWorld) -> None:
    """What was read before would else be compared with a table that is no more."""
    pages = itertools.count(1)

    def empty(request: Request) -> None:
        if request.query.get("desc") == "false" and next(pages) == 4:
            world.query("truncate neon_auth.users_sync")

    world.api.on_request(empty)
    chosen = world.settings(page_size=10)
    report = sweep_once(chosen, world.url, Event(), lambda _: None)
    assert (report.outcome, is_right(world)) == ("complete", True)


def test_one_sweep_ends_when_the_table_is_dropped_in_the_middle(world: ServiceWorld) -> None:
    pages = itertools.count(1)

    def drop(request: Request) -> None:
        if request.query.get("desc") == "false" and next(pages) == 4:
            world.query(DROPPED)

    world.api.on_request(drop)
    chosen = world.settings(page_size=10)
    with pytest.raises(Misconfigured, match="does not exist any more: run `users-sync init`"):
        sweep_once(chosen, world.url, Event(), lambda _: None)


def test_identity_is_looked_at_while_others_lock_the_table(world: ServiceWorld) -> None:
    worker = world.at_work(**RENEWS_ONLY)
    before = world.lease("expires_at")
    with psycopg.connect(world.url) as other:
        other.execute(b"lock table neon_auth.users_sync")
        until("the lease is renewed", lambda: world.lease("expires_at") > before)
    assert worker.not_ready == ()
    worker.stop()


def test_census_that_has_to_wait_is_left_for_later(world: ServiceWorld, logs: Logs) -> None:
    worker = world.at_work(**COUNTS_OFTEN)
    world.query("delete from neon_auth.users_sync where id = %s", world.project.ids()[3])
    with psycopg.connect(world.url) as other:
        other.execute(b"lock table neon_auth.users_sync")
        until("a census was skipped", lambda: "census.skipped" in events(logs))
        assert worker.state == "working"
    until("the table is right", lambda: is_right(world))
    worker.stop()


def test_census_works_behind_a_pooler(world: ServiceWorld, pgbouncer_url: str) -> None:
    world.url = pgbouncer_url
    worker = world.at_work(**COUNTS_OFTEN)
    world.query("delete from neon_auth.users_sync where id = %s", world.project.ids()[3])
    until("the table is right", lambda: is_right(world))
    world.query("truncate neon_auth.users_sync")
    until("the table is right", lambda: is_right(world))
    worker.stop()


def test_partitions_are_counted_with_the_table(
    database_url: str, connection: psycopg.Connection
) -> None:
    make_plain(connection, "text")
    connection.execute(PARTITIONED.encode())
    with opened_service_world(database_url, connection) as world:
        world.project.populate(USERS)
        worker = world.at_work(**COUNTS_OFTEN)
        world.query("delete from neon_auth.users_sync where id = %s", world.project.ids()[3])
        until("the table is right", lambda: is_right(world))
        world.query("truncate neon_auth.low")
        until("the table is right", lambda: is_right(world))
        worker.stop()


def test_worker_is_unready_until_a_replaced_table_was_swept(world: ServiceWorld) -> None:
    worker = world.at_work(**RENEWS_ONLY)
    asked, go_on = Event(), Event()

    def wait(_: Request) -> None:
        asked.set()
        go_on.wait(10)

    world.api.on_request(wait)
    world.query("truncate neon_auth.users_sync")
    until("the list is asked for", asked.is_set)
    [reason] = worker.not_ready
    assert reason == "no sweep was completed since the table was replaced, or lost rows"
    go_on.set()
    until("it is ready", lambda: worker.not_ready == ())
    assert is_right(world)
    worker.stop()
