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
from worker.store import Store
from worker.store.sweeps import COUNTS
from worker.store.transaction import Statement
from worker.sync.apply import PageApplier
from worker.sync.cache import Cache
from worker.sync.deletions import Deletions
from worker.sync.fetcher import Fetcher
from worker.sync.guard import DeletionPolicy
from worker.sync.state import SweepState, begin
from worker.sync.walk import Walk
from worker.tracing import traced

log = structlog.stdlib.get_logger(__name__)

# A table that another writer changes all the time cannot be compared.
MOST_RESTARTS = 20
# Nor would a sweep ever end that begins at the start of the list each time.
MOST_FROM_START = 3
# A sweep that lost its mirror goes on from its own checkpoint, however it was told to begin.
RESTART_MINUTES = 5.0
# A poll comes once a second, and a plan is no sweep.
UNTRACED = {"poll", "plan"}


@dataclass(frozen=True, slots=True)
class Report:
    """What a sweep did, as it is logged: counts as in the `sweep` table, and what is beside it.

    `waiting` deletions are proven and wait for the grace period, or for a newer proof; `candidates`
    are not settled. `api_seconds` is how long the API worked for it: an outage is no work.
    """

    sweep: int
    kind: str
    outcome: str
    counts: dict[str, int]
    unchanged: int
    waiting: int
    candidates: int
    duration_seconds: float
    changed_something: bool
    api_seconds: float
    error: str | None = None

    @property
    def figures(self) -> dict[str, int]:
        """Give all that is counted, by name, in the order in which it is logged."""
        return {
            **self.counts,
            "unchanged": self.unchanged,
            "waiting": self.waiting,
            "candidates": self.candidates,
        }


