"""A worker whose every step is the test's: it rests whenever it awaits an answer of the API."""

from collections.abc import Callable
from contextlib import ExitStack

import httpx
import pytest

from tests.faults.proxy import Proxy, opened_proxy
from tests.faults.request_gate import PATIENCE_SECONDS, Gate, Job, Said, WatchedFetcher
from tests.faults.site import Impatient, Manner, Silent, Site
from tests.support.sweep_world import API_URL, nothing
from worker.clock import Clock
from worker.errors import LeaseLost, MirrorOutdated, SourceUnavailable, UsersSyncError
from worker.retry import Retry
from worker.service.health import Health
from worker.service.leader import Leader
from worker.service.metrics import Metrics
from worker.service.ownership import give_back, save
from worker.service.telemetry import Telemetry
from worker.stack_auth.client import StackApi
from worker.store import Store
from worker.sync.cache import Cache
from worker.sync.page_size import PageSize
from worker.sync.sweep import Sweep
from worker.wiring import access, deletion_policy, open_store, opened_database


class Worker:
    """One worker, as a process would be: what it holds in memory dies with it.

    `over` says that the process has ended, `duty` is there while a long-running one holds the
    lease, `completed` counts sweeps that came to their end. `says` is what the newest poll heard,
    `accepted` what it has dealt with. `told` is called, from any thread, with what is worth
    knowing.
    """

    def __init__(self, site: Site, manner: Manner, told: Callable[[str], None]) -> None:
        self.manner = manner
        self.over = False
        self.completed = 0
        self.says: list[Said] = []
        self.accepted: list[Said] = []
        self.jobs: dict[str, Job] = {}
        self.cache = Cache()
        self.leader: Leader | None = None
        self._site = site
        self._told = told
        self._ready = self._closed = False
        self._settings = site.settings(manner)
        self._opened = ExitStack()
        self._stop = Impatient()
        self._clock = Clock(site.monotonic)
        self.gate = Gate(httpx.WSGITransport(site.api))
        self.proxy: Proxy = self._opened.enter_context(opened_proxy(site.url))
        self.proxy.on_stall = self._notify
        watch = Silent() if manner.lasts else None
        self._database = self._opened.enter_context(
            opened_database(self._settings, self.proxy.url, self._clock, self._stop, watch)
        )
        self._store: Store
        self._fetcher: WatchedFetcher

    def __str__(self) -> str:
        jobs = ", ".join(str(job.name) for job in self.at_work) or "idle"
        return f"{self.manner.value} ({jobs})"

    @property
    def frozen(self) -> bool:
        """Whether it is stopped in the middle of a job, as a process is by a signal."""
        return self.proxy.stalled

    def thaw(self) -> None:
        """Let it go on where it was stopped."""
        self.proxy.go_on()
        self.settle()

    @property
    def at_work(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.ended]

    def can(self, name: str) -> bool:
        """Whether it may begin this now: `stand by`, `sweep`, `poll`, `hints` or `renew`."""
        if (
            self.over
            or self.frozen
            or not self._ready
            or name in {job.name for job in self.at_work}
        ):
            return False
        if name == "stand by":
            return self.manner.lasts and self.leader is None
        if name == "sweep" and any(job.name == "poll" for job in self.at_work):
            return False  # a poll that sees the whole list is a sweep, and would be waited for
        return self.leader is not None or (name == "sweep" and not self.manner.lasts)

    def begin(self, name: str) -> None:
        """Begin a job, which goes on until it can do no more without an answer.

        The first of all is to `begin`: to look at the table, and for the lease.
        """
        leader = self.leader
        match name, leader:
            case "begin", _:
                self._begin(name, self._open)
            case "stand by", _:
                self._begin(name, self._stand_by)
            case "sweep", None:
                self._begin(name, self._sweep_once)
            case "sweep", Leader():
                self._begin(name, lambda: self._attend(lambda: self._sweep(leader)))
            case "poll", Leader():
                self._begin(name, lambda: self._attend(lambda: self._poll(leader)))
            case "hints", Leader():
                self._begin(name, lambda: self._attend(lambda: self._follow_hints(leader)))
            case "renew", Leader():
                self._begin(name, lambda: self._attend(leader.renew))

    def settle(self) -> None:
        """Wait until it can do no more without an answer. Raises what is no error of ours."""
        with self.gate.changed:
            rested = self.gate.changed.wait_for(self._rests, PATIENCE_SECONDS)
        if not rested:
            pytest.fail(f"a worker neither ends nor asks: {self}, {self.gate.waiting}")
        for job in self.jobs.values():
            if job.is_bug and job.error:
                raise job.error
        if self.over:
            self._close()

    def stop(self, *, cut_off: bool = False) -> None:
        """Ask it to end, as a signal does, and wait until it has; it may be cut off just then."""
        self._stop.set()
        if cut_off:
            self.proxy.sever()
        self.proxy.go_on()
        self.gate.break_off()
        self.settle()
        if not self.over and self._ready:
            give_back(self._store.lease)
        self.over = True
        self.settle()

    def die(self) -> None:
        """End it as a power cut does: from now on nothing of it reaches the database."""
        if self._closed:
            return
        self.proxy.die()
        try:
            self.stop()
        finally:
            self._close()

    def _rests(self) -> bool:
        asks = not hasattr(self, "_fetcher") or self._fetcher.rests
        return asks and (self.frozen or all(job.rests for job in self.jobs.values()))

    def _notify(self) -> None:
        with self.gate.changed:
            self.gate.changed.notify_all()

    def _begin(self, name: str, work: Callable[[], object]) -> None:
        job = Job(name, lambda: self._minding_errors(name, work), self.gate.changed)
        self.jobs[name] = job
        job.start()
        self.settle()

    def _minding_errors(self, name: str, work: Callable[[], object]) -> None:
        try:
            work()
        except UsersSyncError as error:
            self._told(f"{name}: {type(error).__name__}")
            if isinstance(error, LeaseLost):
                self.leader = None
            self.over = self.over or name == "begin" or not self.manner.lasts
            raise

    def _open(self) -> None:
        self._store = open_store(self._settings, self._database)
        minutes = self._settings.stack.retry_minutes
        watch = Silent() if self.manner.lasts else None
        api = self._opened.enter_context(
            StackApi(
                access(self._settings), clock=self._clock, stop=self._stop, transport=self.gate
            )
        )
        if self.manner.lasts:
            minutes = float("inf")
        self._fetcher = WatchedFetcher(
            self.gate,
            api,
            Retry("Stack Auth", minutes, self._stop, SourceUnavailable, watch),
            page_size=PageSize(self._settings.stack.page_size),
            lease=self._store.lease,
        )
        self._opened.callback(self._fetcher.close)
        self._stand_by()
        self._ready = True

    def _stand_by(self) -> None:
        """Take the lease if it is free; `--once` looks only once, and ends."""
        if not self._store.lease.acquire():
            self._told("lease: not free")
            self.over = not self.manner.lasts
            return
        self._told("lease: taken")
        self.cache.start(self._store)
        if self.manner.lasts:
            self.leader = Leader(
                self._settings, self._fetcher, self._store, self.cache, self._telemetry()
            )

    def _telemetry(self) -> Telemetry:
        health = Health(target="neon_auth", api_host=API_URL, sweep_seconds=60)
        return Telemetry(health, Metrics(health.read), self.cache, self._clock)

    def _sweep_once(self) -> None:
        minutes = self._settings.schedule.resume_minutes
        sweep = Sweep(
            self._fetcher,
            self._store,
            self.cache,
            deletion_policy(self._settings),
            nothing,
            minutes,
        )
        try:
            self._told(f"sweep: {sweep.run().outcome}")
            self.completed += 1
            save(self.cache, self._store)
        finally:
            self._stop.set()
            give_back(self._store.lease)
            self.over = True

    def _sweep(self, leader: Leader) -> None:
        leader.sweep()
        self._told("sweep: complete")
        self.completed += 1

    def _poll(self, leader: Leader) -> None:
        self.says.clear()
        leader.poll()
        self._told("poll: complete")
        self.accepted += self.says

    def _follow_hints(self, leader: Leader) -> None:
        leader.hints()
        self._told("hints: followed")

    def _attend(self, work: Callable[[], object]) -> None:
        """Do a job of the long-running worker, with a mirror that is made true where it is not."""
        generation = self.cache.generation
        try:
            work()
        except MirrorOutdated:
            self._told("mirror: outdated")
            self.cache.reload(self._store, generation)
        finally:
            if self.manner is Manner.QUIET:
                self._store.lease.rest()

    def _close(self) -> None:
        """Let go of everything, once all threads are done."""
        self._stop.set()
        self.gate.break_off()
        for job in self.jobs.values():
            job.join(PATIENCE_SECONDS)
        self._opened.close()
        self._closed = True
