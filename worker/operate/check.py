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
from worker.store.schema import OWN_SCHEMA, missing_migrations
from worker.store.shape import detect_shape

OLDEST_SERVER = 140000

_SERVER = """
select current_setting('server_version_num')::int, current_setting('server_version'),
       current_setting('server_encoding'), pg_is_in_recovery(),
       current_setting('default_transaction_read_only')::boolean
"""

_ROLE = "select quote_ident(current_user)"

# Without a row there is no such schema.
_SCHEMA_RIGHTS = """
select has_schema_privilege(oid, 'usage'), has_schema_privilege(oid, 'create')
from pg_namespace where nspname = %s
"""

_MAY_CREATE_SCHEMAS = "select true, has_database_privilege(current_database(), 'create')"

_TABLE_RIGHTS = """
select right_name from unnest(array['select', 'insert', 'update']) as right_name
where not has_table_privilege(format('%%I.%%I', %s::text, %s::text), right_name)
"""

_OWN_TABLES = """
select relname from pg_class
where relnamespace = to_regnamespace('users_sync_worker') and relkind = 'r'
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
        yield from _check_database(database, settings)
    finally:
        database.close()


def _check_database(database: Database, settings: Settings) -> Iterator[Finding]:
    server = _guarded("database", lambda: database.call(_check_server))
    yield from server
    if any(finding.exit_code for finding in server):
        return  # the others could only say the same again
    yield from _guarded("table", lambda: database.call(lambda conn: _check_table(conn, settings)))
    yield from _guarded("worker", lambda: database.call(lambda conn: _check_own(conn, settings)))


def _guarded(subject: str, look: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return look()
    except (SourceUnavailable, DatabaseUnavailable) as error:
        code = 3 if isinstance(error, SourceUnavailable) else 4
        # Of its cause: it was asked once only, so for how long is of no interest.
        return [Finding("FAIL", subject, str(error.__cause__ or error), code)]
    except UsersSyncError as error:
        return [Finding("FAIL", subject, str(error), 2)]


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
    number, version, encoding, standby, read_only = row
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
    may_create = _may_create(conn, schema)
    shape = detect_shape(conn, schema)
    if shape is None:
        _require(schema, may_create=may_create)
        return [Finding("ok", "table", f"{name} is not there yet; `users-sync init` creates it")]
    lacking = [row[0] for row in conn.execute(_TABLE_RIGHTS, (schema, "users_sync"))]
    if lacking:
        raise Misconfigured(
            f"the worker's role may not {', '.join(lacking)}: let its owner run"
            f" `grant select, insert, update on {name} to {_role(conn)}`"
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
    may_create = _may_create(conn, OWN_SCHEMA)
    if lacking := [row[0] for row in conn.execute(_OWN_TABLES)]:
        raise Misconfigured(
            f"the worker's role may not write {OWN_SCHEMA}.{lacking[0]}: let its owner run"
            f" `grant select, insert, update, delete on all tables in schema {OWN_SCHEMA}"
            f" to {_role(conn)}`"
        )
    if missing := missing_migrations(conn):
        _require(OWN_SCHEMA, may_create=may_create)
        text = f"{len(missing)} of the worker's SQL files to apply; `users-sync init` does it"
        return [Finding("ok", "worker", text)]
    row = conn.execute(_LEASE, (settings.database.schema_name,)).fetchone()
    project, holder, live = row or (None, None, False)
    if project not in {None, settings.require_stack().project_id}:
        raise Misconfigured(
            f"the table belongs to Stack Auth project {project}: set stack.project_id"
            " (STACK_PROJECT_ID) to it, or database.schema to another schema"
        )
    return [Finding("ok", "worker", f"at work: {holder}" if live else "ready; nobody is at work")]


def _may_create(conn: Connection, schema: str) -> bool:
    """Whether our role may create tables in `schema`. Raises Misconfigured if it may not enter."""
    rights = conn.execute(_SCHEMA_RIGHTS, (schema,)).fetchone()
    usage, create = rights or conn.execute(_MAY_CREATE_SCHEMAS).fetchone() or (True, False)
    if not usage:
        raise Misconfigured(
            f"the worker's role may not use the schema {schema}: let its owner run"
            f" `grant usage on schema {schema} to {_role(conn)}`"
        )
    return bool(create)


def _require(schema: str, *, may_create: bool) -> None:
    if not may_create:
        raise Misconfigured(
            f"the worker's role may not create what is missing in {schema}: let an owner run the"
            " output of `users-sync init --print-sql`"
        )


def _role(conn: Connection) -> str:
    row = conn.execute(_ROLE).fetchone()
    return str(row[0]) if row else "the worker's role"
