"""One project in the memory of a worker, and what a visit to it does."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from threading import Event, Lock
from typing import Any

import httpx
import structlog

from worker.clock import Clock
from worker.errors import (
    DatabaseUnavailable,
    LeaseLost,
    MirrorOutdated,
    Misconfigured,
    SourceUnavailable,
    Stopped,
    UsersSyncError,
    told,
)
from worker.fleet.projects import Project, host_of
from worker.retry import Retry
from worker.service.health import Health, health_of
from worker.service.leader import Leader
from worker.service.metrics import Metrics
from worker.service.ownership import another_project, bind_project, give_back
from worker.service.telemetry import Telemetry
from worker.settings.settings import Settings
from worker.stack_auth.client import StackApi
from worker.store import Store
from worker.store.database import Database
from worker.store.lease import Lease
from worker.sync.api_time import Purpose
from worker.sync.cache import Cache
from worker.sync.fetcher import Fetcher
from worker.sync.page_size import PageSize
from worker.wiring import access, open_store

log = structlog.stdlib.get_logger(__name__)

# A visit holds up others, so what fails is tried again in the next one, and not for long in this.
RETRY_MINUTES = 0.05

FIRST_PAUSE_SECONDS = 2.0
LONGEST_PAUSE_SECONDS = 300.0
MOST_DOUBLINGS = 8
# How often to look whether another worker still has the lease.
STANDBY_SECONDS = 10.0
LEAST_STANDBY_SECONDS = 0.5

# Measured in docs/fleet.md: what a project takes in memory that has no users, and a user more.
SITE_BYTES = 35_000
USER_BYTES = 80


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a visit ended, as `end_visit` takes it, and the least seconds until the next one."""

    outcome: str
    pause: float
    error: str | None = None
    fatal: bool = False


