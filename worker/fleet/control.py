"""The control database: which projects there are, whose visit is due, and what the visits found."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from threading import Event
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg.types.json import Jsonb

from worker import installed_version
from worker.clock import Clock
from worker.errors import DatabaseUnavailable, Misconfigured
from worker.fleet.projects import Project
from worker.retry import Retry
from worker.store.connection import Connection
from worker.store.database import SEE_CHECK, Database

T = TypeVar("T")

# Advisory locks share one space of numbers; this one was drawn at random.
_INIT_LOCK = 3_914_457_206_118_255

# The control database is not waited for any longer: a visit goes on without it, and ends.
CALL_SECONDS = 5.0
RETRY_MINUTES = 0.05

# What waits for any worker, and what waits for the one that holds the project's mirror.
SHARED_QUEUE = "visits"

_BOOKKEEPING = """
create schema if not exists users_sync_fleet;
create table if not exists users_sync_fleet.migration (
    number int primary key,
    name text not null,
    version text not null,
    applied_at timestamptz not null default now()
);
comment on table users_sync_fleet.migration is 'Which of the numbered SQL files were applied.';
"""
_APPLIED = "select number, version from users_sync_fleet.migration"
_RECORD = "insert into users_sync_fleet.migration (number, name, version) values (%s, %s, %s)"
_IS_THERE = "select to_regclass(%s) is not null"

_PROJECT = """
select name, api_url, project_id, secret_ref, database_ref, schema, webhook_ref, settings, enabled,
       revision
from users_sync_fleet.project
"""
_PROJECTS = f"{_PROJECT} order by name"
_ONE_PROJECT = f"{_PROJECT} where name = %s"
_ADD = """
with added as (
    insert into users_sync_fleet.project
        (name, api_url, api_host, project_id, secret_ref, database_ref, schema, webhook_ref,
         settings)
    values (%(name)s, %(api_url)s, %(api_host)s, %(project_id)s, %(secret_ref)s, %(database_ref)s,
            %(schema)s, %(webhook_ref)s, %(settings)s)
    on conflict (name) do nothing
    returning name
)
insert into users_sync_fleet.visit (name) select name from added returning name
"""
_REPLACE = """
update users_sync_fleet.project set
    api_url = %(api_url)s, api_host = %(api_host)s, project_id = %(project_id)s,
    secret_ref = %(secret_ref)s, database_ref = %(database_ref)s, schema = %(schema)s,
    webhook_ref = %(webhook_ref)s, settings = %(settings)s, revision = revision + 1
