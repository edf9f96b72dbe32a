"""The fleet: freshness within a budget, workers that are killed, and what an idle project costs."""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
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
from psycopg.conninfo import conninfo_to_dict

from tests.bench.figures import Conditions, Figure
from tests.bench.postgres import Databases
from tests.support.waiting import until
from worker.fleet.control import Control
from worker.fleet.projects import Project as Row
from worker.fleet.projects import checked
from worker.sandbox.api import FakeStackApi, Project, serve

# Requests a second to the one API host.
BUDGET = 50.0
TARGETS = 4
LOOK_SECONDS = 0.5
PATIENCE_SECONDS = 300.0
KILL_EVERY_SECONDS = 20.0

_PRESENT = "select id::text from {} where id::text = any(%s)"
_CHANGED = "select id::text, extract(epoch from updated_at)::float from {} where id::text = any(%s)"
_LEAVE = "insert into users_sync_worker.hint (target, user_id) values (%s, %s)"


@dataclass
class Apis:
    """All projects behind one host, in a process of their own; `at` is when each was asked."""

    projects: dict[str, Project] = field(default_factory=dict)
    apis: dict[str, FakeStackApi] = field(default_factory=dict)
    at: list[float] = field(default_factory=list)

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        self.at.append(time.time())
        api = self.apis[environ["HTTP_X_STACK_PROJECT_ID"]]
        api.requests.clear()
        return api(environ, start_response)

    def add(self, project_id: str, users: int) -> None:
        project = Project(project_id)
        project.populate(users)
        self.projects[project_id] = project
        self.apis[project_id] = FakeStackApi(project)

    def create(self, project_id: str) -> str:
        return self.projects[project_id].create(display_name="new")

    def edit(self, project_id: str, name: str) -> str:
        """Edit the oldest user but one that is still there; returns the id."""
        user_id = self.projects[project_id].ids()[0]
        self.projects[project_id].edit(user_id, display_name=name)
        return user_id

    def delete(self, project_id: str) -> None:
        self.projects[project_id].delete(self.projects[project_id].ids()[-1])

    def ids(self, project_id: str) -> set[str]:
        return set(self.projects[project_id].ids())

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
    """A fleet of projects, and its workers as processes."""

    apis: Remote
    control_url: str
    target_urls: Sequence[str]
    control: Control
    folder: Path
    ids: dict[str, str] = field(default_factory=dict)
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)
    connections: dict[str, psycopg.Connection] = field(default_factory=dict)

    def add(self, users: int) -> str:
        name, project_id = f"p{len(self.ids):05}", str(uuid4())
        self.apis.do("add", project_id, users)
        number = len(self.ids) % len(self.target_urls)
        row = Row(name, self.apis.url, project_id, "env:KEY", f"env:TARGET{number}", f"of_{name}")
        self.control.add(checked(Row(**{**_columns(row), "settings": OWN})))
        self.ids[name] = project_id
        return name

    def url_of(self, name: str) -> str:
        return self.target_urls[int(name[1:]) % len(self.target_urls)]

    def start(self) -> subprocess.Popen[bytes]:
        targets = {f"TARGET{number}": url for number, url in enumerate(self.target_urls)}
        environ = {
            **os.environ,
            **targets,
            "KEY": "ssk_sandbox",
            "FLEET_DATABASE_URL": self.control_url,
            "USERS_SYNC_FLEET__REQUESTS_PER_SECOND": str(BUDGET),
            "USERS_SYNC_FLEET__DATABASE_VISITS": "32",
            "USERS_SYNC_HTTP__PORT": "0",
            "USERS_SYNC_LOG__LEVEL": "warning",
        }
        log = (self.folder / "workers.log").open("ab")
        command = [sys.executable, "-m", "worker", "fleet", "work"]
        worker = subprocess.Popen(command, env=environ, stdout=log, stderr=log)
        self.workers.append(worker)
        return worker

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
        with psycopg.connect(self.control_url, autocommit=True) as conn:
            return conn.execute(text.encode(), params or None).fetchall()

    def rows(self, name: str, query: str, ids: Sequence[str]) -> list[tuple[Any, ...]]:
        table = sql.Identifier(f"of_{name}", "users_sync")
        url = self.url_of(name)
        if url not in self.connections:
            self.connections[url] = psycopg.connect(url, autocommit=True, application_name="bench")
        statement = sql.SQL(query).format(table)
        return self.connections[url].execute(statement, (list(ids),)).fetchall()

    def await_all(self) -> float:
        """Wait until each project was swept; returns the seconds."""
        began = time.monotonic()
        left = "select count(*) from users_sync_fleet.visit where swept_at is null"
        until(
            "all projects were swept",
            lambda: self.query(left) == [(0,)],
            PATIENCE_SECONDS,
            LOOK_SECONDS,
        )
        return time.monotonic() - began

    def out_of_step(self) -> list[str]:
        """Name the projects whose live rows are not the users of the project."""
        wrong = []
        for name, project_id in self.ids.items():
            query = "select id::text from {} where deleted_at is null and %s::text[] is not null"
            live = {row[0] for row in self.rows(name, query, [])}
            if live != self.apis.do("ids", project_id):
                wrong.append(name)
        return wrong

    def memory(self, worker: subprocess.Popen[bytes]) -> float:
        """Give the resident memory of a worker, in bytes."""
        status = Path(f"/proc/{worker.pid}/status").read_text("utf-8")
        [line] = [line for line in status.splitlines() if line.startswith("VmRSS")]
        return float(line.split()[1]) * 1024


