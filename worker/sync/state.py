"""What one sweep knows: where it is, what it has seen, and what it has done so far."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime

from worker.model import Key, User
from worker.store import Store
from worker.store.suspects import Suspect
from worker.store.sweeps import Checkpoint, SweepRow
from worker.store.table import INSERTED, RESTORED, STALE, UPDATED, RowResults
from worker.sync.cache import Cache
from worker.sync.mirror import Mirror

_COUNTED = {INSERTED: "inserted", UPDATED: "updated", RESTORED: "restored", STALE: "stale"}


@dataclass(slots=True)
class SweepState:
    """The state of one sweep.

    `known_at_start` is how many rows were live then. `from_start`: this process walks the list from
    its start, so that what it has not met may be forgotten. `missing` are the suspects, with the
    key their rows had; `quarantined_seen` the quarantined records that were met; `stale` the users
    whose row was newer; `not_live` the suspects without a live row when a resumed sweep began.
    `to_retry` are users whom the database refused before, and when they were observed: they are
    tried again after all others. `off_list` counts the users whom the list lacks and GET found
    changed: they are in `not_as_before`, but not among the counted users of the list.
    """

    number: int
    kind: str
    started: datetime
    cache: Cache
    known_at_start: int = 0
    resume_at: Key | None = None
    from_start: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    missing: dict[str, Key] = field(default_factory=dict)
    quarantined_seen: set[str] = field(default_factory=set)
    stale: set[str] = field(default_factory=set)
    not_live: set[str] = field(default_factory=set)
    to_retry: dict[str, tuple[User, datetime]] = field(default_factory=dict)
    off_list: int = 0
    # Users of this sweep are counted up to `furthest`, and from above `lowest` on.
    furthest: Key | None = None
    lowest: Key | None = None
    waiting: int = 0
    generation: int = 0
    has_written: bool = False
    # A sweep has a row of its own in the table of sweeps.
    owns_row: bool = True
    _api_seconds: float | None = None

    @property
    def mirror(self) -> Mirror:
        return self.cache.mirror

    @property
    def suspects(self) -> dict[str, Suspect]:
        return self.cache.suspects

    @property
    def quarantined(self) -> dict[str, str]:
        return self.cache.quarantined

    def count(self, results: Sequence[RowResults]) -> None:
        """Count what became of the users of a batch; a stale one is met again on the next page."""
        self.counts.update(self._counted(results))
        self.stale.update(stale_ids(results))

    def _counted(self, results: Sequence[RowResults]) -> Counter[str]:
        counts = Counter[str]()
        for _, letters in results:
            counts.update({_COUNTED[each]: letters.count(each) for each in _COUNTED})
        counts[_COUNTED[STALE]] -= len(self.stale.intersection(stale_ids(results)))
        return +counts

    def count_api_time(self, total_seconds: float) -> None:
        """Count how long the API worked since the last call; a checkpoint keeps the count."""
        if self._api_seconds is not None:
            self.counts["api_millis"] += round((total_seconds - self._api_seconds) * 1000)
        self._api_seconds = total_seconds

    @property
    def not_as_before(self) -> int:
        """How many users were not found as they were."""
        return sum(self.counts[name] for name in (*_COUNTED.values(), "quarantined"))

    @property
    def unchanged(self) -> int:
        return max(0, self.counts["users"] + self.off_list - self.not_as_before)

    @property
    def refused_all(self) -> str | None:
        """Why the database refuses users whose records are fine, if no user at all is stored."""
        # A resumed sweep has counted some of them twice.
        none_stored = (
            self.from_start and self.counts["users"] + self.off_list <= self.counts["quarantined"]
        )
        if len(self.mirror) and not none_stored:
            return None
        return self.cache.refusals.reason(self.quarantined_seen)

    @property
    def wrote_nothing(self) -> bool:
        """Whether nothing was written and there is nothing to forget."""
        return not self.has_written and not (
            self.from_start
            and (
                self.suspects.keys() - self.missing.keys()
                or self.quarantined.keys() - self.quarantined_seen
            )
        )

    @property
    def changed_something(self) -> bool:
        names = ("inserted", "updated", "restored", "deleted", "approved", "hidden")
        return any(self.counts[name] for name in names)

    def forget(self) -> None:
        """Forget what a sweep over everything has not noticed again."""
        for user_id in self.suspects.keys() - self.missing.keys():
            del self.suspects[user_id]
        for record in self.quarantined.keys() - self.quarantined_seen:
            del self.quarantined[record]

    def in_state(self, *states: str) -> list[str]:
        """Give the ids of suspects in these states: those never asked about first, then by age.

        A resumed sweep cannot know what its first part noticed again, so it takes all whose rows
        are live.
        """
        # A copy: a poll beside the sweep may strike some of them out.
        suspects = self.suspects.copy()
        ids = [
            user_id
            for user_id, suspect in suspects.items()
            if suspect.state in states
            and (user_id in self.missing or not (self.from_start or user_id in self.not_live))
        ]
        return sorted(ids, key=lambda user_id: (*suspects[user_id].turn, user_id))

    def pass_over_who_is_not_live(self) -> None:
        """Pass over suspects whose rows are marked deleted already: they count only once.

        They stay in memory, as in the database, so that the next answer that shows them strikes
        them out of both.
        """
        if self.suspects:
            keys = self.mirror.keys()
            self.not_live = self.suspects.keys() - {user_id for _, user_id in keys}

    def carry_on(self, before: "SweepState") -> None:
        """Be the same sweep as `before`, whose mirror had to be thrown away.

        The process has seen the part of the list before the checkpoint, and what was written stays
        counted; the guard relies on that for deletions. Only the list is read again from there.
        """
        self.number, self.started = before.number, before.started
        self.from_start = before.from_start or self.resume_at is None
        self.missing.update(before.missing)
        self.quarantined_seen.update(before.quarantined_seen)
        # Those set aside wait for the next sweep: what was asked for before counts for nothing.
        self.quarantined_seen.update(before.to_retry)
        self.stale.update(before.stale)
        self.off_list = before.off_list
        for name in before.counts.keys() - {"pages", "users"}:
            self.counts[name] = max(self.counts[name], before.counts[name])
        self.counts["quarantined"] += len(before.to_retry)
        self.pass_over_who_is_not_live()

    def checkpoint(self, key: Key, results: Sequence[RowResults] = ()) -> Checkpoint:
        """Say how far the sweep has come once the `results` of a batch are counted, too."""
        return Checkpoint(self.number, key, self.counts + self._counted(results), self.started)

    def row(self, outcome: str | None = None, error: str | None = None) -> SweepRow:
        return SweepRow(self.number, self.kind, self.started, self.counts, outcome, error)


def stale_ids(results: Sequence[RowResults]) -> set[str]:
    """Give the users whose rows were locked, or newer than the answer."""
    return {
        user.id
        for users, letters in results
        if STALE in letters
        for user, letter in zip(users, letters, strict=True)
        if letter == STALE
    }


def beside_sweeps(store: Store, cache: Cache) -> SweepState:
    """Give the state of what is applied outside of a sweep: a poll, hints, active users.

    It takes no number of its own: what it writes counts for the sweep before it.
    """
    return SweepState(
        number=max(1, store.lease.sweep),
        kind="poll",
        started=store.database.clock.now(),
        cache=cache,
        generation=cache.generation,
        owns_row=False,
    )


def begin(
    store: Store, cache: Cache, kind: str, checkpoint: Checkpoint | None, now: datetime
) -> SweepState:
    """Give what a sweep starts from: the start of the list, or an unfinished one's checkpoint."""
    state = SweepState(
        number=checkpoint.sweep if checkpoint else store.lease.sweep + 1,
        kind=kind,
        started=checkpoint.started if checkpoint else now,
        cache=cache,
        generation=cache.generation,
    )
    if checkpoint:
        state.resume_at = state.furthest = checkpoint.key
        state.from_start = False
        state.counts = Counter(checkpoint.counts)
        state.pass_over_who_is_not_live()
    state.known_at_start = len(state.mirror)
    store.lease.sweep = max(store.lease.sweep, state.number)
    return state
