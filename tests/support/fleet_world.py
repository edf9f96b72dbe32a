"""A fleet: a control database, several projects behind one API host, and workers of it."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Thread
from typing import Any
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIEnvironment

import psycopg
from psycopg import sql

from worker.fleet.control import Control
from worker.fleet.projects import Project as Row
from worker.fleet.projects import checked
from worker.fleet.work import FleetWorker
from worker.sandbox.api import FakeStackApi, Project, serve
from worker.settings.settings import Settings

# Much longer than anything takes that does not hang.
PATIENCE_SECONDS = 30

FAST: dict[str, Any] = {
    "requests_per_second": 200,
    "visits": 4,
    "visit_seconds": 10,
    "memory_mb": 64,
}
OWN: dict[str, dict[str, Any]] = {
    "schedule": {"poll_seconds": 0.2, "sweep_seconds": 1},
    "deletions": {"grace_seconds": 0},
}


@dataclass
class ManyApis:
    """One API host with the users of many projects, told apart as the real one does."""

    apis: dict[str, FakeStackApi] = field(default_factory=dict)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        return self.apis[environ["HTTP_X_STACK_PROJECT_ID"]](environ, start_response)


@dataclass
class Member:
    """A project of the fleet: its users, its API, and where its table is."""

    name: str
    project: Project
    api: FakeStackApi
    url: str
    schema: str

    def live(self) -> set[str]:
        """Give the ids of the live rows; none before the table is there."""
        query = sql.SQL("select id::text from {} where deleted_at is null")
        with psycopg.connect(self.url) as conn:
            try:
                rows = conn.execute(query.format(sql.Identifier(self.schema, "users_sync")))
            except psycopg.errors.UndefinedTable:
                return set()
            return {row[0] for row in rows}

    def name_of(self, user_id: str) -> str | None:
        """Give the name in the user's row."""
        query = sql.SQL("select name from {} where id::text = %s")
        with psycopg.connect(self.url) as conn:
            statement = query.format(sql.Identifier(self.schema, "users_sync"))
            row = conn.execute(statement, (user_id,)).fetchone()
        return None if row is None else row[0]

    @property
    def in_step(self) -> bool:
        return self.live() == set(self.project.ids())


@dataclass
class FleetWorld:
    """The fleet; `environ` is what the workers' references lead to."""

    control_url: str
    target_urls: list[str]
    api_url: str
    apis: ManyApis
    folder: Path
    control: Control
    members: dict[str, Member] = field(default_factory=dict)
    environ: dict[str, str] = field(default_factory=dict)
    ends: ExitStack = field(default_factory=ExitStack)

    def settings(self, **fleet: Any) -> Settings:
        """Make the settings of a worker; options are those of [fleet]."""
        chosen = {**FAST, "url": self.control_url, "secrets_dir": self.folder, **fleet}
        sections = {"fleet": chosen, "http": {"port": 0}, "webhook": {"port": 0}}
        return Settings.model_validate(sections)

    def variables(self, port: int = 0) -> dict[str, str]:
        """Give the environment of a worker that is a process; it listens on this port, if any."""
        return {
            "FLEET_DATABASE_URL": self.control_url,
            "USERS_SYNC_FLEET__SECRETS_DIR": str(self.folder),
            "USERS_SYNC_FLEET__REQUESTS_PER_SECOND": str(FAST["requests_per_second"]),
            "USERS_SYNC_HTTP__PORT": str(port),
        }

    def add(self, name: str, users: int = 0, **own: Mapping[str, Any]) -> Member:
        """Add a project with so many users; options are sections of its own settings."""
        project = Project(str(uuid4()))
        project.populate(users)
        number = len(self.members)
        url = self.target_urls[number % len(self.target_urls)]
        member = Member(name, project, FakeStackApi(project), url, f"of_{name}".replace("-", "_"))
        self.apis.apis[project.project_id] = member.api
        self.members[name] = member
        (self.folder / f"{name}.key").write_text(f"{project.secret_server_key}\n")
        (self.folder / f"{name}.url").write_text(f"{url}\n")
        self.control.add(self.row(name, **own))
        return member

    def row(self, name: str, **own: Mapping[str, Any]) -> Row:
        member = self.members[name]
        settings = {section: {**OWN.get(section, {}), **own.get(section, {})} for section in OWN}
        return checked(
            Row(
                name,
                self.api_url,
                member.project.project_id,
                f"file:{name}.key",
                f"file:{name}.url",
                member.schema,
                settings={**own, **settings},
            )
        )

    @contextmanager
    def at_work(self, **fleet: Any) -> Iterator[FleetWorker]:
        """Run a worker in this process, until the block ends."""
        worker = FleetWorker(self.settings(**fleet), Event(), tick_seconds=0.3, roster_seconds=0.5)
        errors: list[BaseException] = []
        thread = Thread(target=_run, args=(worker, errors.append), name="fleet", daemon=True)
        thread.start()
        try:
            yield worker
        finally:
            worker.stop.set()
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), "the worker does not end"
        assert errors == []

    def query(self, text: str, *params: object) -> list[tuple[Any, ...]]:
        """Run a statement on the control database."""
        with psycopg.connect(self.control_url, autocommit=True) as conn:
            cursor = conn.execute(text.encode(), params or None)
            return cursor.fetchall() if cursor.description else []

    def value(self, text: str, *params: object) -> Any:
        return self.query(text, *params)[0][0]

    def states(self) -> dict[str, str]:
        return {row["name"]: row["state"] for row in self.control.status()}


def _run(worker: FleetWorker, failed: Callable[[BaseException], None]) -> None:
    try:
        worker.run()
    except BaseException as error:  # noqa: BLE001 - it is what the test looks at
        failed(error)


@contextmanager
def opened_fleet(control_url: str, target_urls: list[str], folder: Path) -> Iterator[FleetWorld]:
    """Make an empty fleet, whose control database is ready."""
    apis = ManyApis()
    control = Control(control_url, Event())
    with serve(apis) as api_url:
        try:
            control.init()
            yield FleetWorld(control_url, target_urls, api_url, apis, folder, control)
        finally:
            control.close()
