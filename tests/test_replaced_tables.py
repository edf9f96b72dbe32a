"""What others do to the table while a worker is at work, and how it becomes right again."""

from collections.abc import Callable, Iterator, MutableMapping
from threading import Event
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from tests.service_world import ServiceWorld, Worker, opened_service_world, until
from tests.sweep_world import PLAIN
from worker.operate.desk import opened_desk
from worker.store.schema import creation_sql
from worker.store.touched import MOST_TOUCHED

Logs = list[MutableMapping[str, Any]]

USERS = 60
TABLE = "neon_auth.users_sync"
DROPPED = f"drop table {TABLE}"
# Nothing finds it by chance.
RENEWS_ONLY = {"poll_seconds": 3600, "sweep_seconds": 3600}
COUNTS_OFTEN = {"census_minutes": 0}

FORGE = f'update {TABLE} set raw_json = raw_json || \'{{"display_name": "Forged"}}\''
NAMES = f"select id::text, name, raw_json->>'display_name' from {TABLE} where deleted_at is null"  # noqa: S608


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
    return worker.service.vitals.snapshot().sweeps[0].number


def make_plain(conn: psycopg.Connection[Any], id_type: str) -> None:
    for statement in PLAIN.format(id_type=id_type).split(";"):
        conn.execute(statement.replace("schema", "schema if not exists", 1).encode())


def init(world: ServiceWorld) -> None:
    """Run what `users-sync init` runs."""
    psycopg.Cursor(world.conn).execute(creation_sql("neon_auth").encode())


def names(world: ServiceWorld) -> dict[str, tuple[str, str]]:
    try:
        return {row[0]: row[1:] for row in world.query(NAMES)}
    except psycopg.errors.UndefinedTable:
        return {}


def is_right(world: ServiceWorld) -> bool:
    users = world.project.users().items()
    return names(world) == {i: (user["display_name"], user["display_name"]) for i, user in users}


def replaced(world: ServiceWorld, *statements: str) -> None:
    with world.conn.transaction():
        for statement in statements:
            world.query(statement)


def copied(world: ServiceWorld, *schemas: str) -> dict[str, str]:
    """Copy the tables of these schemas; returns the copy of each, those referred to first."""
    tables = world.query(
        "select format('%%I.%%I', schemaname, tablename) from pg_tables where schemaname = any(%s)"
        " order by tablename <> 'lease'",
        list(schemas),
    )
    copies = {table: f"copy_{number}" for number, (table,) in enumerate(tables)}
    for table, copy in copies.items():
        world.query(f"create table {copy} as select * from {table}")
    return copies


def put_back(world: ServiceWorld, copies: dict[str, str]) -> None:
    """Put the copies in the place of what is there, as a restore does."""
    with world.conn.transaction():
        world.query(f"truncate {', '.join(copies)} cascade")
        for table, copy in copies.items():
            columns = "raw_json, updated_at, deleted_at" if table == TABLE else "*"
            names = f"({columns})" if columns != "*" else ""
            world.query(f"insert into {table} {names} select {columns} from {copy}")


@pytest.mark.parametrize(
    "act",
    [
        lambda world: world.query(f"truncate {TABLE}"),
        lambda world: replaced(world, f"delete from {TABLE}", f"alter table {TABLE} set unlogged"),
        lambda world: (world.query(DROPPED), init(world)),
        lambda world: (world.query("drop schema neon_auth cascade"), init(world)),
        lambda world: (
            world.query("drop schema neon_auth, users_sync_worker cascade"),
            init(world),
        ),
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
        f"delete from {TABLE} where id in (select id from {TABLE} order by created_at limit 7)",
        f"delete from {TABLE}",
        f"update {TABLE} set deleted_at = now() where id in"
        f" (select id from {TABLE} order by created_at limit 3)",
        f"{FORGE} where id in (select id from {TABLE} order by created_at limit 5)",
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
    world.query(f'insert into {TABLE} (raw_json) values (\'{{"id": "strange"}}\')')
    sweeps = newest(worker)
    until("it has counted since", lambda: newest(worker) > sweeps + 3)
    assert events(logs).count("mirror.discarded") <= 1
    assert "strange" in world.live()
    worker.stop()


def test_quiet_worker_counts_when_it_writes_anyway(world: ServiceWorld) -> None:
    worker = world.at_work(quiet=True, **COUNTS_OFTEN)
    [(victim,)] = world.query(
        f"delete from {TABLE} where id = %s returning id", world.project.ids()[3]
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
    world.query(f"truncate {TABLE}")
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
    with opened_desk(world.settings(), world.url, Event()) as desk:
        for user_id in {*ids[:12], *world.project.ids()}:
            desk.sync(user_id)
    assert is_right(world)
    put_back(world, copies)
    assert not is_right(world)
    until("the table is right", lambda: is_right(world))
    worker.stop()
