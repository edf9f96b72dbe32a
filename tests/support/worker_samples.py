"""A worker's vitals on a clock that the test sets, and what a sweep may have done."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from worker.service.health import Health, SweepSummary

BEGAN = datetime(2026, 3, 14, 13, 37, 0, tzinfo=UTC)
COUNTS = ("pages", "users", "inserted", "updated", "restored", "deleted", "approved", "held")


@dataclass
class Ticks:
    """Seconds since the worker began, as monotonic time and as time of day."""

    seconds: float = 0.0

    def monotonic(self) -> float:
        return 1000.0 + self.seconds

    def now(self) -> datetime:
        return BEGAN + timedelta(seconds=self.seconds)


def sample_vitals(ticks: Ticks) -> Health:
    return Health(
        target="neon_auth",
        api_host="api.stack-auth.com",
        sweep_seconds=60,
        monotonic=ticks.monotonic,
        now=ticks.now,
        version="1.2.3",
    )


def sample_sweep(
    number: int = 1,
    outcome: str = "complete",
    *,
    took: float = 1.5,
    at: datetime = BEGAN,
    **counts: int,
) -> SweepSummary:
    figures = {**dict.fromkeys(COUNTS, 0), "unchanged": 0, "waiting": 0, **counts}
    return SweepSummary(number, "sweep", outcome, at, took, figures, took)
