"""The long-running worker: polls, sweeps, stands by, and outlives any outage of either side."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from threading import Event, Lock

import structlog

from worker.clock import Clock
from worker.errors import (
    DatabaseUnavailable,
    LeaseLost,
    MirrorOutdated,
    Misconfigured,
    Stopped,
    SweepIncomplete,
    UsersSyncError,
    told,
)
from worker.http_server import HttpServer
from worker.retry import Retry
from worker.service.endpoints import web_server
from worker.service.health import Health, State, health_of
from worker.service.leader import Leader
from worker.service.metrics import Metrics
from worker.service.outages import FIRST_PAUSE_SECONDS, Outages
from worker.service.ownership import another_project, bind_project, give_back, save
from worker.service.scheduler import Scheduler
from worker.service.telemetry import Telemetry
from worker.service.webhooks import DATABASE_SECONDS, WAITRESS, HintWriter, make_app
from worker.settings.settings import Settings
from worker.store import Store
from worker.store.database import Database
from worker.store.hints import Hints
from worker.sync.cache import Cache
from worker.sync.fetcher import Fetcher
from worker.wiring import open_store, opened_database, opened_fetcher

log = structlog.stdlib.get_logger(__name__)

BEAT_SECONDS = 1.0

# How often a worker that stands by looks for the lease.
LOOK_SECONDS = 1.0

# That these come round is no progress: keeping the lease is not what the worker is there for, and
# looking for hints that are not there is no work. What is written counts by itself.
IDLE_JOBS = ("renew", "hints")

# What only the leader does.
LEADER_JOBS = ("sweep", "poll", "hints", "activity", "renew")


Work = Callable[[], float | None]
"""One run of a job; returns the seconds until it is due again, or None."""


@dataclass(slots=True)
class Supervisor:
    """One worker for one target, until `stop` is set."""

    settings: Settings
    url: str
    stop: Event
    clock: Clock = field(default_factory=Clock)
    scheduler: Scheduler = field(default_factory=Scheduler)
    cache: Cache = field(default_factory=Cache)
    health: Health = field(init=False)
    metrics: Metrics = field(init=False)
    _outages: Outages = field(init=False)
    _telemetry: Telemetry = field(init=False)
    _store: Store = field(init=False)
    _fetcher: Fetcher = field(init=False)
    # True once it has led or stood by: from then on a configuration error is retried instead of
    # ending the process.
    _begun: bool = False
    _leader: Leader | None = None
    # How often the lease was lost: a job armed before that neither stands down again nor is armed
    # again.
    _tenure: int = 0
    _lock: Lock = field(default_factory=Lock)
    _fatal: Misconfigured | None = None
    _stalled: bool = False
    # Where webhooks are received, once they are.
    webhook_port: int | None = None

    def __post_init__(self) -> None:
        self.health = health_of(self.settings)
        self.metrics = Metrics(self.health.read)
        self._outages = Outages(self.health, self.metrics, self._sweep_soon)
        self._telemetry = Telemetry(self.health, self.metrics, self.cache, self.clock)

    def run(self) -> None:
        """Work until stopped. Raises Misconfigured if it cannot even begin."""
        with ExitStack() as opened:
            if self.settings.http.port:
                http = self.settings.http
                opened.enter_context(web_server(http.host, http.port, self.health, self.metrics))
            if self.settings.webhook.secrets:
                self.webhook_port = opened.enter_context(self._webhooks(opened)).port
            database = opened.enter_context(
                opened_database(self.settings, self.url, self.clock, self.stop, self._outages)
            )
            # Undone from the last to the first: the jobs end, then the API is closed and the lease
            # given back, then the database and the endpoints are closed.
            inner = opened.enter_context(ExitStack())
            opened.callback(self.scheduler.stop)
            self.scheduler.start()
            self._schedule("begin", partial(self._begin, inner, database), 0)
            while not self.stop.wait(BEAT_SECONDS):
                self._beat()
            self.health.enter("stopping")
            if not self.scheduler.stop():
                log.error("jobs.abandoned", jobs=self.scheduler.running())
                opened.pop_all()  # what they hold, such as a lock, would be waited for
            elif self._leader is not None and self._store.lease.held:
                save(self.cache, self._store)
        if self._fatal is not None:
            raise self._fatal

    def _webhooks(self, opened: ExitStack) -> HttpServer:
        """Receive webhooks, whether this worker leads or stands by."""
        settings, webhook = self.settings, self.settings.webhook
        retry = Retry("the database", 0, self.stop, DatabaseUnavailable)
        database = Database(self.url, self.clock, retry, DATABASE_SECONDS, names=settings.names)
        opened.callback(database.close)
        quiet = settings.database.quiet
        writer = HintWriter(database, Hints(settings.database.schema_name), quiet=quiet)

        def leave(user_id: str) -> None:
            writer.leave(user_id)
            # Followed at once, without waiting for the next look.
            with self._lock:
                if self._leader is not None:
                    self._schedule("hints", self._leader.hints, 0, keep_sooner=True)

        secrets = [secret.get_secret_value() for secret in webhook.secrets]
        app = make_app(secrets, leave, self.metrics.count_webhook)
        return HttpServer("webhook", webhook.host, webhook.port, app, options=WAITRESS)

    def _beat(self) -> None:
        """Look after the clock, and at whether the jobs get anywhere; once a second."""
        self.health.beat()
        self.scheduler.mind_the_clock()
        if self.scheduler.at_rest(*IDLE_JOBS):
            self.health.moved()
        stalled = self.health.stalled()
        if stalled and not self._stalled:
            log.error("worker.stalled", jobs=self.scheduler.running())
        self._stalled = stalled

    def _begin(self, inner: ExitStack, database: Database) -> None:
        """Look at the table and open the API; then wait for the lease."""
        self._store = open_store(self.settings, database)
        inner.callback(give_back, self._store.lease)
        self._fetcher = inner.enter_context(
            opened_fetcher(self.settings, self.clock, self.stop, self._store.lease, self._outages)
        )
        self._schedule("stand by", self._stand_by, 0)

    def _stand_by(self) -> float | None:
        """Take the lease if it is free, and begin to work; else look again soon."""
        lease = self._store.lease
        if not lease.acquire():
            status = lease.look()
            project = self.settings.stack.project_id
            if status is not None and status.project not in {None, project}:
                raise another_project(lease, status.project)
            self._enter("standing by")
            self._begun = True
            return LOOK_SECONDS
        bind_project(self._store, self._fetcher)
        self.cache.start(self._store)
        log.info("lease.acquired", target=lease.target)
        self._enter("quiet" if self.settings.database.quiet else "working")
        self.health.set_lease(True)
        self._leader = leader = Leader(
            self.settings,
            self._fetcher,
            self._store,
            self.cache,
            self._telemetry,
            wants_sweep=self._sweep_soon,
        )
        self._schedule("sweep", leader.sweep, 0)
        self._schedule("poll", leader.poll, 0)
        if self.settings.schedule.activity_seconds:
            self._schedule("activity", leader.activity, self.settings.schedule.activity_seconds)
        if not self.settings.database.quiet:
            self._schedule("hints", leader.hints, 0)
            self._schedule("renew", leader.renew, lease.seconds / 6)
        return None

    def _stand_down(self, tenure: int, error: LeaseLost) -> None:
        """Stop working and wait for the lease; of several jobs that find out, the first does it."""
        with self._lock:
            if tenure != self._tenure:
                return
            self._tenure += 1
            self._leader = None
        log.warning("lease.lost", error=str(error))
        self.health.set_lease(False)
        # Only the new leader reports these.
        self.health.set_deletions(held=0, candidates=0, oldest_candidate_since=None)
        self.health.set_quarantined(0)
        self.scheduler.cancel(*LEADER_JOBS)
        for name in LEADER_JOBS:
            self._outages.ended(name)
        self._schedule("stand by", self._stand_by, LOOK_SECONDS)

    def _sweep_soon(self) -> None:
        """Sweep as soon as the API has rested for what it did before.

        After an outage, because what changed meanwhile has waited long enough; and where there are
        too many hints to follow.
        """
        with self._lock:
            if self._leader is not None:
                self._leader.pace.hurry()
                self._schedule("sweep", self._leader.sweep, self._leader.pace.rest)

    def _enter(self, state: State) -> None:
        if self.health.read().state != state:
            self.health.enter(state)
            log.info("worker.entered", state=state)

    def _schedule(
        self, name: str, work: Work, seconds: float, *, keep_sooner: bool = False
    ) -> None:
        run = partial(self._run, name, work, self._tenure)
        self.scheduler.schedule(name, run, seconds, keep_sooner=keep_sooner)

    def _run(self, name: str, work: Work, tenure: int) -> None:
        """Run one job, act on its error, and schedule it again unless its lease is lost."""
        try:
            again = self._work(name, work)
        except Exception as error:  # noqa: BLE001  no error of a job may end its thread
            again = self._react(name, tenure, error)
        else:
            self._begun = self._begun or name in LEADER_JOBS
            self._outages.ended(name)
        finally:
            if name not in IDLE_JOBS:
                self.health.moved()
        # A lease that is lost after this cancels the job.
        with self._lock:
            if again is not None and tenure == self._tenure and not self.stop.is_set():
                # What was asked for meanwhile comes first.
                self._schedule(name, work, again, keep_sooner=True)

    def _work(self, name: str, work: Work) -> float | None:
        """Run one job; if the mirror turns out to be outdated, load it again and sweep soon."""
        generation = self.cache.generation
        try:
            return work()
        except MirrorOutdated:
            self.cache.reload(self._store, generation)
            if self._leader is not None and name in LEADER_JOBS:
                self._schedule("sweep", self._leader.sweep, 0)
            return FIRST_PAUSE_SECONDS
        finally:
            if self.settings.database.quiet and name in LEADER_JOBS:
                # Another job may still be at work: its next commit takes the lease again, and finds
                # out if anybody else wrote.
                self._store.lease.rest()

    def _react(self, name: str, tenure: int, error: Exception) -> float | None:
        """Do what an error of a job asks for; returns when to run the job again, if at all.

        | error | action |
        |---|---|
        | LeaseLost | stand by |
        | Stopped | nothing |
        | Misconfigured before it led or stood by | end the process |
        | Misconfigured later | not ready; retry |
        | other errors of ours | retry |
        | any other error | log it as a bug; retry |
        """
        match error:
            case LeaseLost():
                self._stand_down(tenure, error)
                return None
            case Stopped():
                return None
            case Misconfigured() if not self._begun:
                self._fatal = error
                self.stop.set()
                return None
            case UsersSyncError():
                return self._failed(name, error)
            case _:
                log.exception("job.failed", job=name)  # noqa: LOG004  it is being handled
                return self._failed(name, error)

    def _failed(self, name: str, error: Exception) -> float:
        """Note what goes wrong, and give the pause before the next attempt, which grows."""
        self._outages.began(name, told(error), fatal=isinstance(error, Misconfigured))
        pause, leader = self._outages.next_pause(name), self._leader
        if leader is None:
            return pause
        if isinstance(error, SweepIncomplete):
            return max(pause, leader.pace.pause)
        # However it failed, it was work for the API's server.
        return max(pause, leader.pace.rest) if name == "sweep" else pause
