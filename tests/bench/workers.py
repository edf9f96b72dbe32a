"""The worker as it is measured: one sweep, sweep after sweep, or a process of its own."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import Any

from tests.bench.api import RemoteApi
from tests.support.waiting import PATIENCE_SECONDS, until
from worker.clock import Clock
from worker.errors import SourceUnavailable
from worker.model import Page, Single
from worker.retry import Retry
from worker.service.once import sweep_once
from worker.service.ownership import bind_project
from worker.settings.settings import Settings
from worker.stack_auth.client import StackApi
from worker.store import Store
from worker.sync.cache import Cache
from worker.sync.fetcher import Fetcher
from worker.sync.page_size import PageSize
from worker.sync.sweep import Report, Sweep
from worker.wiring import access, deletion_policy, open_store, opened_database, opened_fetcher

# Sweeps one after another: what is measured is the work, not the pause.
EAGER = {"USERS_SYNC_SCHEDULE__SWEEP_SECONDS": "0.1", "USERS_SYNC_SCHEDULE__SWEEP_SHARE": "1"}

JSON = ("--log-format", "json")
NOTHING: Mapping[str, str] = {}

# A million users on a slow machine.
MOST_SECONDS = 1_800.0


class Nobody:
    """Watches nothing; that there is a watch makes it a long-running worker."""

    def failed(self, service: str, error: str) -> None: ...

    def succeeded(self, service: str) -> None: ...

    def answered(self, status: str, seconds: float) -> None: ...

    def took(self, service: str, seconds: float) -> None: ...

    def moved(self) -> None: ...

    def stalled(self) -> bool:
        return False


def settings(api: RemoteApi, page_size: int = 1_000) -> Settings:
    return Settings.model_validate(
        {
            "stack": {
                "api_url": api.url,
                "project_id": api.project_id,
                "secret_server_key": api.secret_server_key,
                "page_size": page_size,
            },
            "deletions": {"grace_seconds": 0},
        }
    )


def once(api: RemoteApi, url: str, page_size: int = 1_000) -> Report:
    """Sweep as `--once` does."""
    return sweep_once(settings(api, page_size), url, Event(), lambda _: None)


@dataclass(frozen=True, slots=True)
class Warm:
    """A long-running worker whose mirror knows everybody."""

    fetcher: Fetcher
    store: Store
    cache: Cache
    settings: Settings

    def sweep(self, *, leaves_row: bool = True) -> Report:
        chosen = deletion_policy(self.settings)
        return Sweep(
            self.fetcher, self.store, self.cache, chosen, lambda _: None, leaves_row=leaves_row
        ).run()


@contextmanager
def warmed(api: RemoteApi, url: str, page_size: int = 1_000) -> Iterator[Warm]:
    """Open a worker that has swept once."""
    chosen, clock, stop = settings(api, page_size), Clock(), Event()
    with ExitStack() as opened:
        database = opened.enter_context(opened_database(chosen, url, clock, stop, Nobody()))
        store = open_store(chosen, database)
        fetcher = opened.enter_context(opened_fetcher(chosen, clock, stop, store.lease, Nobody()))
        store.lease.acquire()
        bind_project(store, fetcher)
        cache = Cache()
        cache.load(store)
        warm = Warm(fetcher, store, cache, chosen)
        warm.sweep()
        yield warm


class Replayed:
    """The users API from memory: pages that were read before, one after another."""

    def __init__(self, pages: Sequence[Page], clock: Clock) -> None:
        self._pages = iter(pages)
        self._clock = clock

    def fetch_page(
        self,
        cursor: str | None,  # noqa: ARG002
        limit: int,  # noqa: ARG002
        *,
        newest_first: bool = False,  # noqa: ARG002
    ) -> Page:
        return replace(next(self._pages), observed_at=self._clock.now())

    def fetch_user(self, user_id: str) -> Single:
        raise NotImplementedError

    def fetch_active(self, limit: int) -> Page:
        raise NotImplementedError

    def create_user(self, fields: Mapping[str, Any]) -> str:
        raise NotImplementedError


def read_ahead(api: RemoteApi, limit: int) -> list[Page]:
    """Read all pages as the worker reads them."""
    pages: list[Page] = []
    with StackApi(access(settings(api)), clock=Clock(), stop=Event()) as stack:
        while not pages or pages[-1].next_cursor is not None:
            cursor = pages[-1].places[-2].id if pages else None
            pages.append(stack.fetch_page(cursor, limit))
    return pages


def apply_alone(api: RemoteApi, url: str, pages: Sequence[Page]) -> Report:
    """Sweep as `--once` does, but without an API: all pages are there already."""
    chosen, clock, stop = settings(api), Clock(), Event()
    with opened_database(chosen, url, clock, stop) as database:
        store = open_store(chosen, database)
        store.lease.acquire()
        store.lease.bind()
        fetcher = Fetcher(
            Replayed(pages, clock),
            Retry("memory", 0, stop, SourceUnavailable),
            page_size=PageSize(len(pages[0].users)),
            lease=store.lease,
        )
        cache = Cache()
        cache.load(store)
        try:
            return Sweep(fetcher, store, cache, deletion_policy(chosen), lambda _: None).run()
        finally:
            fetcher.close()


@dataclass(frozen=True, slots=True)
class Process:
    """`users-sync run` in a process of its own."""

    running: subprocess.Popen[bytes]
    log: Path

    def sweeps(self) -> list[dict[str, Any]]:
        lines = self.log.read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines if '"sweep.finished"' in line]

    def wait_for_sweeps(self, count: int) -> list[dict[str, Any]]:
        """Give the log lines of its sweeps, as soon as there are so many."""
        until(f"{count} sweeps are done", lambda: self._has_swept(count), MOST_SECONDS, 0.1)
        return self.sweeps()

    def _has_swept(self, count: int) -> bool:
        if self.running.poll() is not None:
            raise RuntimeError(f"the worker has ended: {self.log.read_text('utf-8')[-2000:]}")
        return len(self.sweeps()) >= count

    def processor_seconds(self) -> float:
        """Give the processor time it has taken, in steps of some 10 ms."""
        fields = (
            Path(f"/proc/{self.running.pid}/stat").read_text("utf-8").rpartition(")")[2].split()
        )
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory(self, what: str) -> float:
        """Give resident memory in MB: `VmRSS` now, or `VmHWM` at its highest."""
        status = Path(f"/proc/{self.running.pid}/status").read_text("utf-8")
        return next(int(line.split()[1]) for line in status.splitlines() if what in line) / 1024


@contextmanager
def running(
    api: RemoteApi, url: str, variables: Mapping[str, str] = NOTHING, *, once: bool = False
) -> Iterator[Process]:
    # Nothing else is inherited: how this machine's own workers are set up is none of its business.
    inherited = {name: os.environ[name] for name in ("PATH", "TMPDIR") if name in os.environ}
    environ = {
        **inherited,
        "PYTHONPATH": str(Path(__file__).parents[2]),
        "STACK_API_URL": api.url,
        "STACK_PROJECT_ID": api.project_id,
        "STACK_SECRET_SERVER_KEY": api.secret_server_key,
        "DATABASE_URL": url,
        "USERS_SYNC_HTTP__PORT": "0",
        **variables,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "log"
        with path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "worker", *(["--once"] if once else []), *JSON],
                env=environ,
                cwd=folder,
                stdout=log,
                stderr=log,
            )
            try:
                yield Process(process, path)
            finally:
                process.terminate()
                try:
                    process.wait(PATIENCE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    raise
