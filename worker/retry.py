"""Tries again what failed in passing: with growing, jittered pauses that a stop ends at once."""

from collections.abc import Callable
from functools import partial
from threading import Event
from typing import Protocol, TypeVar

import structlog
import tenacity

from worker.errors import Stopped, Transient, UsersSyncError

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.2
# Longer pauses would add more to an outage than they spare a server that is coming back.
LONGEST_PAUSE_SECONDS = 15.0
# A server may ask for more patience, but not put a worker to sleep for a day by a slip of the pen.
LONGEST_ASKED_SECONDS = 300.0


class Watch(Protocol):
    """Who tells of an outage as a whole, so that not each attempt has to be told."""

    def failed(self, service: str, error: str) -> None: ...

    def succeeded(self, service: str) -> None: ...

    def answered(self, status: str, seconds: float) -> None: ...

    def took(self, service: str, seconds: float) -> None: ...

    def moved(self) -> None: ...

    def stalled(self) -> bool: ...


class Retry:
    """How long to insist on a call to one outside service, and what to raise in the end.

    `exhausted` is SourceUnavailable or DatabaseUnavailable; `service` names it in messages. Endless
    minutes are fine. With a `watch`, failed attempts are its to tell.
    """

    def __init__(
        self,
        service: str,
        minutes: float,
        stop: Event,
        exhausted: type[UsersSyncError],
        watch: Watch | None = None,
    ) -> None:
        self.service = service
        self.minutes = minutes
        self.stop = stop
        self.exhausted = exhausted
        self.watch = watch

    def call(self, attempt: Callable[[], T]) -> T:
        """Return what `attempt` returns, trying again for as long as it raises Transient.

        Raises `exhausted` when the next pause would end after `minutes`, and Stopped instead of
        pausing when the worker is asked to stop: what succeeds at once may still be finished.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            wait=_pause,
            stop=tenacity.stop_before_delay(self.minutes * 60),
            sleep=self._sleep,
            before_sleep=partial(self._tell, set()),
            reraise=True,
        )
        # Not handed through tenacity, which would keep a page until the next garbage collection.
        results: list[T] = []
        try:
            retrying(lambda: results.append(attempt()))
        except Transient as error:
            raise self.exhausted(self._given_up(error)) from error
        if self.watch is not None:
            self.watch.succeeded(self.service)
        return results.pop()

    def _given_up(self, error: Transient) -> str:
        if not self.minutes:  # it was tried once
            return f"{self.service} could not be used: {error}"
        asked = error.retry_after or 0.0
        if asked <= LONGEST_PAUSE_SECONDS:
            long = f"{self.minutes:g} minutes" if self.minutes >= 1 else f"{self.minutes * 60:g} s"
            return f"{self.service} could not be used for {long}: {error}"
        return (
            f"{self.service} asks for a pause of {asked:g} s (Retry-After), which ends beyond the"
            f" {self.minutes:g} minutes of retry_minutes: {error}"
        )

    def _sleep(self, seconds: float) -> None:
        if self.stop.wait(seconds):
            raise Stopped("asked to stop")

    def _tell(self, told: set[str], state: tenacity.RetryCallState) -> None:
        """Log a failed attempt; beside a watch, only what it did not see begin."""
        error = str(state.outcome.exception() if state.outcome else "")
        if self.watch is not None:
            self.watch.failed(self.service, error)
        # An outage may turn into one that only a person can end, such as a tenant that is gone.
        news = bool(told) and error not in told
        told.add(error)
        tell = log.warning if news or self.watch is None else log.debug
        tell(
            "call.failed",
            service=self.service,
            error=error,
            attempt=state.attempt_number,
            pause_seconds=round(state.upcoming_sleep, 2),
        )


_backoff = tenacity.wait_random_exponential(
    multiplier=FIRST_PAUSE_SECONDS, min=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS
)


def _pause(state: tenacity.RetryCallState) -> float:
    """Wait a random time below a growing bound, and as long as the server asked for at least.

    A server that asks for no pause at all is not asked again and again without one, and one that
    asks for hours is asked again every few minutes.
    """
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, Transient) else None
    return max(_backoff(state), min(asked or 0.0, LONGEST_ASKED_SECONDS))