@dataclass(slots=True)
class Sweep:
    """One sweep of one target.

    Without `resume_minutes` it begins at the start of the list; else it goes on from a checkpoint
    that is younger. With `outwards` a long list is walked from the middle of what is known. Without
    `leaves_row` a sweep that changed nothing leaves no row in the table of sweeps.
    """

    fetcher: Fetcher
    store: Store
    cache: Cache
    policy: DeletionPolicy
    on_page: Callable[[SweepState], None]
    resume_minutes: float | None = None
    kind: str = "sweep"
    outwards: bool = True
    leaves_row: bool = True

    def run(self) -> Report:
        """Sweep to the end; the report's outcome is `complete` or `held`.

        Raises what kept it from ending, after it was recorded and logged: SourceUnavailable,
        SweepIncomplete, DatabaseUnavailable, LeaseLost, Misconfigured or Stopped.
        """
        if self.kind in UNTRACED:
            return self._run()
        with traced("sweep") as note:
            note(target=self.store.lease.target, kind=self.kind)
            report = self._run()
            note(sweep=report.sweep, outcome=report.outcome, **report.figures)
            return report

    def _run(self) -> Report:
        began = self.store.database.clock.monotonic()
        walk = self._begin(self.resume_minutes)
        for restart in range(MOST_RESTARTS):
            distrusted = self.store.lease.distrusted
            try:
                return self._attempt(walk, began)
            except MirrorOutdated:
                all_again = self.store.lease.distrusted != distrusted
                from_start = all_again and restart < MOST_FROM_START
                walk = self._go_on(walk.state, began, from_start=from_start)
        error = SweepIncomplete(f"another writer changed the table {MOST_RESTARTS} times")
        self._end(walk, "incomplete", error, began)
        raise error

    def _go_on(self, before: SweepState, began: float, *, from_start: bool) -> Walk:
        """Load the mirror again, and read on behind the checkpoint.

        What was read before is read again if the table is not the one that it was compared with.
        """
        try:
            self.cache.reload(self.store, before.generation)
        except (DatabaseUnavailable, LeaseLost, Misconfigured) as error:
            self._tell(before, "failed", error, began)
            raise
        minutes = None if from_start else self.resume_minutes or RESTART_MINUTES
        walk = self._begin(minutes)
        walk.state.carry_on(before)
        return walk

    def _begin(self, resume_minutes: float | None) -> Walk:
        store, now = self.store, self.store.database.clock.now()
        checkpoint = None
        if resume_minutes is not None:
            checkpoint = store.database.call(lambda conn: store.sweeps.load(conn, resume_minutes))
        state = begin(store, self.cache, self.kind, checkpoint, now)
        tell = log.debug if self.kind in {"poll", "plan"} else log.info
        tell("sweep.started", sweep=state.number, resumed=state.resume_at is not None)
        state.count_api_time(self.fetcher.api_time.of("sweep"))
        applier = PageApplier(store, state)
        return Walk(self.fetcher, applier, self.on_page, outwards=self.outwards)

    def _attempt(self, walk: Walk, began: float) -> Report:
        try:
            walk.run()
            was_empty = self._list_was_empty(walk.state)
            deletions = Deletions(self.fetcher, walk.applier, self.policy, was_empty)
            refused = self._refused_all(walk.state)
            closing = deletions.settle() if refused is None else []
        except Stopped as error:
            walk.save_checkpoint()
            self._end(walk, "stopped", error, began)
            raise
        except (SourceUnavailable, SweepIncomplete, Misconfigured) as error:
            incomplete = isinstance(error, SweepIncomplete)
            self._end(walk, "incomplete" if incomplete else "failed", error, began)
            raise
        except (DatabaseUnavailable, LeaseLost) as error:
            self._tell(walk.state, "failed", error, began)
            raise
        if refused is not None:
            # The list was read to its end: the next sweep begins at its start.
            self._end(walk, "failed", refused, began, [self.store.sweeps.clear()])
            raise refused
        if deletions.trouble is not None:
            self._end(walk, "incomplete", deletions.trouble, began, closing)
            raise deletions.trouble
        walk.state.counts["unasked"] = deletions.unasked
        return self._complete(walk, closing, began)

    def _complete(self, walk: Walk, closing: list[Statement], began: float) -> Report:
        state, store = walk.state, self.store
        with self.cache.lock:
            state.counts["held"] = len(state.in_state("held"))
            outcome = "held" if state.counts["held"] else "complete"
            self.cache.compared = True
            if state.wrote_nothing and not self.leaves_row:
                return self._tell(state, outcome, None, began)
            closing += [store.sweeps.clear(), store.sweeps.prune()]
            report = self._end(walk, outcome, None, began, closing)
            if state.from_start:
                state.forget()
            return report

    def _refused_all(self, state: SweepState) -> Misconfigured | None:
        """Give the error if the database refuses all users: then no record is to blame."""
        reason = state.refused_all
        if reason is None or self.kind == "plan":
            return None
        return Misconfigured(
            f"no user could be stored, the last was {reason}; see the triggers and constraints of"
            " the table, and the log of the database"
        )

    @staticmethod
    def _list_was_empty(state: SweepState) -> bool:
        return not state.counts["users"] and not state.quarantined_seen

    def _end(
        self,
        walk: Walk,
        outcome: str,
        error: UsersSyncError | None,
        began: float,
        closing: list[Statement] | None = None,
    ) -> Report:
        """Write the sweep's row with its outcome, and log it."""
        state = walk.state
        row = state.row(outcome, str(error) if error else None)
        self.store.write([*(closing or []), self.store.sweeps.record(row)], state.number)
        return self._tell(state, outcome, error, began)

    def _loudness(self, state: SweepState, outcome: str) -> Callable[..., object]:
        """A poll that saw the whole list is worth a line only if it changed something.

        A plan is no sweep at all.
        """
        whole = outcome in {"complete", "held"}
        if self.kind == "plan":
            return log.debug
        if self.kind == "poll" and whole and not state.changed_something:
            return log.debug
        return log.info if outcome in {"complete", "stopped"} else log.warning

    def _tell(
        self, state: SweepState, outcome: str, error: UsersSyncError | None, began: float
    ) -> Report:
        seconds = self.store.database.clock.monotonic() - began
        report = Report(
            sweep=state.number,
            kind=state.kind,
            outcome=outcome,
            counts={name: state.counts[name] for name in COUNTS},
            unchanged=state.unchanged,
            waiting=state.waiting,
            candidates=len(state.in_state("candidate")),
            duration_seconds=round(seconds, 3),
            changed_something=state.changed_something,
            api_seconds=state.row().api_seconds,
            error=str(error) if error else None,
        )
        tell = self._loudness(state, outcome)
        tell(
            "sweep.finished",
            sweep=report.sweep,
            kind=report.kind,
            outcome=outcome,
            **report.figures,
            duration_seconds=report.duration_seconds,
            api_seconds=report.api_seconds,
            **({"error": report.error} if report.error else {}),
        )
        return report
