"""What one sweep knows: where it is, what it has seen, and what it has done so far."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime

from worker.mirror import Mirror
from worker.model import Key
from worker.store import Store
from worker.store.deletions import Suspect
from worker.store.progress import Checkpoint, SweepRow
from worker.store.users import INSERTED, RESTORED, STALE, UPDATED

_COUNTED = {INSERTED: "inserted", UPDATED: "updated", RESTORED: "restored", STALE: "stale"}


@dataclass(slots=True)
class Findings:
    """The state of one sweep.

    `known_at_start` is how many rows were live then. `whole` says that this process walks the list
    from its start, so that what it has not noticed may be forgotten. `noticed` are the suspects
    that were missing, with the key they had; `seen` are the quarantined records that were met.
    """

    number: int
    kind: str
    started: datetime
    mirror: Mirror
    suspects: dict[str, Suspect]
    rejects: dict[str, str]
    known_at_start: int = 0
    resume_at: Key | None = None
    whole: bool = True
    counts: Counter[str] = field(default_factory=Counter)
    noticed: dict[str, Key] = field(default_factory=dict)
    seen: set[str] = field(default_factory=set)
    furthest: Key | None = None
    waiting: int = 0

    def count_letters(self, letters: Iterable[str]) -> None:
        """Count what became of the users of a batch."""
        for letter, times in Counter(letters).items():
            if letter in _COUNTED:
                self.counts[_COUNTED[letter]] += times

    @property
    def unchanged(self) -> int:
        """How many users were found as they were."""
        touched = sum(self.counts[name] for name in (*_COUNTED.values(), "quarantined"))
        return max(0, self.counts["users"] - touched)

    def in_state(self, *states: str) -> list[str]:
        """Give the ids of suspects in these states, those first noticed first.

        A resumed sweep cannot know what its first part noticed again, so it takes them all.
        """
        ids = [
            user_id
            for user_id, suspect in self.suspects.items()
            if suspect.state in states and (user_id in self.noticed or not self.whole)
        ]
        return sorted(ids, key=lambda user_id: (self.suspects[user_id].first_noticed, user_id))

    def carry_on(self, before: "Findings") -> None:
        """Be the same sweep as `before`, whose mirror had to be thrown away.

        The process has seen the part of the list before the checkpoint, and what was deleted stays
        counted: the guard relies on it.
        """
        self.number, self.started, self.whole = before.number, before.started, before.whole
        self.noticed.update(before.noticed)
        self.seen.update(before.seen)
        for name in ("deleted", "approved"):
            self.counts[name] = max(self.counts[name], before.counts[name])

    def checkpoint(self, key: Key) -> Checkpoint:
        return Checkpoint(self.number, key, self.counts, self.started)

    def row(self, outcome: str | None = None, error: str | None = None) -> SweepRow:
        return SweepRow(self.number, self.kind, self.started, self.counts, outcome, error)


def begin(store: Store, kind: str, resume_minutes: float, now: Callable[[], datetime]) -> Findings:
    """Load what a sweep starts from; go on with an unfinished one if its checkpoint allows."""
    database = store.database
    checkpoint = database.call(lambda conn: store.progress.load(conn, resume_minutes))
    findings = Findings(
        number=checkpoint.sweep if checkpoint else store.lease.sweep + 1,
        kind=kind,
        started=checkpoint.started if checkpoint else now(),
        mirror=database.call(lambda conn: Mirror.load(store.table.load_keys(conn))),
        suspects=database.call(store.deletions.load),
        rejects=database.call(store.quarantine.load),
    )
    if checkpoint:
        findings.resume_at = findings.furthest = checkpoint.key
        findings.whole = False
        findings.counts = Counter(checkpoint.counts)
    findings.known_at_start = len(findings.mirror)
    store.lease.sweep = max(store.lease.sweep, findings.number)
    return findings
