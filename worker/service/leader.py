"""What the leader does again and again: polls, sweeps, audits, hints, and active users."""

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from threading import Lock

import structlog

from worker.errors import Blocked, LeaseLost, OrderRefused, Stopped
from worker.model import Users
from worker.service.ownership import save
from worker.service.pace import LONGEST_POLL_REST_SECONDS, Pace, rest_after
from worker.service.telemetry import Telemetry
from worker.settings.settings import Settings
from worker.store import Store
from worker.sync.api_time import Purpose
from worker.sync.apply import PageApplier
from worker.sync.cache import Cache
from worker.sync.fetcher import Fetcher
from worker.sync.hints import HintFollower
from worker.sync.poll import Poll
from worker.sync.state import beside_sweeps
from worker.sync.sweep import Report, Sweep
from worker.wiring import deletion_policy

log = structlog.stdlib.get_logger(__name__)

# Half of this is how long a hint waits on average; looking costs a statement on an empty table.
HINT_SECONDS = 0.7

# How soon to look again where another job is following hints.
BUSY_SECONDS = 0.2

# The newest page of the users by activity.
ACTIVE_USERS = 200

SECONDS_PER_HOUR = 3600.0
SECONDS_PER_MINUTE = 60.0


@dataclass(slots=True)
class Leader:
    """The work under one lease, from when it was taken until it is lost.

    Each of its jobs returns the seconds until it is due again. `warm` says that a sweep was
    complete; before that, an unfinished one is resumed.
    """

    settings: Settings
    fetcher: Fetcher
    store: Store
    cache: Cache
    telemetry: Telemetry
    # Called to begin a sweep as soon as the API has rested.
    wants_sweep: Callable[[], None] = lambda: None
    warm: bool = False
    # A sweep was cut short by a stop: the next one goes on from its checkpoint.
    cut: bool = False
    pace: Pace = field(init=False)
    _follower: HintFollower = field(init=False)
    _following: Lock = field(default_factory=Lock)
    # A sweep failed, perhaps before this process began, and may have left a row that says so: the
    # next one leaves its row, too.
    _failed: bool = True
    # A walk leaves no checkpoint on its way down. Cut there visit after visit, it would never end.
    _outwards: bool = True
    _audited_at: float = 0.0
    _counted_at: float = 0.0
    _saved_at: float = float("-inf")
    _sweeping: Lock = field(default_factory=Lock)

    def __post_init__(self) -> None:
        schedule = self.settings.schedule
        self.pace = Pace(schedule.sweep_seconds, schedule.sweep_share, self._monotonic)
        self._audited_at = self._counted_at = self._monotonic()
        self._follower = HintFollower(
            self.fetcher,
            self.store,
            self.cache,
            deletion_policy(self.settings),
            wants_sweep=self.wants_sweep,
            on_followed=self.telemetry.metrics.observe_hint,
        )
        self.cache.on_inserted = self._inserted
        self.cache.on_replaced = self.telemetry.health.table_replaced

    def poll(self) -> float:
        """Look at the newest users, or at all of them where that is no more."""
        schedule = self.settings.schedule
        began, at = self._monotonic(), self._now()
        small = self.warm and len(self.cache.mirror) < schedule.poll_page_size
        # A sweep under way is not waited for: the newest users are looked at beside it.
        if small and self._sweeping.acquire(blocking=False):
            try:
                worked = self._worked("sweep", lambda: self._swept("poll"))
            finally:
                self._sweeping.release()
        else:
            worked = self._worked("poll", self._poll_newest)
        seconds = self._monotonic() - began
        self.store.lease.note_poll(at)
        self.telemetry.metrics.observe_poll(seconds)
        self._recount()
        self._follow_while_awake()
        rest = min(rest_after(worked, schedule.poll_share), LONGEST_POLL_REST_SECONDS)
        return max(schedule.poll_seconds - seconds, rest)

    def sweep(self) -> float:
        """Sweep, or audit where that is due: discard the mirror and compare everything again."""
        complete = None
        with self._sweeping:
            self.pace.begin()
            before = self.fetcher.api_time.of("sweep")
            try:
                complete = self._swept(self._kind()).api_seconds
            finally:
                self.pace.end(self.fetcher.api_time.of("sweep") - before, complete)
        self._recount()
        self._save()
        self._follow_while_awake()
        return self.pace.pause

    def renew(self) -> float:
        """Keep the lease while there is nothing to write."""
        self.store.lease.renew_if_due()
        return self.store.lease.seconds / 6

    def hints(self) -> float | None:
        """Follow the hints that applications and webhooks left; in quiet mode only on request."""
        if not self._following.acquire(blocking=False):
            return BUSY_SECONDS  # another job follows them, and may have looked already
        try:
            state = self._follower.run()
        finally:
            self._following.release()
        if state is not None:
            self.telemetry.hints_followed(state)
        return None if self.settings.database.quiet else HINT_SECONDS

    @property
    def hints_wait(self) -> bool:
        """Whether hints are to be followed again soon, such as those of users yet to appear."""
        return self._follower.waits

    def activity(self) -> float | None:
        """Look at the users who were active last; None if the server cannot list them."""
        schedule = self.settings.schedule
        try:
            worked = self._worked("poll", self._poll_active)
        except OrderRefused as error:
            log.info("activity.unavailable", error=str(error))
            return None
        return max(schedule.activity_seconds, rest_after(worked, schedule.poll_share))

    def _poll_newest(self) -> None:
        size = self.settings.schedule.poll_page_size
        poll = Poll(self.fetcher, self.store, self.cache, size, cold=not self.warm)
        self.telemetry.poll_ended(poll.run())

    def _poll_active(self) -> None:
        at, state = self.cache.asked(self._now()), beside_sweeps(self.store, self.cache)
        try:
            page = self.fetcher.await_answer(self.fetcher.submit_active(ACTIVE_USERS))
            applier = PageApplier(self.store, state)
            with self.cache.lock:
                seen = applier.compare_single(page.users, page.unreadable, page.observed_at)
                applier.write(seen)
        finally:
            self.cache.answered(at)
        self.telemetry.activity_ended(state)

    def _worked(self, purpose: Purpose, work: Callable[[], object]) -> float:
        """Work, and tell how long the API worked for it."""
        before = self.fetcher.api_time.of(purpose)
        work()
        return self.fetcher.api_time.of(purpose) - before

    def _swept(self, kind: str) -> Report:
        """Sweep, and take note of how it ended."""
        try:
            report = self._sweep(kind).run()
        except Stopped:
            self.cut, self._outwards = True, False
            raise
        except LeaseLost:
            raise
        except Exception as error:
            self._failed = True
            self.telemetry.sweep_failed(error)
            raise
        self._failed = self.cut = False
        self.warm = True
        self.telemetry.sweep_ended(report)
        return report

    def _kind(self) -> str:
        """Say what the next sweep is; for an audit the mirror is loaded again."""
        now = self._monotonic()
        if now - self._audited_at < self.settings.schedule.audit_hours * SECONDS_PER_HOUR:
            return "sweep"
        self._audited_at = now
        self.cache.load(self.store)
        return "audit"

    def _follow_while_awake(self) -> None:
        """In quiet mode, look for hints where the database is awake anyway."""
        if self.settings.database.quiet and self.store.lease.held:
            self.hints()

    def _recount(self) -> None:
        """Look now and then whether others changed rows, where the database is awake anyway."""
        now, minutes = self._monotonic(), self.settings.schedule.census_minutes
        if not self.store.lease.held or now - self._counted_at < minutes * SECONDS_PER_MINUTE:
            return
        self._counted_at = now
        try:
            # In quiet mode there may be no second look for days, and the counters lag.
            self.cache.recount(self.store, trust_counters=not self.settings.database.quiet)
        except Blocked as error:
            log.warning("census.skipped", error=str(error))

    def _save(self) -> None:
        """Save what is known of the rows now and then, where the database is awake anyway."""
        now, minutes = self._monotonic(), self.settings.schedule.census_minutes
        if self.store.lease.held and now - self._saved_at >= minutes * SECONDS_PER_MINUTE:
            self._saved_at = now
            save(self.cache, self.store)

    def _sweep(self, kind: str) -> Sweep:
        schedule = self.settings.schedule
        return Sweep(
            self.fetcher,
            self.store,
            self.cache,
            deletion_policy(self.settings),
            on_page=lambda _: self.telemetry.page_read(self.fetcher.page_size.limit),
            resume_minutes=None if self.warm and not self.cut else schedule.resume_minutes,
            kind=kind,
            outwards=self._outwards,
            leaves_row=self._failed or (kind != "poll" and not self.settings.database.quiet),
        )

    def _inserted(self, users: Users) -> None:
        """Measure how fresh rows are; the users from before us tell nothing."""
        if self.warm:
            self.telemetry.rows_inserted(users)

    def _now(self) -> datetime:
        return self.store.database.clock.now()

    def _monotonic(self) -> float:
        return self.store.database.clock.monotonic()
