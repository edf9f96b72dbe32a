"""Tries again what failed in passing: with growing, jittered pauses that a stop ends at once."""

from collections.abc import Callable
from threading import Event
from typing import TypeVar

import structlog
import tenacity

from worker.errors import Stopped, Transient, UsersSyncError

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")

FIRST_PAUSE_SECONDS = 0.2
# Longer pauses would add more to an outage than they spare a server that is coming back.
LONGEST_PAUSE_SECONDS = 15.0


class Retry:
    """How long to insist on a call to one outside service, and what to raise in the end.

    `exhausted` is SourceUnavailable or DatabaseUnavailable; `service` names it in messages.
    """

    def __init__(
        self, service: str, minutes: float, stop: Event, exhausted: type[UsersSyncError]
    ) -> None:
        self.service = service
        self.minutes = minutes
        self.stop = stop
        self.exhausted = exhausted

    def call(self, attempt: Callable[[], T]) -> T:
        """Return what `attempt` returns, trying again for as long as it raises Transient.

        Raises `exhausted` when the next pause would end after `minutes`, and Stopped as soon as
        somebody asks the worker to end.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(Transient),
            wait=_pause,
            stop=tenacity.stop_before_delay(self.minutes * 60),
            sleep=self._sleep,
            before_sleep=self._tell,
            reraise=True,
        )
        try:
            return retrying(self._unless_stopped(attempt))
        except Transient as error:
            raise self.exhausted(
                f"{self.service} could not be used for {self.minutes:g} minutes: {error}"
            ) from error

    def _unless_stopped(self, attempt: Callable[[], T]) -> Callable[[], T]:
        def checked() -> T:
            if self.stop.is_set():
                raise Stopped("asked to stop")
            return attempt()

        return checked

    def _sleep(self, seconds: float) -> None:
        self.stop.wait(seconds)

    def _tell(self, state: tenacity.RetryCallState) -> None:
        log.warning(
            "call.failed",
            service=self.service,
            error=str(state.outcome.exception() if state.outcome else ""),
            attempt=state.attempt_number,
            pause_seconds=round(state.upcoming_sleep, 2),
        )


_backoff = tenacity.wait_random_exponential(
    multiplier=FIRST_PAUSE_SECONDS, min=FIRST_PAUSE_SECONDS, max=LONGEST_PAUSE_SECONDS
)


def _pause(state: tenacity.RetryCallState) -> float:
    """Wait as long as the server asked for, or a random time below a growing bound."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, Transient) else None
    return _backoff(state) if asked is None else asked
