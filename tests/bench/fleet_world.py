"""A fleet for benchmarks: workers as processes, one API host for all projects, some databases."""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4
from wsgiref.types import StartResponse, WSGIEnvironment

import psycopg
from psycopg import sql

from tests.bench.postgres import Databases
from tests.support.waiting import until
from worker.fleet.control import Control
from worker.fleet.projects import Project as Row
from worker.fleet.projects import checked
from worker.sandbox.api import FakeStackApi, Project, Reply, Request, serve, server_error

# Requests a second to the one API host.
BUDGET = 50.0
TARGETS = 4
LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 300.0

OWN: Mapping[str, Mapping[str, Any]] = {"deletions": {"grace_seconds": 0}}

_PRESENT = "select id::text from {} where id::text = any(%s)"
_LIVE = "select id::text from {} where deleted_at is null and %s::text[] is not null"


@dataclass
class Apis:
    """All projects behind one host, in a process of their own.

    `at` is when any was asked, `times` how often each.
    """

    projects: dict[str, Project] = field(default_factory=dict)
    apis: dict[str, FakeStackApi] = field(default_factory=dict)
    at: list[float] = field(default_factory=list)
    times: Counter[str] = field(default_factory=Counter)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        self.at.append(time.time())
        project_id = environ["HTTP_X_STACK_PROJECT_ID"]
        self.times[project_id] += 1
        api = self.apis[project_id]
        api.requests.clear()
        return api(environ, start_response)

    def add(self, project_id: str, users: int, page_seconds: float) -> None:
        project = Project(project_id)
        project.populate(users)
        self.projects[project_id] = project
        self.apis[project_id] = FakeStackApi(project)
        if page_seconds:
            self._slow_down(project_id, page_seconds)

    def create(self, project_id: str) -> str:
        return self.projects[project_id].create(display_name="new")

    def edit(self, project_id: str, name: str) -> str:
        """Edit the oldest user that is still there; returns the id."""
        user_id = self.projects[project_id].ids()[0]
        self.projects[project_id].edit(user_id, display_name=name)
        return user_id

    def delete(self, project_id: str, users: int = 1) -> None:
        for user_id in self.projects[project_id].ids()[-users:]:
            self.projects[project_id].delete(user_id)

    def fail(self, project_id: str) -> None:
        self.apis[project_id].on_request(lambda _request: server_error())

    def _slow_down(self, project_id: str, seconds: float) -> None:
        def wait(_request: Request) -> Reply | None:
            time.sleep(seconds)
            return None

        self.apis[project_id].on_request(wait)

    def revoke(self, project_id: str) -> None:
        self.projects[project_id].secret_server_key = "ssk_another"

    def ids(self, project_id: str) -> set[str]:
        return set(self.projects[project_id].ids())

    def asked_each(self) -> Counter[str]:
        times, self.times = self.times, Counter()
        return times

    def asked(self) -> list[float]:
        at, self.at = self.at, []
        return at


def _serve(pipe: Connection) -> None:
    apis = Apis()
    with serve(apis) as url:
        pipe.send(url)
        while (order := pipe.recv()) is not None:
            name, *arguments = order
            pipe.send(getattr(apis, name)(*arguments))


@dataclass
class Remote:
    """The process of the APIs."""

    pipe: Connection
    url: str

    def do(self, *order: object) -> Any:
        self.pipe.send(order)
        return self.pipe.recv()


@contextmanager
def _apis() -> Iterator[Remote]:
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    try:
        yield Remote(ours, ours.recv())
    finally:
        ours.send(None)
        process.join(5)
        process.kill()


