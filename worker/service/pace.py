"""How long the API is left in peace after it has worked for us, and what age is then too old."""

from collections.abc import Callable
from dataclasses import dataclass

# An outage that is over within this time is not worth a call at night.
LEAST_SWEEP_AGE_SECONDS = 300

# A server that takes a minute for a poll is asked again after a minute.
LONGEST_POLL_REST_SECONDS = 60.0

# A sweep that began early owes its own rest and what it cut short of the one before; never more
# than two.
MOST_RESTS = 2


def rest_after(worked: float, share: float) -> float:
    """Say how long to rest after so many seconds of work, so that work is that share of all."""
    return worked * (1 / share - 1)


def longest_sweep_age(worked: float, share: float, sweep_seconds: float) -> float:
    """Say how old the last complete sweep may be: three times the usual pause and a sweep.

    The view `users_sync_worker.status` computes the same. No pause of a `Pace` is longer.
    """
    pause = max(sweep_seconds, rest_after(worked, share))
    return max(LEAST_SWEEP_AGE_SECONDS, 3 * (pause + worked))


@dataclass(slots=True)
class Pace:
    """The pauses between sweeps. Moments are seconds of `monotonic`."""

    sweep_seconds: float
    share: float
    monotonic: Callable[[], float]
    # The rest that the last complete sweep asks for: `status` and readiness judge by that one.
    _rest: float = 0.0
    _ended_at: float = float("-inf")
    _rested_at: float = float("-inf")
    _hurried: bool = False

    def begin(self) -> None:
        """Take note that a sweep begins: whatever it was asked to hurry for, it is there."""
        self._hurried = False

    def end(self, worked: float, complete: float | None = None) -> None:
        """Take note that a sweep ended, for which the API has just worked so many seconds.

        `complete` is the work for all of it, resumed parts included, if it came to its end.
        """
        rest = rest_after(worked, self.share)
        if complete is not None:
            self._rest = rest_after(complete, self.share)
        self._ended_at = now = self.monotonic()
        most = MOST_RESTS * (self._rest or rest)
        # While it worked it did not rest.
        self._rested_at = min(max(now, self._rested_at + worked) + rest, now + most)

    def hurry(self) -> None:
        """Let the next sweep begin as soon as that cuts short no more than one rest.

        What is cut short is added to the next one.
        """
        self._hurried = True

    @property
    def rest(self) -> float:
        """How long the API must still be left in peace."""
        early = self._rest if self._hurried else 0.0
        return max(0.0, self._rested_at - early - self.monotonic())

    @property
    def pause(self) -> float:
        """How long not to sweep."""
        if self._hurried:
            return self.rest
        return max(self.rest, self._ended_at + self.sweep_seconds - self.monotonic(), 0.0)
