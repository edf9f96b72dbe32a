"""What the long-running worker knows of itself, where every thread may write and read it."""

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock
from typing import Literal

from worker import installed_version
from worker.retry import LONGEST_ASKED_SECONDS
from worker.service.pace import longest_sweep_age
from worker.settings.settings import Settings

State = Literal["starting", "standing by", "working", "quiet", "stopping"]

# The main loop beats once a second. A machine that swaps is slow, too, but not for this long.
LONGEST_SILENCE_SECONDS = 30
# The longest step of any job: reading the keys of millions of users takes up to ten minutes.
LONGEST_STEP_SECONDS = 660
# One failed sweep is followed by another one soon; a second failure is no accident.
MOST_FAILED_SWEEPS = 1
KEPT_SWEEPS = 50
# A sweep with held deletions has seen the whole list, too.
WHOLE = {"complete", "held"}


@dataclass(frozen=True, slots=True)
class SweepSummary:
    """What one sweep did: counts as in the `sweep` table, and `unchanged` and `waiting`.

    `api_seconds` is how long the API worked for it.
    """

    number: int
    kind: str
    outcome: str
    finished_at: datetime
    duration_seconds: float
    counts: Mapping[str, int]
    api_seconds: float


@dataclass(frozen=True, slots=True)
class HealthReading:
    """What health, metrics and the status page show, read at one moment.

    What is not known, or never happened, is None.
    """

    state: State
    started_at: datetime
    now: datetime
    target: str
    api_host: str
    version: str
    seconds_since_sweep: float | None
    seconds_since_poll: float | None
    seconds_since_hints: float | None
    seconds_since_activity: float | None
    longest_sweep_age: float
    failed_sweeps: int
    last_error: str
    users: int | None
    held: int
    candidates: int
    quarantined: int
    oldest_candidate_seconds: float | None
    lease_held: bool
    page_size: int | None
    trouble: str | None
    trouble_seconds: float | None
    trouble_is_fatal: bool
    sweeps: tuple[SweepSummary, ...]  # newest first
    table_replaced: bool = False

    @property
    def not_ready(self) -> tuple[str, ...]:
        """Say why this worker should not be relied on; nothing if it may be.

        Standing by is ready, or no rolling update would ever end: table and deletions are the
        leader's business. So is quiet mode before its first sweep.
        """
        reasons = [self.trouble] if self.trouble_is_fatal else []
        if self.state != "standing by":
            reasons += [self._too_old(), self._failing(), self._held()]
        return tuple(reason for reason in reasons if reason)

    def _too_old(self) -> str | None:
        age, limit = self.seconds_since_sweep, self.longest_sweep_age
        if self.table_replaced:
            return "no sweep was completed since the table was replaced, or lost rows"
        if age is None:
            return None if self.state == "quiet" else "no sweep was completed yet"
        if age <= limit:
            return None
        return f"the last complete sweep ended {age:.0f} s ago (longer than {limit:.0f} s)"

    def _failing(self) -> str | None:
        if self.failed_sweeps <= MOST_FAILED_SWEEPS:
            return None
        return f"the last {self.failed_sweeps} sweeps failed: {self.last_error}"

    def _held(self) -> str | None:
        if not self.held:
            return None
        deletions = "1 deletion is" if self.held == 1 else f"{self.held} deletions are"
        return f"{deletions} held: users-sync deletions"


@dataclass(frozen=True, slots=True)
class _Trouble:
    text: str
    fatal: bool
    told_fatal: bool
    since: float


