"""The control database: which projects there are, whose visit is due, and what the visits found."""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from threading import Event
from typing import Any, LiteralString, TypeVar

import psycopg
from psycopg.types.json import Jsonb

from worker import installed_version
from worker.clock import Clock
from worker.errors import DatabaseUnavailable, Misconfigured
from worker.fleet import ready
from worker.fleet.projects import Project
from worker.retry import Retry
from worker.settings.names import Names, named
from worker.store.connection import Connection
from worker.store.database import Database

T = TypeVar("T")

# What to call it in an error; no check explains one.
NAMES = Names(
    database="the control database", database_url=named(("fleet", "url")), schema="", check=""
)

# The control database is not waited for any longer: a visit goes on without it, and ends.
CALL_SECONDS = 5.0
RETRY_MINUTES = 0.05

# A worker is dead that told nothing for so long; it does so every second. One that was only slow
# loses nothing but its jobs' rows: the lease keeps it from harm, and it is registered again.
SILENCE_SECONDS = 5.0

# The queue for any worker. `visits:NAME` (Visitor.queue) is for the worker that has the mirror in
# memory.
SHARED_QUEUE = "visits"

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
insert into users_sync_fleet.visit (name) select name from added
returning name, users_sync_fleet.soon(name)
"""
_REPLACE = """
update users_sync_fleet.project set
    api_url = %(api_url)s, api_host = %(api_host)s, project_id = %(project_id)s,
    secret_ref = %(secret_ref)s, database_ref = %(database_ref)s, schema = %(schema)s,
    webhook_ref = %(webhook_ref)s, settings = %(settings)s, revision = revision + 1
where name = %(name)s
returning name, case when enabled then users_sync_fleet.soon(name) end
"""
_ENABLE = """
update users_sync_fleet.project set enabled = %s, revision = revision + 1
where name = any(%s) returning name, case when enabled then users_sync_fleet.soon(name) end
"""
_REMOVE = "delete from users_sync_fleet.project where name = any(%s) returning name"

_BEGIN = "select * from users_sync_fleet.begin_visit(%s, %s, %s, %s, %s)"
_END = "select users_sync_fleet.end_visit(%s, %s, %s, %s, %s)"
_CLAIM = "select * from users_sync_fleet.claim(%s, %s, %s, %s)"
_HINT = "select users_sync_fleet.hint(%s)"
_TICK = """
select * from users_sync_fleet.tick(
    worker => %s, machine => %s, projects => %s, mirror_bytes => %s, version => %s, every => %s,
    silence => %s
)
"""
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
_WORKERS = """
select count(*) from users_sync_fleet.worker
where seen_at > clock_timestamp() - make_interval(secs => %s)
"""
_IS_DEAD = "select exists (select from users_sync_fleet.dead_worker where name = %s)"
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
class Claim:
    """How many moments were granted, when the first one is, and what time it is now.

    Both are in seconds of the control database's clock.
    """

    granted: int
    first_at: float
    now: float


@dataclass(frozen=True, slots=True)
class Alive:
    """What a worker tells of itself: its name and machine, and what it has in memory."""

    worker: str
    machine: str
    projects: int
    mirror_bytes: int


@dataclass(frozen=True, slots=True)
class Tick:
    """How many workers and projects there are, and whether this worker looks after the roster."""

    workers: int
    projects: int
    looks: bool


@dataclass(frozen=True, slots=True)
class Overview:
    """The whole fleet: projects by state, rows of the view, and the hosts with their cycles.

    `worst` are all projects, or those that are worst off; the worst first.
    """

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
        self._database = Database(url, Clock(), retry, CALL_SECONDS, names=NAMES)
        self._failed_at = float("-inf")
        self._failure = ""

    def close(self) -> None:
        self._database.close()

    def init(self) -> int:
        """Create what is missing, the engine's tables included; returns how many files it ran."""
        return self._call(ready.make, 60.0)

    def require_init(self) -> None:
        """Raise Misconfigured unless `fleet init` was run by this version of the program."""
        if self._call(ready.missing):
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

    def claim(self, host: str, wanted: int, rate: float, most_ahead: float) -> Claim:
        """Claim moments for requests, `rate` a second, the first one at most so far ahead."""
        values = (host, wanted, rate, most_ahead)
        row = self._call(lambda conn: conn.execute(_CLAIM, values).fetchone())
        return Claim(*row) if row else Claim(0, 0.0, 0.0)

    def hint(self, name: str) -> None:
        """Have a project visited soon, with a look at its hints."""
        self._call(lambda conn: conn.execute(_HINT, (name,)))

    def tick(self, alive: Alive, every: float, silence: float) -> Tick:
        """Tell that a worker is alive.

        The first one after `every` seconds, or once another was silent for so long, gets `looks`.
        """
        values = (*astuple(alive), installed_version(), every, silence)
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

    def workers(self, silence: float) -> int:
        """Count the workers that were not silent for so many seconds."""
        row = self._call(lambda conn: conn.execute(_WORKERS, (silence,)).fetchone())
        return int(row[0]) if row else 0

    def is_dead(self, worker: str) -> bool:
        """Whether a worker of this fleet fell silent, and has not been heard of since."""
        return self._call(lambda conn: conn.execute(_IS_DEAD, (worker,)).fetchone()) == (True,)

    def overview(self, shown: int, named: int) -> Overview:
        """Return how the fleet is: with all of its projects if they are at most `named`.

        Else with the `shown` that are worst off.
        """
        counts: dict[str, int] = self._call(
            lambda conn: dict(conn.execute(_COUNTS).fetchall()), 30.0
        )
        hosts = self._call(lambda conn: conn.execute(_HOSTS).fetchall())
        most = max(shown, named) if sum(counts.values()) <= named else shown
        return Overview(counts, self.status(most=most), [(h, n, c) for h, n, c in hosts])

    def _names(self, query: LiteralString, params: Sequence[object]) -> set[str]:
        return self._call(lambda conn: {row[0] for row in conn.execute(query, params)})

    def _call(self, work: Callable[[Connection], T], seconds: float | None = None) -> T:
        asked_at = time.monotonic()
        with self._database.lock:
            # All threads wait for the same attempt: one after another they would wait for long.
            if self._failed_at > asked_at:
                raise DatabaseUnavailable(self._failure)
            try:
                return self._database.call(work, seconds)
            except DatabaseUnavailable as error:
                self._failed_at, self._failure = time.monotonic(), str(error)
                raise


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
