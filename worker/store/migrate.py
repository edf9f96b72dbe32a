"""Creates what the worker needs: the schema and its table, and the worker's own numbered tables."""

import textwrap
from importlib import resources

import structlog
from psycopg import Cursor, sql

from worker import installed_version
from worker.errors import Misconfigured
from worker.store.connection import Connection
from worker.store.database import Database
from worker.store.table_shape import Shape, detect_shape
from worker.store.transaction import long_transaction

log = structlog.stdlib.get_logger(__name__)

# Advisory locks share one space of numbers; this one was drawn at random.
MIGRATION_LOCK = 6_152_907_331_845_720

OWN_SCHEMA = "users_sync_worker"

_NEON_SCHEMA = "neon_auth"

_BOOKKEEPING = """create table if not exists users_sync_worker.migration (
    number int primary key,
    name text not null,
    applied_at timestamptz not null default now()
);
comment on table users_sync_worker.migration is 'Which of the numbered SQL files were applied.';
alter table users_sync_worker.migration add column if not exists version text;
comment on column users_sync_worker.migration.version is 'Which users-sync applied it.';
"""

# As JSON, because the table of an earlier users-sync has no column for the version.
_APPLIED = "select number, to_jsonb(m)->>'version' from users_sync_worker.migration m"

_USERS_SYNC = """create table if not exists {table} (
    raw_json jsonb not null,
    id text generated always as (raw_json->>'id') stored not null primary key,
    name text generated always as (raw_json->>'display_name') stored,
    email text generated always as (raw_json->>'primary_email') stored,
    created_at timestamptz generated always as (
        to_timestamp(trunc((raw_json->>'signed_up_at_millis')::bigint::double precision) / 1000)
    ) stored,
    updated_at timestamptz,
    deleted_at timestamptz
);

create index if not exists users_sync_deleted_at_idx on {table} (deleted_at);
"""


def migrations(package: str = "worker.store") -> dict[int, tuple[str, str]]:
    """Give every numbered SQL file of a package: number, then name and text, in order."""
    folder = resources.files(package) / "migrations"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return {int(file.name[:3]): (file.name, file.read_text("utf-8")) for file in files}


def prepare(database: Database, schema: str) -> Shape:
    """Create whatever is missing, and tell the table's shape. Changes nothing that is there.

    A role that may not create anything is fine as long as nothing is missing. Raises Misconfigured
    for a table that cannot be adopted.
    """
    return database.call(lambda conn: _prepare(conn, schema, database.names.schema))


def creation_sql(schema: str) -> str:
    """Write the SQL that `prepare` runs, for a person to read and run; once more does no harm."""
    parts = [
        *(f"-- {line}\n" for line in textwrap.wrap(shared_name(schema), 98)),
        f"create schema if not exists {sql.Identifier(schema).as_string(None)};\n",
        _create_table_sql(schema).as_string(None),
        f"create schema if not exists {OWN_SCHEMA};\n",
        _BOOKKEEPING,
    ]
    for number, (name, text) in migrations().items():
        parts.append(_unless_applied(number, f"{text}\n{_record_sql(number, name).as_string()};"))
    return "begin;\n\n" + "\n".join(parts) + "\ncommit;\n"


def shared_name(schema: str) -> str:
    """Warn of a schema that others claim for themselves; empty for any other."""
    if schema != _NEON_SCHEMA:
        return ""
    return (
        "Neon's new managed auth uses the schema neon_auth for itself, and does not start while it"
        " exists. If this database shall have that as well, set database.schema"
        " (USERS_SYNC_DATABASE__SCHEMA) to another one, such as stack_auth."
    )


def _prepare(conn: Connection, schema: str, setting: str) -> Shape:
    shape = detect_shape(conn, schema, setting)
    missing = missing_migrations(conn)
    if shape is not None and not missing:
        return shape
    with long_transaction(conn):
        # Another worker may have created all of it meanwhile; each statement allows for that.
        conn.execute("select pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
        if shape is None:
            _ensure_schema(conn, schema)
            run_script(conn, _create_table_sql(schema).as_string())
            log.info("table.created", table=f"{schema}.users_sync")
        if missing:
            _ensure_schema(conn, OWN_SCHEMA)
            run_script(conn, _BOOKKEEPING)
            still_missing = missing_migrations(conn)
            for number, (name, text) in migrations().items():
                if number in still_missing:
                    run_script(conn, text)
                    conn.execute(_record_sql(number, name))
                    log.info("migration.applied", name=name)
    return shape or Shape.GENERATED


def _ensure_schema(conn: Connection, schema: str) -> None:
    """Create a schema; even `if not exists` asks for the right to create one that is there."""
    if not schema_exists(conn, schema):
        conn.execute(sql.SQL("create schema if not exists {}").format(sql.Identifier(schema)))


def schema_exists(conn: Connection, schema: str) -> bool:
    """Whether there is such a schema."""
    row = conn.execute("select from pg_namespace where nspname = %s", (schema,)).fetchone()
    return row is not None


def missing_migrations(conn: Connection) -> set[int]:
    """Give the numbers of the SQL files that are yet to be applied.

    Raises Misconfigured if files were applied that only a newer users-sync has.
    """
    row = conn.execute("select to_regclass('users_sync_worker.migration') is not null").fetchone()
    if row != (True,):
        return set(migrations())
    applied: dict[int, str | None] = dict(conn.execute(_APPLIED).fetchall())
    if newer := applied.keys() - migrations().keys():
        version = applied[max(newer)]
        made_by = f"users-sync {version}" if version else "a newer users-sync"
        wanted = f"{version} or later" if version else "the version that ran last"
        raise Misconfigured(
            f"the tables in {OWN_SCHEMA} were made by {made_by}, and this is"
            f" {installed_version()}: update this one to {wanted}"
        )
    return migrations().keys() - applied.keys()


def require_tables(conn: Connection) -> None:
    """Raise Misconfigured where the worker's tables do not exist yet, or not all of them."""
    if missing_migrations(conn):
        raise Misconfigured("the worker's tables are not there yet: run `users-sync init`")


def run_script(conn: Connection, text: str) -> None:
    """Run several statements at once, which the protocol allows for results as text only."""
    Cursor(conn).execute(text.encode())


def _create_table_sql(schema: str) -> sql.Composed:
    return sql.SQL(_USERS_SYNC).format(table=sql.Identifier(schema, "users_sync"))


def _unless_applied(number: int, script: str) -> str:
    indented = script.strip().replace("\n", "\n        ")
    return f"""do $migration$
begin
    if not exists (select from users_sync_worker.migration where number = {number}) then
        {indented}
    end if;
end
$migration$;
"""


def _record_sql(number: int, name: str) -> sql.Composed:
    return sql.SQL(
        "insert into users_sync_worker.migration (number, name, version) values ({}, {}, {})"
        " on conflict do nothing"
    ).format(sql.Literal(number), sql.Literal(name), sql.Literal(installed_version()))
