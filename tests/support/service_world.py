"""A long-running worker in this process, between a fake API on a real socket and a database."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Thread
from typing import Any

import psycopg

from tests.support.users_apis import api_of
from tests.support.waiting import until
from worker.sandbox.api import FakeStackApi, Project, Request, serve
from worker.service.supervisor import Supervisor
from worker.settings.settings import Settings

# Much longer than anything takes that does not hang.
PATIENCE_SECONDS = 20

SECTIONS: dict[str, dict[str, Any]] = {
    "stack": {"page_size": 100, "timeout_seconds": 5},
    "database": {"quiet": False, "lease_seconds": 3},
    "schedule": {
        "poll_seconds": 0.02,
        "poll_page_size": 10,
        "sweep_seconds": 0.1,
        "sweep_share": 1,
        "audit_hours": 24,
        "census_minutes": 5,
        "activity_seconds": 0,
    },
    "deletions": {"max_count": 500, "max_fraction": 1, "grace_seconds": 0},
    "http": {"port": 0},
    "webhook": {"secrets": (), "port": 0},
}


@dataclass
class Worker:
    """A service at work in a thread of its own; `error` is what its run raised."""

    service: Supervisor
    error: BaseException | None = None
    thread: Thread = field(init=False)

    def __post_init__(self) -> None:
        self.thread = Thread(target=self._run, name="service")
        self.thread.start()

    def _run(self) -> None:
        try:
            self.service.run()
        except BaseException as error:  # noqa: BLE001 - it is what the test looks at
            self.error = error

    @property
    def not_ready(self) -> tuple[str, ...]:
        return self.service.health.read().not_ready

    @property
    def state(self) -> str:
        return self.service.health.read().state

    def sweeps(self, kind: str = "sweep") -> int:
        """Count the sweeps of this kind that are still remembered."""
        return sum(one.kind == kind for one in self.service.health.read().sweeps)

    def end(self) -> BaseException | None:
        """Wait until it ends by itself; returns what it raised."""
        self.thread.join(PATIENCE_SECONDS)
        assert not self.thread.is_alive(), "the service does not end"
        return self.error

    def stop(self) -> None:
        self.service.stop.set()
        assert self.end() is None


@dataclass
class ServiceWorld:
    """One project, the API before it, the database behind it, and workers between them."""

    url: str
    conn: psycopg.Connection
    api_url: str
    project: Project
    api: FakeStackApi
    workers: list[Worker] = field(default_factory=list)

    def settings(self, **options: Any) -> Settings:
        """Make settings; `options` are named as in their section."""
        access = {
            "api_url": self.api_url,
            "project_id": self.project.project_id,
            "secret_server_key": self.project.secret_server_key,
        }
        defaults = {**SECTIONS, "stack": {**SECTIONS["stack"], **access}}
        known = {name for section in defaults.values() for name in section}
        assert options.keys() <= known, options.keys() - known
        return Settings.model_validate(
            {
                section: {name: options.get(name, value) for name, value in values.items()}
                for section, values in defaults.items()
            }
        )

    def start(self, **options: Any) -> Worker:
        """Start a worker that is stopped with the test at the latest."""
        worker = Worker(Supervisor(self.settings(**options), self.url, Event()))
        self.workers.append(worker)
        return worker

    def at_work(self, **options: Any) -> Worker:
        """Start a worker and wait until it has swept and polled, and saved what it knows."""
        worker = self.start(**options)
        until("the table is right", lambda: self.live() == set(self.project.ids()))
        health = worker.service.health
        until("it polls", lambda: health.read().seconds_since_poll is not None)
        until("it sweeps", lambda: health.read().seconds_since_sweep is not None)
        # The sweep is told of before its job is over, which goes on to save the mirror.
        until("it has saved", lambda: "sweep" not in worker.service.scheduler.running())
        return worker

    def query(self, text: str, *params: object) -> list[tuple[Any, ...]]:
        cursor = self.conn.execute(text.encode(), params or None)
        return cursor.fetchall() if cursor.description else []

    def live(self) -> set[str]:
        with suppress(psycopg.errors.UndefinedTable):
            return {row[0] for row in self.query(LIVE)}
        return set()

    def lease(self, column: str) -> Any:
        rows = self.query(f"select {column} from users_sync_worker.lease")  # noqa: S608
        return rows[0][0] if rows else None

    def connections(self) -> int:
        return int(self.query(CONNECTIONS)[0][0])

    def lists(self) -> list[Request]:
        """Give the requests for pages of the list, polls included."""
        return [request for request in self.api.requests if request.path == "/api/v1/users"]

    def polls(self) -> int:
        return sum(request.query.get("desc") == "true" for request in self.lists())


LIVE = "select id::text from neon_auth.users_sync where deleted_at is null"
CONNECTIONS = """
select count(*) from pg_stat_activity
where datname = current_database() and application_name = 'users-sync'
"""


@contextmanager
def opened_service_world(
    url: str, conn: psycopg.Connection, users_api: str = "today"
) -> Iterator[ServiceWorld]:
    project = Project()
    api = api_of(project, users_api)
    with serve(api) as api_url:
        world = ServiceWorld(url, conn, api_url, project, api)
        try:
            yield world
        finally:
            api.on_request(None)
            for worker in world.workers:
                worker.service.stop.set()
            for worker in world.workers:
                worker.thread.join(PATIENCE_SECONDS)
