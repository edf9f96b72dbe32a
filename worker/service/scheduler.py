"""When what runs: jobs that arm themselves again at their end, whatever the wall clock does."""

import time
from collections.abc import Callable
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from threading import Lock
from typing import Any

import structlog
from apscheduler.executors.pool import ThreadPoolExecutor
from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.date import DateTrigger

from worker.net import run_abandonable

log = structlog.stdlib.get_logger(__name__)

# The leader's five jobs never wait for each other.
THREADS = 6

# Wall and monotonic clock drift apart by less than this in a second, unless one of them is set.
CLOCK_STEP_SECONDS = 2.0

# A job ends within five seconds of a stop. One that does not is stuck, and process managers kill
# after ten.
LONGEST_STOP_SECONDS = 7.0


@dataclass(slots=True, eq=False)
class _Armed:
    """What runs next under a name, and when on the monotonic clock; `job` is the scheduler's."""

    work: Callable[[], None]
    due: float
    job: Any = None


class Scheduler:
    """Named jobs, one instance of each at most, each armed for one moment at a time."""

    def __init__(
        self,
        *,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._scheduler = BackgroundScheduler(
            executors={"default": ThreadPoolExecutor(THREADS)},
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None},
            timezone=UTC,
        )
        self._wall = wall
        self._monotonic = monotonic
        self._armed: dict[str, _Armed] = {}
        self._running: set[str] = set()
        self._stopped = False
        self._lock = Lock()
        self._offset = wall() - monotonic()

    def start(self) -> None:
        self._scheduler.start()

    def at_rest(self, *but: str) -> bool:
        """Whether all jobs wait for moments to come, these aside; not if there is none."""
        with self._lock:
            waiting = [armed.due for name, armed in self._armed.items() if name not in but]
            running = self._running.difference(but)
        return not running and bool(waiting) and min(waiting) > self._monotonic()

    def running(self) -> list[str]:
        with self._lock:
            return sorted(self._running)

    def stop(self, seconds: float = LONGEST_STOP_SECONDS) -> bool:
        """Arm nothing more, and wait for what is running. False if it does not end in time."""
        with self._lock:
            self._stopped = True
            self._armed.clear()
        self._scheduler.remove_all_jobs()
        if self._scheduler.running:
            ending = run_abandonable(lambda: self._scheduler.shutdown(wait=True))
            return not wait([ending], seconds).not_done
        return True

    def schedule(
        self, name: str, work: Callable[[], None], seconds: float, *, keep_sooner: bool = False
    ) -> None:
        """Run `work` in so many seconds, instead of when it was scheduled for before.

        With `keep_sooner` an earlier moment stays as it is.

        While the job of that name runs, the new one waits for its end.
        """
        with self._lock:
            if self._stopped:
                return
            due, before = self._monotonic() + seconds, self._armed.get(name)
            if keep_sooner and before is not None and before.due <= due:
                return
            self._disarm(name)
            self._armed[name] = _Armed(work, due)
            if name not in self._running:
                self._add(name)

    def cancel(self, *names: str) -> None:
        """Let these jobs not begin again until they are armed."""
        with self._lock:
            for name in names:
                self._disarm(name)

    def mind_the_clock(self) -> None:
        """Schedule all jobs again after the wall clock, which APScheduler runs on, was set."""
        offset = self._wall() - self._monotonic()
        if abs(offset - self._offset) < CLOCK_STEP_SECONDS:
            return
        log.warning("clock.stepped", seconds=round(offset - self._offset, 1))
        self._offset = offset
        with self._lock:
            for name in self._armed.keys() - self._running:
                self._take_back(self._armed[name])
                self._add(name)

    def _disarm(self, name: str) -> None:
        armed = self._armed.pop(name, None)
        if armed is not None:
            self._take_back(armed)

    @staticmethod
    def _take_back(armed: _Armed) -> None:
        if armed.job is not None:
            with suppress(JobLookupError):  # it is about to run
                armed.job.remove()

    def _add(self, name: str) -> None:
        """Hand a job to the scheduler, each time as a new one.

        The scheduler drops what falls due while an instance of the same job still ends.
        """
        armed = self._armed[name]
        seconds = max(0.0, armed.due - self._monotonic())
        # Without a zone the trigger asks for the machine's, and fails for some values of TZ.
        at = DateTrigger(datetime.fromtimestamp(self._wall() + seconds, UTC), UTC)
        armed.job = self._scheduler.add_job(self._run, at, (name, armed), name=name)

    def _run(self, name: str, armed: _Armed) -> None:
        with self._lock:
            # APScheduler took it up, and meanwhile it was cancelled or replaced.
            if self._armed.get(name) is not armed or name in self._running:
                return
            del self._armed[name]
            self._running.add(name)
        try:
            armed.work()
        finally:
            with self._lock:
                self._running.discard(name)
                if name in self._armed:
                    self._add(name)