OWN: dict[str, dict[str, Any]] = {"deletions": {"grace_seconds": 0}}


def _columns(row: Row) -> dict[str, Any]:
    names = ("name", "api_url", "project_id", "secret_ref", "database_ref", "schema")
    return {name: getattr(row, name) for name in names}


@contextmanager
def _bench(databases: Databases) -> Iterator[Bench]:
    with ExitStack() as opened:
        control_url = opened.enter_context(databases.fresh())
        targets = [opened.enter_context(databases.fresh()) for _ in range(TARGETS)]
        apis = opened.enter_context(_apis())
        folder = Path(opened.enter_context(tempfile.TemporaryDirectory()))
        control = Control(control_url, Event())
        opened.callback(control.close)
        control.init()
        bench = Bench(apis, control_url, targets, control, folder)
        try:
            yield bench
        finally:
            for worker in bench.workers:
                worker.kill()
                worker.wait()
            for conn in bench.connections.values():
                conn.close()


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    """Measure all of it: several minutes."""
    projects = conditions.choose(30, 300)
    with _bench(databases) as bench:
        dice = random.Random(1)
        for number in range(projects):
            bench.add(5_000 if number % 30 == 29 else dice.randint(50, 500))
        for _ in range(3):
            bench.start()
        found = [Figure(f"{projects} projects, first loads", bench.await_all(), "s")]
        found += _freshness(bench, conditions.choose(20, 60))
        found += _killed(bench, conditions.choose(40, 180), dice)
        found.append(Figure("SIGTERM until the end of all workers", bench.stop(), "s", at_most=5))
    small, large = conditions.choose(20, 100), conditions.choose(60, 500)
    few, many = (measure_idle(databases, count) for count in (small, large))
    return found + idle_figures(few, many)


@dataclass(frozen=True, slots=True)
class Idle:
    """What one worker with so many projects costs while nothing changes."""

    projects: int
    memory: float
    statements: float
    connections: int
    worker_cpu: float
    control_cpu: float


def idle_figures(few: Idle, many: Idle) -> list[Figure]:
    """Compare two workers, one of which has more projects."""
    ratio = f"of {many.projects} projects to {few.projects}"
    memory = (many.memory - few.memory) / (many.projects - few.projects)
    return [
        Figure("statements on the control database per visit", many.statements, "", at_most=10),
        Figure(f"the same, {ratio}", many.statements / few.statements, "", at_most=1.15),
        Figure("processor of the worker per visit", many.worker_cpu * 1000, "ms"),
        Figure(f"the same, {ratio}", many.worker_cpu / few.worker_cpu, ""),
        Figure("processor of the control database per visit", many.control_cpu * 1000, "ms"),
        Figure(f"the same, {ratio}", many.control_cpu / few.control_cpu, ""),
        Figure("memory per idle project", memory / 1000, "kB"),
        Figure("connections to an idle target", many.connections, "", at_most=0),
    ]


