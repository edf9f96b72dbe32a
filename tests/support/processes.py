"""The command as a user starts it: a process of its own, in an environment of its own."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from threading import Event
from typing import Any

import psycopg
import pytest

import worker
from tests.support.forked import run_command
from tests.support.users_apis import api_of
from worker.sandbox.api import FakeStackApi, Project, Reply, Request, serve

# Much longer than anything takes that does not hang.
PATIENCE_SECONDS = 30

# Forks each process from one that has imported everything, and has no threads.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.support.forked"])


@dataclass(frozen=True)
class Ended:
    """What a process left behind."""

    code: int
    stdout: str
    stderr: str

    @property
    def log(self) -> list[dict[str, Any]]:
        """Read stdout as what it is to be: one JSON object a line, and nothing else."""
        return [json.loads(line) for line in self.stdout.splitlines()]

    def event(self, name: str) -> dict[str, Any]:
        """Return the only log line of this event."""
        [line] = [line for line in self.log if line["event"] == name]
        return line


@dataclass(frozen=True)
class Running:
    """A process at work; what it prints goes to files, so that it never waits for a reader."""

    process: ForkServerProcess
    stdout: Path
    stderr: Path

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid
        os.kill(self.process.pid, number)

    def end(self) -> Ended:
        """Wait until it ends by itself."""
        self.process.join(PATIENCE_SECONDS)
        code = self.process.exitcode
        if code is None:
            pytest.fail("the process does not end")
        return Ended(code, self.stdout.read_text("utf-8"), self.stderr.read_text("utf-8"))


@dataclass(frozen=True)
class Shell:
    """A folder and the variables of an environment, in which processes are started."""

    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    _started: ExitStack = field(default_factory=ExitStack)
    _numbers: Iterator[int] = field(default_factory=count)

    def having(self, **variables: str) -> "Shell":
        """Return the same shell with more variables; an empty one counts as not set."""
        return Shell(self.folder, {**self.variables, **variables}, self._started, self._numbers)

    def environ(self) -> dict[str, str]:
        # Nothing else is inherited: what the machine is set up for is none of the tests' business.
        inherited = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
        source = str(Path(worker.__file__).parent.parent)
        return {**inherited, "PYTHONPATH": source, "PYTHONWARNINGS": "error", **self.variables}

    def start(self, *arguments: str) -> Running:
        number = next(self._numbers)
        stdout, stderr = (self.folder / f"{number}.{name}" for name in ("stdout", "stderr"))
        for printed in (stdout, stderr):
            printed.touch()
        how = (arguments, self.folder, self.environ(), stdout, stderr)
        process = FORKS.Process(target=run_command, args=how)
        process.start()
        self._started.callback(process.join)
        self._started.callback(process.kill)
        return Running(process, stdout, stderr)

    def run(self, *arguments: str) -> Ended:
        return self.start(*arguments).end()

    def close(self) -> None:
        """End what is still at work, stopped or not."""
        self._started.close()


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "worker", *arguments]


@dataclass(frozen=True)
class Site:
    """A fake Stack Auth API, an empty database, and a shell that is set up for both."""

    project: Project
    api: FakeStackApi
    shell: Shell
    database_url: str

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        with psycopg.connect(self.database_url) as conn:
            return conn.execute(query.encode()).fetchall()

    def execute(self, query: str) -> None:
        with psycopg.connect(self.database_url) as conn:
            conn.execute(query.encode())

    def pages_asked(self) -> list[Request]:
        return [request for request in self.api.requests if request.path == "/api/v1/users"]


@contextmanager
def opened_site(database_url: str, folder: Path, users_api: str = "today") -> Iterator[Site]:
    project = Project()
    api = api_of(project, users_api)
    with serve(api) as api_url:
        shell = Shell(
            folder,
            {
                "STACK_API_URL": api_url,
                "STACK_PROJECT_ID": project.project_id,
                "STACK_SECRET_SERVER_KEY": project.secret_server_key,
                "DATABASE_URL": database_url,
                "USERS_SYNC_DELETIONS__GRACE_SECONDS": "0",
                # The one of the default may be taken, by whatever else is at work here.
                "USERS_SYNC_HTTP__PORT": "0",
            },
        )
        try:
            yield Site(project, api, shell, database_url)
        finally:
            api.on_request(None)
            shell.close()


@contextmanager
def kept_waiting(api: FakeStackApi, page: int) -> Iterator[Event]:
    """Let the list answer only up to `page` requests from now on, until the event is set."""
    go_on = Event()
    pages = count(1)

    def wait(request: Request) -> Reply | None:
        if request.path == "/api/v1/users" and next(pages) >= page:
            go_on.wait(PATIENCE_SECONDS)
        return None

    api.on_request(wait)
    try:
        yield go_on
    finally:
        go_on.set()
        api.on_request(None)
