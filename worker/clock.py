"""The database's clock, as a lower bound: what this machine's clock says never matters."""

import math
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

# Quartz stays well within 100 parts per million; counting twice that is never later than the truth.
DRIFT = 200e-6


class Clock:
    """Tells the database's time without asking it, never later than the true moment.

    A moment that is said too late could let an old answer overwrite a newer row, so every rounding
    goes to the past. `monotonic` gives seconds and is not moved when the machine's clock is set.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self.monotonic = monotonic
        self._database_time = datetime.min.replace(tzinfo=UTC)
        self._read_at = 0.0

    def learn(self, database_time: datetime) -> None:
        """Take over a `clock_timestamp()` that has just arrived.

        It was taken before it arrived, so counting from its arrival can only be too early.
        """
        self._database_time = database_time
        self._read_at = self.monotonic()

    def now(self) -> datetime:
        """Tell the database's time, or a moment shortly before it."""
        age = self.monotonic() - self._read_at
        # A timedelta rounds to the nearest microsecond, which may lie in the future.
        return self._database_time + timedelta(microseconds=math.floor(age * (1 - DRIFT) * 1e6))
