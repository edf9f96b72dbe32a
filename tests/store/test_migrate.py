"""What is created in an empty database, and that nothing else ever is."""

import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from threading import Barrier, Event
from typing import Any

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.store_target import IGNORED, PLAIN_COLUMNS, PROJECT, person
from worker.clock import Clock
from worker.errors import DatabaseUnavailable, Misconfigured
from worker.model import Proof, Users
from worker.retry import Retry
from worker.store.database import Database
from worker.store.lease import Lease, LeaseRequest
from worker.store.migrate import creation_sql, migrations, prepare, require_tables
from worker.store.quarantine import BadRecord, Quarantine
from worker.store.suspects import Suspects
from worker.store.sweeps import Checkpoint, SweepRow, Sweeps
from worker.store.table import Table
from worker.store.table_shape import Shape

NAMES = ["neon_auth", "We{i}rd %s \"x\" ; -- :x 'y' {table}"]

OWN_TABLES = {
    "migration",
    "lease",
    "checkpoint",
    "sweep",
    "deletion",
    "quarantine",
    "touched",
    "hint",
    "snapshot",
    "snapshot_chunk",
}

COLUMNS = """
select attname, format_type(atttypid, atttypmod), attnotnull, attgenerated::text,
       pg_get_expr(adbin, adrelid)
from pg_attribute left join pg_attrdef on adrelid = attrelid and adnum = attnum
where attrelid = format('%%I.users_sync', %s::text)::regclass and attnum > 0 and not attisdropped
order by attnum
"""
INDEXES = "select indexname, indexdef from pg_indexes where tablename = 'users_sync'"

# Whatever a schema can be told apart by.
CATALOG = """
select n.nspname, c.relname, a.attnum, a.attname, format_type(a.atttypid, a.atttypmod),
       a.attnotnull, a.attgenerated::text, pg_get_expr(d.adbin, d.adrelid),
       obj_description(c.oid, 'pg_class')
from pg_class c join pg_namespace n on n.oid = c.relnamespace
join pg_attribute a on a.attrelid = c.oid and a.attnum > 0
left join pg_attrdef d on d.adrelid = c.oid and d.adnum = a.attnum
where n.nspname in (%(schema)s, 'users_sync_worker')
union all
select n.nspname, c.relname, 0, o.conname, pg_get_constraintdef(o.oid), null, null, null, null
from pg_constraint o join pg_class c on c.oid = o.conrelid
join pg_namespace n on n.oid = c.relnamespace
where n.nspname in (%(schema)s, 'users_sync_worker')
order by 1, 2, 3, 4
"""

# All that a role needs which owns nothing.
GRANTS = """
grant usage on schema neon_auth, users_sync_worker to {role};
grant select, insert, update on neon_auth.users_sync to {role};
grant select on users_sync_worker.migration to {role};
grant select, insert, update on users_sync_worker.lease to {role};
grant select, insert, update, delete on users_sync_worker.checkpoint, users_sync_worker.sweep,
    users_sync_worker.deletion, users_sync_worker.quarantine to {role};
"""

Opened = Callable[..., Database]


@pytest.fixture
def opened(database_url: str) -> Iterator[Opened]:
    """Return a function that makes a worker's connection, as another role if need be."""
    with ExitStack() as ends:

        def opened(role: str | None = None) -> Database:
            retry = Retry("the database", 0, Event(), DatabaseUnavailable)
            options = f"-c role={role}" if role else ""
            database = Database(make_conninfo(database_url, options=options), Clock(), retry)
            ends.callback(database.close)
            return database

        yield opened


def catalog(conn: psycopg.Connection, schema: str) -> list[tuple[Any, ...]]:
    return conn.execute(CATALOG, {"schema": schema}).fetchall()


def own_tables(conn: psycopg.Connection) -> set[str]:
    query = "select tablename from pg_tables where schemaname = 'users_sync_worker'"
    return {row[0] for row in conn.execute(query)}


def test_table_is_created_exactly_as_neon_creates_it(
    opened: Opened, connection: psycopg.Connection
) -> None:
    shape = prepare(opened(), "neon_auth")

    millis = "((raw_json ->> 'signed_up_at_millis'::text))::bigint"
    created = f"to_timestamp((trunc(({millis})::double precision) / (1000)::double precision))"
    moment = "timestamp with time zone"
    assert connection.execute(COLUMNS, ("neon_auth",)).fetchall() == [
        ("raw_json", "jsonb", True, "", None),
        ("id", "text", True, "s", "(raw_json ->> 'id'::text)"),
        ("name", "text", False, "s", "(raw_json ->> 'display_name'::text)"),
        ("email", "text", False, "s", "(raw_json ->> 'primary_email'::text)"),
        ("created_at", moment, False, "s", created),
        ("updated_at", moment, False, "", None),
        ("deleted_at", moment, False, "", None),
    ]
    assert dict(connection.execute(INDEXES).fetchall()) == {
        "users_sync_pkey": (
            "CREATE UNIQUE INDEX users_sync_pkey ON neon_auth.users_sync USING btree (id)"
        ),
        "users_sync_deleted_at_idx": (
            "CREATE INDEX users_sync_deleted_at_idx ON neon_auth.users_sync"
            " USING btree (deleted_at)"
        ),
    }
    assert shape is Shape.GENERATED