where name = %(name)s returning name
"""
_ENABLE = """
update users_sync_fleet.project set enabled = %s, revision = revision + 1
where name = any(%s) returning name
"""
_REMOVE = "delete from users_sync_fleet.project where name = any(%s) returning name"

_BEGIN = "select * from users_sync_fleet.begin_visit(%s, %s, %s, %s, %s)"
_END = "select users_sync_fleet.end_visit(%s, %s, %s, %s, %s)"
_CLAIM = "select * from users_sync_fleet.claim(%s, %s, %s, %s)"
_HINT = "select users_sync_fleet.hint(%s)"
_TICK = "select * from users_sync_fleet.tick(%s, %s, %s, %s, %s, %s)"
_LOOK_AFTER = "select * from users_sync_fleet.look_after(%s, %s, %s)"
_LEAVE = "select users_sync_fleet.leave(%s)"

STATUS_COLUMNS = (
    "name",
    "state",
    "fresh_seconds",
    "swept_seconds",
    "cycle_seconds",
    "visitor",
    "next_visit_at",
    "users",
    "held",
    "candidates",
    "quarantined",
    "failures",
    "failing_since",
    "error",
    "waits_for_a_person",
    "api_host",
    "schema",
    "enabled",
)
# What the view says of a project, the worst first.
STATES = (
    "needs a person",
    "failing",
    "held",
    "late",
    "new",
    "standing by",
    "fresh",
    "paused",
)
_STATUS = """
select * from users_sync_fleet.status
where %(name)s::text is null or name = %(name)s
order by array_position(%(states)s, state), fresh_seconds desc nulls first, name
limit %(most)s
"""
_COUNTS = "select state, count(*) from users_sync_fleet.status group by state"
_HOSTS = "select api_host, projects, cycle_seconds from users_sync_fleet.host where projects > 0"


@dataclass(frozen=True, slots=True)
class Begun:
    """How a visit began: `begun`, `busy` or `gone`; with what is known of the project before it.

    `revision` counts the changes of its row, `failures` the visits in a row that failed.
    """

    state: str
    revision: int
    hinted: bool
    failures: int


@dataclass(frozen=True, slots=True)
class Tick:
    """How many workers and projects there are, and whether this worker looks after the roster."""

    workers: int
    projects: int
    looks: bool


@dataclass(frozen=True, slots=True)
class Overview:
    """The whole fleet: projects by state, the worst of them, and the hosts with their cycles."""

    counts: Mapping[str, int]
    worst: Sequence[Mapping[str, Any]]
    hosts: Sequence[tuple[str, int, float]]


class _Untold:
    """Keeps single attempts out of the log: that the control database is away is told once."""

    def failed(self, service: str, error: str) -> None: ...

    def succeeded(self, service: str) -> None: ...

    def answered(self, status: str, seconds: float) -> None: ...

    def took(self, service: str, seconds: float) -> None: ...

    def moved(self) -> None: ...

    def stalled(self) -> bool:
        return False


class Control:
    """The control database, on one connection that many threads share, without session state.

    Every call raises DatabaseUnavailable or Misconfigured, in words about `fleet.url`.
    """

    def __init__(self, url: str, stop: Event, retry_minutes: float = RETRY_MINUTES) -> None:
        retry = Retry("the control database", retry_minutes, stop, DatabaseUnavailable, _Untold())
        self._database = Database(url, Clock(), retry, CALL_SECONDS)

    def close(self) -> None:
        self._database.close()

    def init(self) -> int:
        """Create what is missing, the engine's tables included; returns how many files it ran."""
        return self._call(_init, 60.0)

    def require_init(self) -> None:
        """Raise Misconfigured unless `fleet init` was run by this version of the program."""
        missing = self._call(_missing)
        if missing:
            raise Misconfigured("the control database is not ready: run `users-sync fleet init`")

    def projects(self) -> list[Project]:
        """Return all projects, by name."""
        return self._call(lambda conn: [Project(*row) for row in conn.execute(_PROJECTS)])

    def project(self, name: str) -> Project | None:
        """Return one project, or None."""
        row = self._call(lambda conn: conn.execute(_ONE_PROJECT, (name,)).fetchone())
        return None if row is None else Project(*row)

    def add(self, project: Project, *, replace: bool = False) -> None:
        """Add a project, or change the one of that name. Raises Misconfigured."""
        columns = {
            "name": project.name,
            "api_url": project.api_url,
            "api_host": project.api_host,
            "project_id": project.project_id,
            "secret_ref": project.secret_ref,
            "database_ref": project.database_ref,
            "schema": project.schema,
            "webhook_ref": project.webhook_ref,
            "settings": Jsonb(project.settings),
        }
        query = _REPLACE if replace else _ADD
        if self._call(lambda conn: _unless_taken(conn, query, columns)) is None:
            raise Misconfigured(
                f"there is no project {project.name}: add it without --replace"
                if replace
                else f"there is a project {project.name} already: --replace changes it"
            )

    def enable(self, names: Sequence[str], *, enabled: bool) -> set[str]:
        """Resume or pause projects; returns those that there are."""
        return self._names(_ENABLE, (enabled, list(names)))

    def remove(self, names: Sequence[str]) -> set[str]:
        """Remove projects from the fleet, and nothing from their databases."""
        return self._names(_REMOVE, (list(names),))

    def begin_visit(self, name: str, worker: str, queue: str, most: tuple[int, int]) -> Begun:
        """Begin a visit; `most` are the visits at once to its API host and its database server."""
        row = self._call(lambda conn: conn.execute(_BEGIN, (name, worker, queue, *most)).fetchone())
        return Begun(*row) if row else Begun("gone", 0, hinted=False, failures=0)

    def end_visit(
        self, name: str, worker: str, queue: str, pause: float, found: Mapping[str, Any]
    ) -> None:
        """End a visit, and defer the next one to `queue`, after `pause` seconds at least."""
        values = (name, worker, queue, pause, Jsonb(dict(found)))
        self._call(lambda conn: conn.execute(_END, values))

    def claim(self, host: str, wanted: int, rate: float, most_ahead: float) -> tuple[int, float]:
        """Claim moments for requests; returns how many, and the seconds until the first one."""
        values = (host, wanted, rate, most_ahead)
        row = self._call(lambda conn: conn.execute(_CLAIM, values).fetchone())
        return (row[0], row[1]) if row else (0, 0.0)

    def hint(self, name: str) -> None:
        """Have a project visited soon, with a look at its hints."""
        self._call(lambda conn: conn.execute(_HINT, (name,)))

    def tick(
        self, worker: str, machine: str, projects: int, mirror_bytes: int, every: float
    ) -> Tick:
        """Tell that this worker is alive; the first one after `every` seconds gets `looks`."""
        values = (worker, machine, installed_version(), projects, mirror_bytes, every)
        row = self._call(lambda conn: conn.execute(_TICK, values).fetchone())
        return Tick(*row) if row else Tick(1, 0, looks=False)

    def look_after(self, silence: float, lateness: float, rate: float) -> int:
        """Look after the roster; returns how many missing visits were deferred."""
        values = (silence, lateness, rate)
        row = self._call(lambda conn: conn.execute(_LOOK_AFTER, values).fetchone(), 30.0)
        return int(row[0]) if row else 0

    def leave(self, worker: str) -> None:
        """Hand on what waits for this worker, which stops."""
        self._call(lambda conn: conn.execute(_LEAVE, (worker,)))

    def status(self, name: str | None = None, most: int | None = None) -> list[dict[str, Any]]:
        """Return the view `status`, the worst first: of one project, or of at most so many."""
        params = {"name": name, "most": most, "states": list(STATES)}
        rows = self._call(lambda conn: conn.execute(_STATUS, params).fetchall(), 30.0)
        return [dict(zip(STATUS_COLUMNS, row, strict=True)) for row in rows]

    def overview(self, most: int) -> Overview:
        """Return how the fleet is, with at most so many of its projects."""
        counts: dict[str, int] = self._call(
            lambda conn: dict(conn.execute(_COUNTS).fetchall()), 30.0
        )
        hosts = self._call(lambda conn: conn.execute(_HOSTS).fetchall())
        return Overview(counts, self.status(most=most), [(h, n, c) for h, n, c in hosts])

    def _names(self, query: LiteralString, params: Sequence[object]) -> set[str]:
        return self._call(lambda conn: {row[0] for row in conn.execute(query, params)})

    def _call(self, work: Callable[[Connection], T], seconds: float | None = None) -> T:
        with in_words_of_the_fleet():
            return self._database.call(work, seconds)


