"""Looks at everything a sweep needs; says, a line each, what is right and how to mend it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Event

from worker.clock import Clock
from worker.errors import (
    DatabaseUnavailable,
    Misconfigured,
    SourceUnavailable,
    UsersSyncError,
)
from worker.once import access
from worker.retry import Retry
from worker.settings import Settings
from worker.stack_api import StackApi
from worker.store.database import Connection, Database
from worker.store.schema import missing_migrations, schema_exists
from worker.store.shape import detect_shape

OLDEST_SERVER = 140000

_SERVER = """
select current_setting('server_version_num')::int, current_setting('server_version'),
       current_setting('server_encoding'), pg_is_in_recovery(),
       current_setting('default_transaction_read_only')::boolean,
       has_database_privilege(current_database(), 'create')
"""

_TABLE_RIGHTS = """
select right_name from unnest(array['select', 'insert', 'update']) as right_name
where not has_table_privilege(format('%%I.%%I', %s::text, %s::text), right_name)
"""

_OWN_TABLES = """
select relname from pg_class
where relnamespace = 'users_sync_worker'::regnamespace and relkind = 'r'
  and not (has_table_privilege(oid, 'select') and (relname = 'migration' or (
      has_table_privilege(oid, 'insert') and has_table_privilege(oid, 'update')
      and has_table_privilege(oid, 'delete'))))
"""

_INDEXES = """
select exists (
    select from pg_index i join pg_attribute a
        on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
    where i.indrelid = format('%%I.users_sync', %s::text)::regclass and a.attname = 'deleted_at'
), exists (
    select from pg_index i join pg_attribute a
        on a.attrelid = i.indrelid and a.attnum = any(i.indkey)
    where i.indrelid = format('%%I.users_sync', %s::text)::regclass and a.attname = 'email'
      and i.indisunique
)
"""

_LEASE = """
select project, holder, expires_at > clock_timestamp() from users_sync_worker.lease
where target = %s
"""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the check. `verdict` is ok, warn or FAIL; `exit_code` belongs to a FAIL."""

    verdict: str
    subject: str
    text: str
    exit_code: int = 0


def check(settings: Settings, url: str) -> Iterator[Finding]:
    """Give the findings as they are made. Nothing is written anywhere."""
    yield Finding("ok", "configuration", "read, and complete")
    yield from _guarded("stack auth", lambda: _check_source(settings))
    clock = Clock()
    retry = Retry("the database", 0, Event(), DatabaseUnavailable)
    database = Database(url, clock, retry)
    try:
        yield from _guarded("database", lambda: database.call(_check_server))
        yield from _guarded(
            "table", lambda: database.call(lambda conn: _check_table(conn, settings))
        )
        yield from _guarded(
            "worker", lambda: database.call(lambda conn: _check_own(conn, settings))
        )
    finally:
        database.close()


def _guarded(subject: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    codes = {SourceUnavailable: 3, DatabaseUnavailable: 4}
    try:
        return look()
    except UsersSyncError as error:
        return [Finding("FAIL", subject, str(error), codes.get(type(error), 2))]


def _check_source(settings: Settings) -> list[Finding]:
    stop = Event()
    retry = Retry("Stack Auth", 0, stop, SourceUnavailable)
    with StackApi(access(settings), clock=Clock(), stop=stop) as api:
        page = retry.call(lambda: api.fetch_page(None, 2))
    users = "has users" if page.users else "has no users yet"
    return [Finding("ok", "stack auth", f"{settings.stack.api_url} answers; the project {users}")]


def _check_server(conn: Connection) -> list[Finding]:
    row = conn.execute(_SERVER).fetchone()
    if row is None:
        raise Misconfigured("the server does not describe itself")
    number, version, encoding, standby, read_only, _ = row
    if number < OLDEST_SERVER:
        raise Misconfigured(f"PostgreSQL {version} is too old: 14 is the oldest that will do")
    if encoding != "UTF8":
        raise Misconfigured(f"the database's encoding is {encoding}: create one with UTF8")
    if standby or read_only:
        raise Misconfigured("the database takes no writes: set database.url to the primary")
    return [Finding("ok", "database", f"PostgreSQL {version}, takes writes")]


def _check_table(conn: Connection, settings: Settings) -> list[Finding]:
    schema = settings.database.schema_name
    name = f"{schema}.users_sync"
    shape = detect_shape(conn, schema)
    if shape is None:
        _check_may_create(conn, schema)
        return [Finding("ok", "table", f"{name} is not there yet; `users-sync init` creates it")]
    lacking = [row[0] for row in conn.execute(_TABLE_RIGHTS, (schema, "users_sync"))]
    if lacking:
        raise Misconfigured(
            f"the worker's role may not {', '.join(lacking)}: run"
            f" `grant select, insert, update on {name} to current_role` as its owner"
        )
    indexed, unique_email = conn.execute(_INDEXES, (schema, schema)).fetchone() or (True, False)
    findings = [Finding("ok", "table", f"{name} can be adopted: {shape.value}")]
    if not indexed:
        fix = f"create index concurrently users_sync_deleted_at_idx on {name} (deleted_at)"
        findings.append(Finding("warn", "table", f"deleted_at has no index: run `{fix}`"))
    if unique_email:
        findings.append(
            Finding("warn", "table", "email is unique: users who swap addresses stay in quarantine")
        )
    return findings


def _check_own(conn: Connection, settings: Settings) -> list[Finding]:
    if missing := missing_migrations(conn):
        _check_may_create(conn, "users_sync_worker")
        text = f"{len(missing)} of the worker's SQL files to apply; `users-sync init` does it"
        return [Finding("ok", "worker", text)]
    if lacking := [row[0] for row in conn.execute(_OWN_TABLES)]:
        raise Misconfigured(
            f"the worker's role may not write users_sync_worker.{lacking[0]}: run"
            " `grant select, insert, update, delete on all tables in schema users_sync_worker`"
        )
    row = conn.execute(_LEASE, (settings.database.schema_name,)).fetchone()
    project, holder, live = row or (None, None, False)
    if project not in {None, settings.require_stack().project_id}:
        raise Misconfigured(
            f"the table belongs to Stack Auth project {project}: set stack.project_id"
            " (STACK_PROJECT_ID) to it, or database.schema to another schema"
        )
    return [Finding("ok", "worker", f"at work: {holder}" if live else "ready; nobody is at work")]


def _check_may_create(conn: Connection, schema: str) -> None:
    row = conn.execute(_SERVER).fetchone()
    exists = schema_exists(conn, schema)
    may = conn.execute(
        "select has_schema_privilege(%s, 'create')" if exists else "select %s <> '' and %s",
        (schema,) if exists else (schema, bool(row and row[-1])),
    ).fetchone()
    if may != (True,):
        raise Misconfigured(
            f"the worker's role may not create what is missing in {schema}: let an owner run the"
            " output of `users-sync init --print-sql`"
        )