def test_own_tables_are_created_and_each_says_what_it_is_for(
    opened: Opened, connection: psycopg.Connection
) -> None:
    prepare(opened(), "neon_auth")
    described = connection.execute(
        "select relname from pg_class where relnamespace = 'users_sync_worker'::regnamespace"
        " and relkind = 'r' and length(obj_description(oid, 'pg_class')) > 40"
    )
    assert {row[0] for row in described} == OWN_TABLES == own_tables(connection)


def test_each_migration_is_applied_once(opened: Opened, connection: psycopg.Connection) -> None:
    database = opened()
    for _ in range(2):
        prepare(database, "neon_auth")
    applied = connection.execute("select number, name from users_sync_worker.migration").fetchall()
    assert sorted(applied) == [(number, name) for number, (name, _) in migrations().items()]


def test_status_is_read_where_functions_are_not_everybodys(
    connection: psycopg.Connection, plain_role: str
) -> None:
    connection.execute("alter default privileges revoke execute on functions from public")
    connection.execute(creation_sql("neon_auth").encode())
    connection.execute("insert into users_sync_worker.lease (target) values ('neon_auth')")
    connection.execute(
        f"grant usage on schema users_sync_worker to {plain_role};"
        f" grant select on users_sync_worker.status to {plain_role}; set role {plain_role}".encode()
    )
    rows = connection.execute("select target, users_live from users_sync_worker.status").fetchall()
    connection.execute("reset role")
    assert rows == [("neon_auth", None)]


NEWER = "insert into users_sync_worker.migration (number, name{}) values (99, '099_later.sql'{})"


@pytest.mark.parametrize(
    ("newer", "wanted"),
    [
        (
            NEWER.format(", version", ", '7.5.0'"),
            "made by users-sync 7.5.0, and this is .*: update",
        ),
        (
            NEWER.format("", ""),
            "made by a newer users-sync, .*: update this one to the version that",
        ),
    ],
)
def test_tables_of_a_newer_version_are_refused_with_what_is_needed(
    opened: Opened, connection: psycopg.Connection, newer: str, wanted: str
) -> None:
    database = opened()
    prepare(database, "neon_auth")
    connection.execute(newer.encode())
    before = catalog(connection, "neon_auth")
    for required in (lambda: prepare(database, "neon_auth"), lambda: database.call(require_tables)):
        with pytest.raises(Misconfigured, match=wanted):
            required()
    assert catalog(connection, "neon_auth") == before


def test_tables_of_the_version_before_are_brought_up_to_date(
    opened: Opened, connection: psycopg.Connection
) -> None:
    """Its table of applied files has no column for the version."""
    database = opened()
    prepare(database, "neon_auth")
    connection.execute(
        "delete from users_sync_worker.migration where number > 3;"
        " drop table users_sync_worker.hint, users_sync_worker.snapshot,"
        " users_sync_worker.snapshot_chunk;"
        " drop function users_sync_worker.cluster;"
        " drop function users_sync_worker.refresh;"
        " alter table users_sync_worker.lease drop column polled_at;"
        " alter table users_sync_worker.migration drop column version"
    )
    prepare(database, "neon_auth")
    applied = connection.execute("select number, version from users_sync_worker.migration")
    assert {number for number, version in applied if version} == migrations().keys() - {1, 2, 3}


def test_migrations_are_numbered_without_a_gap() -> None:
    assert list(migrations()) == list(range(1, len(migrations()) + 1))


def test_second_time_nothing_is_created(
    opened: Opened, connection: psycopg.Connection, plain_role: str
) -> None:
    """Nobody may create anything then, but the role may look."""
    prepare(opened(), "neon_auth")
    connection.execute(GRANTS.format(role=plain_role).encode())
    before = catalog(connection, "neon_auth")

    shape = prepare(opened(plain_role), "neon_auth")

    assert (shape, catalog(connection, "neon_auth")) == (Shape.GENERATED, before)


@pytest.mark.parametrize(("id_type", "shape"), [("text", Shape.PLAIN), ("uuid", Shape.PLAIN_UUID)])
def test_table_that_is_there_is_not_altered(
    opened: Opened, connection: psycopg.Connection, id_type: str, shape: Shape
) -> None:
    columns = PLAIN_COLUMNS.format(id_type=id_type) + ", plan text"
    connection.execute(
        f"create schema neon_auth; create table neon_auth.users_sync ({columns})".encode()
    )
    before = catalog(connection, "neon_auth")

    assert prepare(opened(), "neon_auth") is shape

    after = [row for row in catalog(connection, "neon_auth") if row[0] == "neon_auth"]
    assert (after, own_tables(connection)) == (before, OWN_TABLES)


def test_nothing_is_created_beside_a_table_that_is_refused(
    opened: Opened, connection: psycopg.Connection
) -> None:
    connection.execute("create schema neon_auth; create table neon_auth.users_sync (id text)")
    with pytest.raises(Misconfigured, match="column raw_json is missing"):
        prepare(opened(), "neon_auth")
    assert own_tables(connection) == set()