@dataclass
class Bench:
    """A fleet of projects, and its workers as processes.

    `control_url` and `target_urls` are how the benchmark gets there, `way` how the workers do.
    """

    apis: Remote
    control_url: str
    target_urls: list[str]
    control: Control
    folder: Path
    way: Callable[[str], str] = lambda url: url
    added: int = 0
    ids: dict[str, str] = field(default_factory=dict)
    urls: dict[str, str] = field(default_factory=dict)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    connections: dict[str, psycopg.Connection] = field(default_factory=dict)

    def add(self, users: int, url: str | None = None, page_seconds: float = 0.0) -> str:
        """Add a project with so many users, in one of the databases by turns; returns its name."""
        number = self.added
        self.added += 1
        name, project_id = f"p{number:05}", str(uuid4())
        self.apis.do("add", project_id, users, page_seconds)
        self.ids[name] = project_id
        self.urls[name] = url or self.target_urls[number % len(self.target_urls)]
        place = f"{name}.url"
        (self.folder / place).write_text(self.way(self.urls[name]), "utf-8")
        references = ("env:KEY", f"file:{place}")
        row = Row(name, self.apis.url, project_id, *references, f"of_{name}", settings=OWN)
        self.control.add(checked(row))
        return name

    def start(self) -> subprocess.Popen[bytes]:
        environ = {
            **os.environ,
            "KEY": "ssk_sandbox",
            "FLEET_DATABASE_URL": self.way(self.control_url),
            "USERS_SYNC_FLEET__SECRETS_DIR": str(self.folder),
            "USERS_SYNC_FLEET__REQUESTS_PER_SECOND": str(BUDGET),
            "USERS_SYNC_FLEET__DATABASE_VISITS": "32",
            "USERS_SYNC_HTTP__PORT": "0",
            "USERS_SYNC_LOG__LEVEL": "warning",
        }
        with self.log.open("ab") as log:
            command = [sys.executable, "-m", "worker", "fleet", "work"]
            worker = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        self.workers.append(worker)
        return worker

    @property
    def log(self) -> Path:
        return self.folder / "workers.log"

    def warnings(self) -> list[str]:
        """Give the events that the workers warned of, or worse."""
        lines = map(json.loads, self.log.read_text("utf-8").splitlines())
        return [line["event"] for line in lines if line["level"] in {"warning", "error"}]

    def stop(self) -> float:
        """Stop all workers; returns the seconds until the last one had ended."""
        began = time.monotonic()
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            worker.wait(20)
        self.workers.clear()
        return time.monotonic() - began

    def query(self, text: str, *params: object) -> list[tuple[Any, ...]]:
        """Run a statement on the control database, with a connection of its own."""
        with psycopg.connect(self.control_url, autocommit=True) as conn:
            return conn.execute(text.encode(), params or None).fetchall()

    def rows(self, name: str, query: str, ids: Sequence[str]) -> list[tuple[Any, ...]]:
        """Run a query for these ids on the table of a project."""
        table = sql.Identifier(f"of_{name}", "users_sync")
        url = self.urls[name]
        if url not in self.connections:
            self.connections[url] = psycopg.connect(url, autocommit=True, application_name="bench")
        statement = sql.SQL(query).format(table)
        return self.connections[url].execute(statement, (list(ids),)).fetchall()

    def await_all(self, patience_seconds: float = PATIENCE_SECONDS) -> float:
        """Wait until each project was swept; returns the seconds."""
        began = time.monotonic()
        left = "select count(*) from users_sync_fleet.visit where swept_at is null"
        until(
            "all projects were swept",
            lambda: self.query(left) == [(0,)],
            patience_seconds,
            LOOK_SECONDS,
        )
        return time.monotonic() - began

    def live(self, name: str) -> set[str]:
        """Give the ids of the live rows of a project; none before the table is there."""
        try:
            return {row[0] for row in self.rows(name, _LIVE, [])}
        except psycopg.errors.UndefinedTable:
            return set()

    def out_of_step(self, names: Iterable[str] | None = None) -> list[str]:
        """Name the projects whose live rows are not the users of the project."""
        chosen = self.ids if names is None else names
        return [name for name in chosen if self.live(name) != self.apis.do("ids", self.ids[name])]

    def await_step(self, names: Iterable[str] | None = None) -> float:
        """Wait until all, or these, are in step; returns the seconds."""
        began, left = time.monotonic(), list(self.ids if names is None else names)

        def done() -> bool:
            left[:] = self.out_of_step(left)
            return not left

        until("all are in step", done, PATIENCE_SECONDS, LOOK_SECONDS)
        return time.monotonic() - began

    def now(self) -> float:
        """Tell the time by the control database's clock, in seconds."""
        [(now,)] = self.query("select extract(epoch from clock_timestamp())::float")
        return float(now)

    def fresh_at(self) -> dict[str, float]:
        """Tell until when the sign-ups of each project are rows, by the same clock."""
        query = "select name, coalesce(extract(epoch from fresh_at), 0)::float"
        return dict(self.query(f"{query} from users_sync_fleet.visit"))

    def memory(self, worker: subprocess.Popen[bytes]) -> float:
        """Give the resident memory of a worker, in bytes."""
        status = Path(f"/proc/{worker.pid}/status").read_text("utf-8")
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return float(line.split()[1]) * 1024


@contextmanager
def opened_bench(
    databases: Databases, *, targets: int = TARGETS, way: Callable[[str], str] = lambda url: url
) -> Iterator[Bench]:
    """Make a fleet without projects and workers."""
    with ExitStack() as opened:
        control_url = opened.enter_context(databases.fresh())
        urls = [opened.enter_context(databases.fresh()) for _ in range(targets)]
        apis = opened.enter_context(_apis())
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        control = Control(control_url, Event())
        opened.callback(control.close)
        control.init()
        bench = Bench(apis, control_url, urls, control, folder, way)
        try:
            yield bench
        finally:
            for worker in bench.workers:
                worker.kill()
                worker.wait()
            for conn in bench.connections.values():
                conn.close()


@dataclass
class SignUps:
    """Users who sign up in projects by chance, and how long each of them took to be a row."""

    bench: Bench
    names: Sequence[str]
    dice: random.Random
    seconds: list[float] = field(default_factory=list)
    _pending: dict[str, tuple[str, float]] = field(default_factory=dict)

    def one(self) -> None:
        name = self.dice.choice(self.names)
        self._pending[self.bench.apis.do("create", self.bench.ids[name])] = name, time.time()

    def look(self) -> None:
        """Take out the users who are rows by now."""
        ids: dict[str, list[str]] = {}
        for user_id, (name, _) in self._pending.items():
            ids.setdefault(name, []).append(user_id)
        for name, wanted in ids.items():
            for (user_id,) in self.bench.rows(name, _PRESENT, wanted):
                self.seconds.append(time.time() - self._pending.pop(user_id)[1])

    def go_on(self, seconds: float) -> list[float]:
        """Let users sign up for so long, and wait for all of them; returns how long they took."""
        before, ends_at = len(self.seconds), time.monotonic() + seconds
        while time.monotonic() < ends_at:
            self.one()
            for _ in range(4):
                time.sleep(self.dice.uniform(0.02, 0.1))
                self.look()
        until("all are rows", self._all_are_rows, PATIENCE_SECONDS, 0.05)
        return self.seconds[before:]

    def _all_are_rows(self) -> bool:
        self.look()
        return not self._pending


def most_within(at: Sequence[float], seconds: float) -> int:
    """Count the requests in the fullest stretch of so many seconds."""
    at, first, most = sorted(at), 0, 0
    for last, moment in enumerate(at):
        while at[first] <= moment - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most