@contextmanager
def in_words_of_the_fleet() -> Iterator[None]:
    """Let an error name the setting of the control database, not that of a table's."""
    try:
        yield
    except (Misconfigured, DatabaseUnavailable) as error:
        told = str(error).replace("database.url (DATABASE_URL)", "fleet.url (FLEET_DATABASE_URL)")
        told = told.replace("the database ", "the control database ", 1).removesuffix(SEE_CHECK)
        raise (
            type(error)(told) if type(error) is DatabaseUnavailable else Misconfigured(told)
        ) from error


def migrations() -> dict[int, tuple[str, str]]:
    """Give every numbered SQL file of the fleet: number, then name and text, in order."""
    folder = resources.files("worker.fleet") / "migrations"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return {int(file.name[:3]): (file.name, file.read_text("utf-8")) for file in files}


def _missing(conn: Connection) -> list[int]:
    if conn.execute(_IS_THERE, ("users_sync_fleet.migration",)).fetchone() != (True,):
        return list(migrations())
    applied: dict[int, str] = dict(conn.execute(_APPLIED).fetchall())
    if newer := applied.keys() - migrations().keys():
        raise Misconfigured(
            f"the control database was made ready by a newer users-sync ({applied[max(newer)]}):"
            " update this one"
        )
    return [number for number in migrations() if number not in applied]


def _init(conn: Connection) -> int:
    if not (missing := _missing(conn)):
        return 0
    with conn.transaction():
        conn.execute("select pg_advisory_xact_lock(%s)", (_INIT_LOCK,))
        if conn.execute(_IS_THERE, ("procrastinate_jobs",)).fetchone() != (True,):
            engine = resources.files("procrastinate") / "sql" / "schema.sql"
            _run_script(conn, engine.read_text("utf-8"))
        _run_script(conn, _BOOKKEEPING)
        missing = _missing(conn)
        for number in missing:
            name, text = migrations()[number]
            _run_script(conn, text)
            conn.execute(_RECORD, (number, name, installed_version()))
    return len(missing)


def _run_script(conn: Connection, text: str) -> None:
    psycopg.Cursor(conn).execute(text.encode())


def _unless_taken(
    conn: Connection, query: LiteralString, columns: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    try:
        return conn.execute(query, columns).fetchone()
    except psycopg.errors.UniqueViolation as error:
        if error.diag.constraint_name != "one_project_a_table":
            raise
        where = f"{columns['database_ref']}, schema {columns['schema']}"
        raise Misconfigured(
            f"another project of the fleet has this table ({where}): give each a schema of its own"
        ) from None


def as_json(row: Mapping[str, Any]) -> str:
    """Write a row of the view as JSON, moments as ISO 8601."""
    return json.dumps(row, default=lambda moment: moment.isoformat())


def _count_states(conn: Connection) -> dict[str, int]:
    return dict(conn.execute(_COUNTS).fetchall())