@pytest.mark.parametrize("schema", NAMES)
def test_any_schema_name_will_do(
    opened: Opened, connection: psycopg.Connection, schema: str
) -> None:
    database = opened()
    assert prepare(database, schema) is Shape.GENERATED
    assert prepare(database, schema) is Shape.GENERATED
    table = sql.Identifier(schema, "users_sync")
    assert connection.execute(sql.SQL("select from {}").format(table)).fetchall() == []


def test_two_targets_share_the_own_tables(opened: Opened, connection: psycopg.Connection) -> None:
    database = opened()
    assert prepare(database, "one") is prepare(database, "two") is Shape.GENERATED


def test_two_workers_may_start_at_once(opened: Opened, connection: psycopg.Connection) -> None:
    start = Barrier(2)

    def work() -> Shape:
        database = opened()
        start.wait(10)
        return prepare(database, "neon_auth")

    with ThreadPoolExecutor() as threads:
        shapes = [each.result(30) for each in [threads.submit(work) for _ in range(2)]]

    assert (shapes, own_tables(connection)) == ([Shape.GENERATED] * 2, OWN_TABLES)


@pytest.mark.parametrize("schema", NAMES)
def test_printed_sql_creates_what_the_worker_would(
    opened: Opened, connection: psycopg.Connection, schema: str
) -> None:
    prepare(opened(), schema)
    expected = catalog(connection, schema)
    dropped = sql.SQL("drop schema {}, users_sync_worker cascade").format(sql.Identifier(schema))
    connection.execute(dropped)

    connection.execute(creation_sql(schema).encode())

    assert expected == catalog(connection, schema)


@pytest.mark.parametrize("schema", NAMES)
def test_printed_sql_leaves_nothing_to_do(
    opened: Opened, connection: psycopg.Connection, schema: str, plain_role: str
) -> None:
    connection.execute(creation_sql(schema).encode())
    connection.execute(
        sql.SQL("grant usage on schema {}, users_sync_worker to {}").format(
            sql.Identifier(schema), sql.Identifier(plain_role)
        )
    )
    connection.execute(f"grant select on users_sync_worker.migration to {plain_role}".encode())
    assert prepare(opened(plain_role), schema) is Shape.GENERATED


@pytest.mark.parametrize("schema", NAMES)
def test_psql_reads_the_printed_sql(
    opened: Opened, connection: psycopg.Connection, database_url: str, schema: str, tmp_path: Path
) -> None:
    psql = shutil.which("psql")
    if psql is None:
        pytest.skip("psql is not installed")
    script = tmp_path / "create.sql"
    script.write_text(creation_sql(schema))
    command = [psql, "-X", "-q", "-v", "ON_ERROR_STOP=1", "-f", str(script), database_url]

    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)

    assert (done.returncode, done.stderr) == (0, "")
    before = catalog(connection, schema)
    assert prepare(opened(), schema) is Shape.GENERATED
    assert before == catalog(connection, schema)


def test_role_that_may_not_create_what_is_missing_is_told_so(
    opened: Opened, plain_role: str
) -> None:
    with pytest.raises(Misconfigured, match=r"permission denied for database .*users-sync check"):
        prepare(opened(plain_role), "neon_auth")


def test_role_without_any_ownership_can_do_all_the_work(
    opened: Opened, connection: psycopg.Connection, plain_role: str
) -> None:
    connection.execute(creation_sql("neon_auth").encode())
    connection.execute(GRANTS.format(role=plain_role).encode())
    database = opened(plain_role)
    table = Table("neon_auth", prepare(database, "neon_auth"), (IGNORED,), 0)
    lease = Lease(database, LeaseRequest("neon_auth", PROJECT, "one", 60))
    deletions, quarantine = Suspects("neon_auth"), Quarantine("neon_auth")
    sweeps = Sweeps("neon_auth", "all")
    user = person(1)

    def now() -> datetime:
        row = connection.execute("select clock_timestamp()").fetchone()
        assert row
        moment: datetime = row[0]
        return moment

    assert lease.acquire()
    lease.bind()
    lease.commit(
        [
            table.apply(Users.of([user]), now()),
            sweeps.record(SweepRow(1, "sweep", now(), {})),
            sweeps.move(Checkpoint(1, user.key, {}, now())),
            deletions.notice([user.id], 1, now()),
            quarantine.put([BadRecord(None, "00", "{}", "nothing")]),
        ],
        1,
    )
    changed = person(1, display_name="New")
    lease.commit([table.apply(Users.of([changed]), now())], 1)
    lease.commit([table.soft_delete([Proof(user.id, now())], 1, approved=False)], 1)
    database.call(lambda conn: deletions.approve(conn, 1))
    lease.commit(
        [
            deletions.forget_others([]),
            quarantine.forget_others([]),
            sweeps.clear(),
            sweeps.prune(),
            table.locked(Users.of([user])),
        ],
        1,
    )
    lease.release()

    assert database.call(lambda conn: list(table.load_keys(conn))) == []
    assert database.call(sweeps.deleted_today) == 1