def _freshness(bench: Bench, seconds: int) -> list[Figure]:
    """Sign up, and hint, in projects by chance, while nothing else goes on."""
    time.sleep(15)  # the means of requests settle, and the cycle with them
    dice, names = random.Random(2), list(bench.ids)
    bench.apis.do("asked")
    began = time.monotonic()
    pending: dict[str, tuple[str, float]] = {}
    fresh: list[float] = []
    edited: dict[str, tuple[str, float]] = {}
    hinted = set(dice.sample(names, len(names) // 3))
    while time.monotonic() - began < seconds:
        name = dice.choice(names)
        if name in hinted and name not in edited:
            user_id = bench.apis.do("edit", bench.ids[name], "hinted")
            edited[name] = user_id, time.time()
            with psycopg.connect(bench.url_of(name), autocommit=True) as conn:
                conn.execute(_LEAVE, (f"of_{name}", user_id))
            bench.control.hint(name)
        elif name not in hinted:
            pending[bench.apis.do("create", bench.ids[name])] = name, time.time()
        for _ in range(4):
            time.sleep(dice.uniform(0.02, 0.1))
            fresh += _arrived(bench, pending)
    [(cycle,)] = bench.query("select max(cycle_seconds) from users_sync_fleet.host")
    asked = bench.apis.do("asked")
    while pending:
        time.sleep(0.05)
        fresh += _arrived(bench, pending)
    delays = []
    for name, (user_id, at) in edited.items():
        [(_, updated)] = bench.rows(name, _CHANGED, [user_id])
        delays.append(updated - at)
    # Nor is any project visited more often than it asks for.
    every = max(1.0, cycle)
    projects, median = len(names), statistics.median(fresh)
    return [
        Figure("budget, requests a second", BUDGET),
        Figure("visits to each project, one every", every, "s"),
        Figure("sign-up to row: median", median, "s"),
        Figure("the same by half of that", median / (every / 2), "", at_most=1.3),
        Figure("sign-up to row: 95 of 100", statistics.quantiles(fresh, n=20)[-1], "s"),
        Figure("projects by budget", projects / BUDGET, "s"),
        Figure("hint to row: median", statistics.median(delays), "s", at_most=2),
        Figure("requests a second, mean", len(asked) / seconds, "", at_most=BUDGET),
        Figure(
            "requests in any ten seconds, a second", _most(asked, 10.0) / 10, "", at_most=BUDGET
        ),
        Figure("requests in any one second", _most(asked, 1.0), ""),
    ]


def _arrived(bench: Bench, pending: dict[str, tuple[str, float]]) -> list[float]:
    """Take out the users who are rows by now, and tell how long each of them took."""
    ids: dict[str, list[str]] = {}
    for user_id, (name, _) in pending.items():
        ids.setdefault(name, []).append(user_id)
    there = [row[0] for name, wanted in ids.items() for row in bench.rows(name, _PRESENT, wanted)]
    now = time.time()
    return [now - pending.pop(user_id)[1] for user_id in there]


def _most(at: Sequence[float], seconds: float) -> int:
    """Count the requests in the fullest stretch of so many seconds."""
    at, first, most = sorted(at), 0, 0
    for last, moment in enumerate(at):
        while at[first] <= moment - seconds:
            first += 1
        most = max(most, last - first + 1)
    return most


def _killed(bench: Bench, seconds: int, dice: random.Random) -> list[Figure]:
    """Kill one worker after the other while users come, change and go."""
    began, kills, again = time.monotonic(), 0, [0.0]
    waiting: dict[str, float] = {}
    names = list(bench.ids)
    while time.monotonic() - began < seconds or waiting:
        if time.monotonic() - began > kills * KILL_EVERY_SECONDS and (
            time.monotonic() - began < seconds
        ):
            victim = bench.workers.pop(0)
            victim.kill()
            victim.wait()
            [(now,)] = bench.query("select extract(epoch from clock_timestamp())::float")
            waiting.update((name, now) for name in names if name not in waiting)
            bench.start()
            kills += 1
        project_id = bench.ids[dice.choice(names)]
        order = dice.choice(["create", "edit", "delete"])
        bench.apis.do(order, project_id, *([str(kills)] if order == "edit" else []))
        for name, ended in bench.query(
            "select name, extract(epoch from ended_at)::float from users_sync_fleet.visit"
        ):
            if name in waiting and ended and ended > waiting[name]:
                again.append(ended - waiting.pop(name))
        time.sleep(0.2)
    until("all are in step", lambda: not bench.out_of_step(), PATIENCE_SECONDS, 5.0)
    return [
        Figure("workers killed", kills),
        Figure("kill until every project was visited again", max(again), "s", at_most=45),
        Figure("projects out of step in the end", len(bench.out_of_step()), "", at_most=0),
    ]


def measure_idle(databases: Databases, count: int) -> Idle:
    """Measure one worker with so many projects while nothing changes."""
    with _bench(databases) as bench:
        for _ in range(count):
            bench.add(5)
        worker = bench.start()
        bench.await_all()
        time.sleep(10)
        calls = "select xact_commit from pg_stat_database where datname = current_database()"
        visits = "select sum(n_tup_upd) from pg_stat_user_tables where relname = 'visit'"
        control = conninfo_to_dict(bench.control_url)["dbname"]

        def counted() -> list[float]:
            queried = [float(bench.query(each)[0][0]) for each in (calls, visits)]
            return [*queried, _cpu([worker.pid]), _cpu(_backends(str(control)))]

        before = counted()
        time.sleep(20)
        after = counted()
        connections = 0
        for url in bench.target_urls:
            with psycopg.connect(url) as conn:
                [(number,)] = conn.execute(
                    "select count(*) from pg_stat_activity where application_name = 'users-sync'"
                    " and datname = current_database()"
                ).fetchall()
                connections = max(connections, number)
        # Each visit updates its row twice.
        made = (after[1] - before[1]) / 2
        statements, _, worker_cpu, control_cpu = (
            (now - then) / made for now, then in zip(after, before, strict=True)
        )
        memory = bench.memory(worker)
        return Idle(count, memory, statements, connections, worker_cpu, control_cpu)


def _cpu(pids: Sequence[int]) -> float:
    """Add up the processor time of processes, in seconds."""
    ticks = 0
    for pid in pids:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _backends(database: str) -> list[int]:
    """Find the server's processes for one database, by their titles."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended just now
            title = path.read_bytes()
            if title.startswith(b"postgres:") and database.encode() in title:
                found.append(int(path.parent.name))
    return found