@dataclass(slots=True, kw_only=True)
class Health:
    """Safe to be called from any thread. Moments are seconds of `monotonic`."""

    target: str
    api_host: str
    sweep_seconds: float
    sweep_share: float = 0.25
    longest_step_seconds: float = LONGEST_STEP_SECONDS
    kept_sweeps: int = KEPT_SWEEPS
    monotonic: Callable[[], float] = time.monotonic
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    version: str = field(default_factory=installed_version)

    _lock: Lock = field(default_factory=Lock, init=False, repr=False)
    _state: State = field(default="starting", init=False)
    _started_at: datetime = field(init=False)
    _beat_at: float = field(init=False)
    _moved_at: float = field(init=False)
    _swept_at: float | None = field(default=None, init=False)
    _table_replaced: bool = field(default=False, init=False)
    _polled_at: float | None = field(default=None, init=False)
    _hints_at: float | None = field(default=None, init=False)
    _activity_at: float | None = field(default=None, init=False)
    _api_seconds: float = field(default=0.0, init=False)
    _failed_sweeps: int = field(default=0, init=False)
    _last_error: str = field(default="", init=False)
    _users: int | None = field(default=None, init=False)
    _held: int = field(default=0, init=False)
    _candidates: int = field(default=0, init=False)
    _candidate_since: float | None = field(default=None, init=False)
    _quarantined: int = field(default=0, init=False)
    _lease_held: bool = field(default=False, init=False)
    _page_size: int | None = field(default=None, init=False)
    _trouble: _Trouble | None = field(default=None, init=False)
    _sweeps: deque[SweepSummary] = field(init=False)

    def __post_init__(self) -> None:
        self._started_at = self.now()
        self._beat_at = self._moved_at = self.monotonic()
        self._sweeps = deque(maxlen=self.kept_sweeps)

    def beat(self) -> None:
        """Tell that the main loop goes round; once a second."""
        # Without the lock, which whatever stalls might hold: a float is replaced as a whole.
        self._beat_at = self.monotonic()

    def moved(self) -> None:
        """Tell that a job got somewhere, or that none has anything to do."""
        self._moved_at = self.monotonic()

    def stalled(self) -> bool:
        """Whether no job got anywhere for longer than any step of one takes."""
        return self.monotonic() - self._moved_at > self.longest_step_seconds

    @property
    def not_alive(self) -> tuple[str, ...]:
        """Say why only a restart can help; nothing if none is needed."""
        reasons = []
        if self.monotonic() - self._beat_at > LONGEST_SILENCE_SECONDS:
            reasons.append("the main loop stands still")
        if self.stalled():
            reasons.append(f"no job has moved for {self.longest_step_seconds:.0f} s")
        return tuple(reasons)

    def enter(self, state: State) -> None:
        with self._lock:
            self._state = state

    def sweep_finished(self, summary: SweepSummary) -> None:
        """Remember a sweep; only one that saw the whole list counts for freshness."""
        with self._lock:
            self._sweeps.appendleft(summary)
            if summary.outcome in WHOLE:
                self._table_replaced = False
                self._swept_at = self.monotonic()
                self._api_seconds = summary.api_seconds
                self._failed_sweeps = 0

    def sweep_failed(self, error: str) -> None:
        """Remember that a sweep did not come to its end, and why."""
        with self._lock:
            self._failed_sweeps += 1
            self._last_error = error

    def poll_finished(self, *, whole_list: bool = False) -> None:
        """Remember a poll; one that saw the whole list is as good as a sweep."""
        with self._lock:
            self._polled_at = self.monotonic()
            if whole_list:
                self._table_replaced = False
                self._swept_at = self._polled_at
                self._failed_sweeps = 0

    def hints_followed(self) -> None:
        with self._lock:
            self._hints_at = self.monotonic()

    def activity_finished(self) -> None:
        with self._lock:
            self._activity_at = self.monotonic()

    def table_replaced(self) -> None:
        """Note that sweeps until now say nothing about the table as it is."""
        with self._lock:
            self._table_replaced = True

    def set_rows(self, *, users: int) -> None:
        with self._lock:
            self._users = users

    def set_deletions(
        self, *, held: int, candidates: int, oldest_candidate_since: float | None
    ) -> None:
        with self._lock:
            self._held = held
            self._candidates = candidates
            self._candidate_since = oldest_candidate_since

    def set_quarantined(self, number: int) -> None:
        with self._lock:
            self._quarantined = number

    def set_lease(self, held: bool) -> None:  # noqa: FBT001  the verb says what it means
        with self._lock:
            self._lease_held = held

    def set_page_size(self, number: int) -> None:
        with self._lock:
            self._page_size = number

    def trouble(self, text: str, *, fatal: bool = False) -> bool:
        """Note what goes wrong; the newest text stands. `fatal`: only a person can fix it.

        Returns whether it is worth a warning: trouble begins, or turns out to be fatal. Two
        troubles that take turns are told of once.
        """
        with self._lock:
            before = self._trouble
            told_fatal = fatal or (before is not None and before.told_fatal)
            since = self.monotonic() if before is None else before.since
            self._trouble = _Trouble(text, fatal, told_fatal, since)
            return before is None or told_fatal != before.told_fatal

    def trouble_ended(self) -> float | None:
        """Return the seconds that trouble lasted, if there was any."""
        with self._lock:
            before, self._trouble = self._trouble, None
            return None if before is None else self.monotonic() - before.since

    def read(self) -> HealthReading:
        with self._lock:
            return self._read(self._trouble)

    def _read(self, trouble: _Trouble | None) -> HealthReading:
        return HealthReading(
            state=self._state,
            started_at=self._started_at,
            now=self.now(),
            target=self.target,
            api_host=self.api_host,
            version=self.version,
            seconds_since_sweep=self._since(self._swept_at),
            seconds_since_poll=self._since(self._polled_at),
            seconds_since_hints=self._since(self._hints_at),
            seconds_since_activity=self._since(self._activity_at),
            longest_sweep_age=longest_sweep_age(
                self._api_seconds, self.sweep_share, self.sweep_seconds
            ),
            failed_sweeps=self._failed_sweeps,
            last_error=self._last_error,
            users=self._users,
            held=self._held,
            candidates=self._candidates,
            quarantined=self._quarantined,
            oldest_candidate_seconds=self._since(self._candidate_since),
            lease_held=self._lease_held,
            page_size=self._page_size,
            trouble=trouble.text if trouble else None,
            trouble_seconds=self._since(trouble.since) if trouble else None,
            trouble_is_fatal=trouble is not None and trouble.fatal,
            sweeps=tuple(self._sweeps),
            table_replaced=self._table_replaced,
        )

    def _since(self, moment: float | None) -> float | None:
        return None if moment is None else max(0.0, self.monotonic() - moment)


def health_of(settings: Settings, kept_sweeps: int = KEPT_SWEEPS) -> Health:
    """Begin to keep the health of the worker for a project with these settings."""
    return Health(
        target=settings.database.schema_name,
        api_host=settings.stack.api_url.partition("://")[2],
        sweep_seconds=settings.schedule.sweep_seconds,
        sweep_share=settings.schedule.sweep_share,
        # Between two steps lie at most a pause that the API asked for (300 s) and one request: a
        # time-out above 300 s is added.
        longest_step_seconds=LONGEST_STEP_SECONDS
        + max(0.0, settings.stack.timeout_seconds - LONGEST_ASKED_SECONDS),
        kept_sweeps=kept_sweeps,
    )
