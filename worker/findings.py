"""What one sweep knows: where it is, what it has seen, and what it has done so far."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime

from worker.mirror import Mirror
from worker.model import Key, User
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
    that were missing, with the key they had; `seen` are the quarantined records that were met,
    `stale` the users whose row was newer. `beside` counts what became of users who are not on the
    list, though the API knows them.
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
    stale: set[str] = field(default_factory=set)
    beside: int = 0
    furthest: Key | None = None
    waiting: int = 0

    def count_letters(self, letters: Iterable[tuple[User, str]]) -> None:
        """Count what became of the users of a batch; a stale one is met again on the next page."""
        letters = list(letters)
        self.counts.update(self._counted(letters))
        self.stale.update(user.id for user, letter in letters if letter == STALE)

    def _counted(self, letters: Iterable[tuple[User, str]]) -> Counter[str]:
        return Counter(
            _COUNTED[letter]
            for user, letter in letters
            if letter in _COUNTED and not (letter == STALE and user.id in self.stale)
        )

    @property
    def touched(self) -> int:
        """How many users were not found as they were."""
        return sum(self.counts[name] for name in (*_COUNTED.values(), "quarantined"))

    @property
    def unchanged(self) -> int:
        return max(0, self.counts["users"] + self.beside - self.touched)

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

    def forget_who_is_not_live(self) -> None:
        """Drop suspects that this very sweep has marked deleted already: they count only once."""
        if self.suspects:
            keys = self.mirror.keys()
            live = {user_id for _, user_id in keys}
            self.suspects = {id_: s for id_, s in self.suspects.items() if id_ in live}

    def carry_on(self, before: "Findings") -> None:
        """Be the same sweep as `before`, whose mirror had to be thrown away.

        The process has seen the part of the list before the checkpoint, and what was written stays
        counted; the guard relies on that for deletions. Only the list is read again from there.
        """
        self.number, self.started = before.number, before.started
        self.whole = before.whole or self.resume_at is None
        self.noticed.update(before.noticed)
        self.seen.update(before.seen)
        self.stale.update(before.stale)
        self.beside = before.beside
        for name in before.counts.keys() - {"pages", "users"}:
            self.counts[name] = max(self.counts[name], before.counts[name])
        self.forget_who_is_not_live()

    def checkpoint(self, key: Key, letters: Iterable[tuple[User, str]] = ()) -> Checkpoint:
        """Say how far the sweep has come once what `letters` tell of a batch is counted, too."""
        return Checkpoint(self.number, key, self.counts + self._counted(letters), self.started)

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
        findings.forget_who_is_not_live()
    findings.known_at_start = len(findings.mirror)
    store.lease.sweep = max(store.lease.sweep, findings.number)
    return findings