@dataclass(slots=True)
class Site:
    """What is kept of a project between two visits: the mirror, the lease's numbers, the pace.

    `settings` are those of `resolved`. There is a connection to the database during a visit alone.
    `take_turn` waits for the budget; `transport` is shared by all projects of an API host.
    """

    project: Project
    settings: Settings
    metrics: Metrics
    take_turn: Callable[[Purpose, Event], object]
    # The name of the worker, and which others of the fleet are dead: their leases are not awaited.
    worker: str
    is_dead: Callable[[str], bool]
    transport: httpx.BaseTransport | None = None
    # Set at the end of a visit's time, and cleared for the next one; `ending` is for good.
    stop: Event = field(default_factory=Event)
    ending: Event = field(default_factory=Event)
    visiting: Lock = field(default_factory=Lock)
    clock: Clock = field(default_factory=Clock)
    cache: Cache = field(default_factory=Cache)
    health: Health = field(init=False)
    requests: int = 0
    hints_left: bool = False
    # It failed in a way after which it must be made again as a whole.
    broken: bool = False
    _answers: int = 0
    _users_asked: int = 0
    _standby: float = LEAST_STANDBY_SECONDS
    _database: Database = field(init=False)
    _fetcher: Fetcher | None = None
    _leader: Leader | None = None
    _store: Store | None = None
    _activity_at: float = 0.0
    _activity_pause: float | None = 0.0

    def __post_init__(self) -> None:
        settings = self.settings
        self.health = health_of(settings, kept_sweeps=1)
        retry = Retry("the database", RETRY_MINUTES, self.stop, DatabaseUnavailable)
        url = settings.require_database().get_secret_value()
        seconds = settings.database.lease_seconds
        self._database = Database(url, self.clock, retry, seconds, names=settings.names)

    @property
    def database_host(self) -> str:
        return host_of(self.settings.require_database().get_secret_value())

    @property
    def bytes(self) -> int:
        """About how much memory it takes."""
        return SITE_BYTES + USER_BYTES * len(self.cache.mirror)

    @property
    def may_be_cut(self) -> bool:
        """Whether this visit may be stopped: the next one goes on, or leaves checkpoints to do so.

        Proofs are worth nothing by halves: they would have to be asked for again, visit after
        visit. There are at most `deletions.max_count` of them.
        """
        return self._fetcher is None or self._fetcher.users_asked == self._users_asked

    def visit(self, *, hinted: bool, failures: int) -> Outcome:
        """Visit the project once, until done or `stop` is set; never raises.

        `failures` is how many visits before this one failed in a row.
        """
        self.requests = self._answers = 0
        try:
            pause = self._visit(hinted=hinted or self.project.looks_for_hints)
        except Exception as error:  # noqa: BLE001  no error of one project may end the worker
            return self._failed(error, failures)
        finally:
            self._rest()
        return Outcome("done", pause)

    def found(self, outcome: Outcome) -> Mapping[str, Any]:
        """Say what is known of the project after a visit, for the control database."""
        seen = self.health.read()
        known = {} if seen.users is None else {"users": seen.users, "held": seen.held}
        return {
            "outcome": outcome.outcome,
            "error": outcome.error,
            "fatal": outcome.fatal,
            "fresh": outcome.outcome == "done",
            "swept_ago": seen.seconds_since_sweep,
            **known,
            "candidates": seen.candidates,
            "quarantined": seen.quarantined,
            "requests": self.requests,
            "database_host": self.database_host,
            "hints_left": self.hints_left,
        }

    def _visit(self, *, hinted: bool) -> float:
        fetcher = self._opened_fetcher()
        with fetcher.one_by_one():
            leader = self._leader or self._lead(fetcher)
            generation = self.cache.generation
            try:
                return self._work(leader, hinted=hinted)
            except MirrorOutdated:
                self.cache.reload(leader.store, generation)
                leader.pace.hurry()
                return self._work(leader, hinted=hinted)

    def _work(self, leader: Leader, *, hinted: bool) -> float:
        """Follow hints, look at the newest users, and sweep if that is due."""
        schedule = self.settings.schedule
        self._users_asked = leader.fetcher.users_asked
        if hinted:
            leader.hints()
            self._users_asked = leader.fetcher.users_asked
        due = leader.cut or leader.pace.pause <= 0
        pause = schedule.poll_seconds
        # A sweep over one page is a poll as well.
        if not (due and leader.warm and len(self.cache.mirror) < schedule.poll_page_size):
            pause = max(pause, leader.poll())
        if due:
            leader.sweep()
        self._look_at_active(leader)
        self.hints_left = leader.hints_wait
        return pause

    def _look_at_active(self, leader: Leader) -> None:
        pause, now = self._activity_pause, self.clock.monotonic()
        if not self.settings.schedule.activity_seconds or pause is None:
            return
        if now - self._activity_at >= pause:
            self._activity_at, self._activity_pause = now, leader.activity()

    def _lead(self, fetcher: Fetcher) -> Leader:
        """Look at the table, take the lease and load the mirror. Raises LeaseLost."""
        store = self._store = self._store or self._opened_store()
        lease = store.lease
        if not lease.acquire() and not self._take_from_the_dead(lease):
            status = lease.look()
            if status is not None and status.project not in {None, self.project.project_id}:
                raise another_project(lease, status.project)
            # A dead worker's lease runs out; a live one's is renewed before.
            remaining = STANDBY_SECONDS if status is None else status.remaining
            self._standby = min(STANDBY_SECONDS, remaining + LEAST_STANDBY_SECONDS)
            raise LeaseLost(f"another worker is at work on {lease.target}")
        bind_project(store, fetcher)
        self.cache.start(store)
        telemetry = Telemetry(self.health, self.metrics, self.cache, self.clock)
        self._leader = Leader(
            self.settings,
            fetcher,
            store,
            self.cache,
            telemetry,
            wants_sweep=self._sweep_soon,
        )
        return self._leader

    def _take_from_the_dead(self, lease: Lease) -> bool:
        status = lease.look()
        holder = None if status is None else status.holder
        return holder is not None and self.is_dead(holder) and lease.acquire(dead=holder)

    def _sweep_soon(self) -> None:
        if self._leader is not None:
            self._leader.pace.hurry()

    def _opened_store(self) -> Store:
        return open_store(self.settings, self._database, self.worker)

    def _opened_fetcher(self) -> Fetcher:
        """Make the way to the API; until the store is there, no lease has to be kept alive."""
        if self._fetcher is None:
            if self._store is None:
                self._store = self._opened_store()
            api = StackApi(
                access(self.settings), clock=self.clock, stop=self.stop, transport=self.transport
            )
            api.on_answer = self._answered
            self._fetcher = Fetcher(
                api,
                Retry("Stack Auth", RETRY_MINUTES, self.stop, SourceUnavailable),
                page_size=PageSize(self.settings.stack.page_size),
                lease=self._store.lease,
                take_turn=self._take_turn,
            )
        return self._fetcher

    def _take_turn(self, purpose: Purpose) -> None:
        self.take_turn(purpose, self.stop)
        self.requests += 1

    def _answered(self, status: str, seconds: float) -> None:
        self.metrics.count_request(status, seconds)
        self._answers += status.isdigit()

    def _rest(self) -> None:
        """Give back the lease and the connection."""
        if self._store is not None and self._store.lease.held:
            give_back(self._store.lease)
        with suppress(UsersSyncError):
            self._database.close()

    def _failed(self, error: Exception, failures: int) -> Outcome:
        """Say what an error means for the next visit.

        | error | next visit |
        |---|---|
        | Stopped as the worker is | at once, elsewhere |
        | Stopped after an answer | at once: the visit was long enough |
        | LeaseLost | soon: another worker writes |
        | other errors | after a pause that doubles |
        """
        match error:
            case Stopped() if self.ending.is_set():
                return Outcome("stopped", 0.0)
            case Stopped() if self._answers:
                return Outcome("cut", 0.0)
            case Stopped():
                error = SourceUnavailable(f"{self.project.api_host} did not answer in this visit")
            case LeaseLost():
                self._leader = None
                log.info("visit.waits", error=str(error))
                return Outcome("standing by", self._standby)
            case UsersSyncError():
                pass
            case _:
                log.exception("visit.broken")  # noqa: LOG004  it is being handled
        fatal = isinstance(error, Misconfigured)
        # A person may have changed what the references lead to.
        self.broken = fatal or not isinstance(error, UsersSyncError)
        pause = FIRST_PAUSE_SECONDS * 2 ** min(failures, MOST_DOUBLINGS)
        tell = log.debug if failures else log.warning
        tell("visit.failed", error=told(error))
        return Outcome("failed", min(pause, LONGEST_PAUSE_SECONDS), told(error), fatal)
