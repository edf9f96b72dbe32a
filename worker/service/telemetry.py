"""What sweeps, polls and hints did, for health and metrics."""

from dataclasses import dataclass

from worker.clock import Clock
from worker.errors import told
from worker.model import Users
from worker.service.health import Health, SweepSummary
from worker.service.metrics import Metrics
from worker.sync.cache import Cache
from worker.sync.state import SweepState
from worker.sync.sweep import Report


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Where the figures of one worker go. Safe to be called from any thread."""

    health: Health
    metrics: Metrics
    cache: Cache
    clock: Clock

    def page_read(self, page_size: int) -> None:
        self.health.moved()
        self.health.set_page_size(page_size)
        self.health.set_rows(users=len(self.cache.mirror))

    def rows_inserted(self, users: Users) -> None:
        """Measure how long sign-ups took to their rows."""
        now = self.clock.now().timestamp()
        for millis in users.millis:
            self.metrics.observe_freshness(now - millis / 1000)

    def poll_ended(self, state: SweepState) -> None:
        self.health.poll_finished()
        # The users that sweeps read are counted there.
        self._count_rows(state)

    def hints_followed(self, state: SweepState) -> None:
        """Take in a look at hints that found some."""
        self.health.hints_followed()
        self._count_rows(state)
        self._count_suspects()

    def activity_ended(self, state: SweepState) -> None:
        """Take in a look at the users active last."""
        self.health.activity_finished()
        self._count_rows(state)

    def _count_rows(self, state: SweepState) -> None:
        self.health.set_rows(users=len(self.cache.mirror))
        self.metrics.count_rows({n: c for n, c in state.counts.items() if n != "users"})

    def sweep_failed(self, error: Exception) -> None:
        """Take in a sweep that did not come to its end."""
        self.health.sweep_failed(told(error))

    def sweep_ended(self, report: Report) -> None:
        """Take in a sweep; one that was a poll is worth showing only if it changed something."""
        counts = {name: count for name, count in report.figures.items() if name != "candidates"}
        if report.kind == "poll":
            self.health.poll_finished(whole_list=True)
        if report.kind != "poll" or report.changed_something:
            self.health.sweep_finished(
                SweepSummary(
                    report.sweep,
                    report.kind,
                    report.outcome,
                    self.clock.now(),
                    report.duration_seconds,
                    counts,
                    report.api_seconds,
                )
            )
        self.metrics.count_rows(counts)
        self.metrics.observe_sweep(report.duration_seconds)
        self.health.set_quarantined(report.counts["quarantined"])
        self.health.set_rows(users=len(self.cache.mirror))
        self._count_suspects()

    def _count_suspects(self) -> None:
        with self.cache.lock:
            suspects = list(self.cache.suspects.values())
        held = sum(suspect.state == "held" for suspect in suspects)
        noticed = [suspect.noticed_at for suspect in suspects if suspect.state == "candidate"]
        since = None
        if noticed:
            age = (self.clock.now() - min(noticed)).total_seconds()
            since = self.health.monotonic() - age
        self.health.set_deletions(held=held, candidates=len(noticed), oldest_candidate_since=since)
