"""The use case: walk the whole list, bring the table into line, then settle the deletions."""

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from worker.errors import (
    DatabaseUnavailable,
    LeaseLost,
    MirrorOutdated,
    Misconfigured,
    SourceUnavailable,
    Stopped,
    SweepIncomplete,
    UsersSyncError,
)
from worker.findings import Findings, begin
from worker.reading import Reading
from worker.settling import Rules, Settling
from worker.source import Source
from worker.store import Store
from worker.store.progress import COUNTS
from worker.store.statement import Statement

log = structlog.stdlib.get_logger(__name__)

# A table that somebody else writes to all the time cannot be compared with anything.
MOST_RESTARTS = 20


@dataclass(frozen=True, slots=True)
class Report:
    """What a sweep did, as it is logged: counts as in the `sweep` table, and what is beside it.

    `waiting` deletions are proven and wait for the grace period; `candidates` are not settled.
    """

    sweep: int
    kind: str
    outcome: str
    counts: dict[str, int]
    unchanged: int
    waiting: int
    candidates: int
    duration_seconds: float
    error: str | None = None


@dataclass(slots=True)
class Sweep:
    """One sweep of one target, from its checkpoint if there is one."""

    source: Source
    store: Store
    rules: Rules
    resume_minutes: float
    on_page: Callable[[Findings], None]
    kind: str = "sweep"

    def run(self) -> Report:
        """Sweep to the end; the report's outcome is `complete` or `held`.

        Raises what kept it from ending, after it was recorded and logged: SourceUnavailable,
        SweepIncomplete, DatabaseUnavailable, LeaseLost, Misconfigured or Stopped.
        """
        began = self.store.database.clock.monotonic()
        reading = self._begin(None)
        for _ in range(MOST_RESTARTS):
            try:
                return self._attempt(reading, began)
            except MirrorOutdated:
                log.info("mirror.discarded", sweep=reading.findings.number)
                self.store.lease.resync()
                reading = self._begin(reading.findings)
        error = SweepIncomplete(f"the table was written by somebody else {MOST_RESTARTS} times")
        self._end(reading, "incomplete", error, began)
        raise error

    def _begin(self, before: Findings | None) -> Reading:
        clock = self.store.database.clock
        findings = begin(self.store, self.kind, self.resume_minutes, clock.now)
        if before is not None:
            findings.carry_on(before)
        log.info("sweep.started", sweep=findings.number, resumed=findings.resume_at is not None)
        return Reading(self.source, self.store, findings, self.on_page)

    def _attempt(self, reading: Reading, began: float) -> Report:
        try:
            reading.read()
            settling = Settling(reading, self.rules, self._list_was_empty(reading.findings))
            closing = settling.settle()
        except Stopped as error:
            reading.save()
            self._end(reading, "stopped", error, began)
            raise
        except (SourceUnavailable, SweepIncomplete, Misconfigured) as error:
            incomplete = isinstance(error, SweepIncomplete)
            self._end(reading, "incomplete" if incomplete else "failed", error, began)
            raise
        except (DatabaseUnavailable, LeaseLost) as error:
            self._tell(reading.findings, "failed", error, began)
            raise
        if settling.trouble is not None:
            self._end(reading, "incomplete", settling.trouble, began, closing)
            raise settling.trouble
        findings = reading.findings
        findings.counts["held"] = len(findings.in_state("held"))
        outcome = "held" if findings.counts["held"] else "complete"
        store = self.store
        closing += [store.progress.clear(), store.progress.prune()]
        return self._end(reading, outcome, None, began, closing)

    @staticmethod
    def _list_was_empty(findings: Findings) -> bool:
        return not findings.counts["users"] and not findings.seen

    def _end(
        self,
        reading: Reading,
        outcome: str,
        error: UsersSyncError | None,
        began: float,
        closing: list[Statement] | None = None,
    ) -> Report:
        """Write the sweep's row with its outcome, and log it."""
        findings = reading.findings
        row = findings.row(outcome, str(error) if error else None)
        self.store.write([*(closing or []), self.store.progress.record(row)], findings.number)
        return self._tell(findings, outcome, error, began)

    def _tell(
        self, findings: Findings, outcome: str, error: UsersSyncError | None, began: float
    ) -> Report:
        seconds = self.store.database.clock.monotonic() - began
        report = Report(
            sweep=findings.number,
            kind=findings.kind,
            outcome=outcome,
            counts={name: findings.counts[name] for name in COUNTS},
            unchanged=findings.unchanged,
            waiting=findings.waiting,
            candidates=len(findings.in_state("candidate")),
            duration_seconds=round(seconds, 3),
            error=str(error) if error else None,
        )
        tell = log.info if outcome in {"complete", "stopped"} else log.warning
        tell(
            "sweep.finished",
            sweep=report.sweep,
            kind=report.kind,
            outcome=outcome,
            **report.counts,
            unchanged=report.unchanged,
            waiting=report.waiting,
            candidates=report.candidates,
            duration_seconds=report.duration_seconds,
            **({"error": report.error} if report.error else {}),
        )
        return report
