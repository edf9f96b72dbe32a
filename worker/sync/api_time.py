"""The time in which the users API worked for us."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Literal, TypeVar, get_args

T = TypeVar("T")
Purpose = Literal["sweep", "poll", "hint"]


@dataclass(slots=True)
class ApiTime:
    """Adds up how long answers took, for each purpose apart; thread-safe.

    A request without an answer counts for nothing: an outage is no work. Two requests at a time
    count once, up to the first answer for the one that got it, because a server of one process
    serves one after the other.
    """

    monotonic: Callable[[], float] = time.monotonic
    _seconds: dict[Purpose, float] = field(
        default_factory=lambda: dict.fromkeys(get_args(Purpose), 0.0)
    )
    _counted_until: float = float("-inf")
    _lock: Lock = field(default_factory=Lock)

    def measured(self, purpose: Purpose, fetch: Callable[[], T]) -> T:
        """Return what `fetch` returns, and add the time that it took."""
        began = self.monotonic()
        answer = fetch()
        with self._lock:
            ended = self.monotonic()
            self._seconds[purpose] += max(0.0, ended - max(began, self._counted_until))
            self._counted_until = max(ended, self._counted_until)
        return answer

    def of(self, purpose: Purpose) -> float:
        """Give the seconds so far."""
        return self._seconds[purpose]
