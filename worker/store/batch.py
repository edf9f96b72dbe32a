"""Applies the users of one answer: in parts, halved where the database refuses one of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from worker.errors import Blocked, DataRefused, Transient, UpdatesRefused
from worker.model import Key, User, Users
from worker.store.lease import Lease
from worker.store.quarantine import BadRecord, Quarantine, refused_record
from worker.store.table import STALE, RowResults, Table
from worker.store.transaction import Row, Statement

log = structlog.stdlib.get_logger(__name__)

# More in one transaction would make both sides hold too much at once; a tuned page fits into one,
# so that it costs two round trips.
PART_BYTES = 16_000_000

# The server reads a statement as a whole before it does anything. Of 8 MB it took 51 us a user, and
# 45 us in four statements, of which it works on the first while the second is still being sent.
STATEMENT_BYTES = 2_000_000

# This many consecutive time-outs on unlocked rows mean that the table itself is locked.
MOST_BLOCKED = 3

Extra = Statement | Callable[[Sequence[RowResults]], Statement]
"""A statement to commit with the end of a batch, or a function that makes it from the results."""


@dataclass(slots=True)
class BatchResult:
    """What became of the users of a batch, part by part, and the keys they no longer have."""

    results: list[RowResults] = field(default_factory=list)
    moved: list[Key] = field(default_factory=list)
    rejected: list[BadRecord] = field(default_factory=list)

    def by(self, *wanted: str) -> Iterator[Users]:
        """Give the users with one of these letters, part by part."""
        for users, letters in self.results:
            kinds = set(letters)
            if kinds and kinds.issubset(wanted):
                yield users
            elif not kinds.isdisjoint(wanted):
                yield users.only([n for n, letter in enumerate(letters) if letter in wanted])


@dataclass(slots=True)
class Batch:
    """Users of one answer on their way into the table, and what must be written with the last."""

    table: Table
    lease: Lease
    quarantine: Quarantine
    sweep: int
    observed_at: datetime
    part_bytes: int = PART_BYTES
    statement_bytes: int = STATEMENT_BYTES
    applied: BatchResult = field(default_factory=BatchResult)
    blocked: int = 0
    _refusal: UpdatesRefused | None = None

    def apply(self, users: Users, extras: Sequence[Extra]) -> BatchResult:
        """Apply `users`; `extras` are committed with the last part.

        A part that the database refuses is split, and its pieces take their turn, until the user
        stands alone who is to blame. Raises what Lease.commit raises, and Transient if the table
        as a whole is locked. Before it raises UpdatesRefused, because a row would have to be
        updated, it has inserted those who had none, without the extras.
        """
        work = _cut(users, _length(users, self.part_bytes))[::-1]
        length, closed = _length(users, self.statement_bytes), False
        while work:
            part = work.pop()
            closing = [] if work or self._refusal else [*extras, *self._quarantine_rejected()]
            try:
                self._write(_cut(part, length), closing)
            except UpdatesRefused as error:
                if self._refusal is not None:
                    raise  # `add` updates no row of users_sync: a table of the worker refuses
                self._refusal = error
                work.append(part)
            except (DataRefused, Blocked) as error:
                work += self._split(part, error)
            else:
                self.blocked, closed = 0, bool(closing)
        if not closed:
            self._close(extras)
        return self.applied

    def _write(self, parts: Sequence[Users], extras: Sequence[Extra]) -> None:
        """Write these parts in one transaction, and take over what became of their users."""
        write = self.table.add if self._refusal else self.table.apply
        statements = [write(part, self.observed_at) for part in parts]
        fixed = [extra for extra in extras if isinstance(extra, Statement)]

        def closing(rows: Sequence[Row | None]) -> list[Statement]:
            told = [(part, _told(row)[0]) for part, row in zip(parts, rows, strict=False)]
            results = [*self.applied.results, *told]
            return [build(results) for build in extras if not isinstance(build, Statement)]

        rows = self.lease.commit([*statements, *fixed], self.sweep, closing)
        for part, row in zip(parts, rows, strict=False):
            letters, positions, millis = _told(row)
            self.applied.results.append((part, letters))
            for position, old in zip(positions or (), millis or (), strict=True):
                self.applied.moved.append((old, part[position].id))

    def _close(self, extras: Sequence[Extra]) -> None:
        """Commit what no part could be committed with; raise UpdatesRefused if it was met."""
        refused = self._refusal is not None and any(self.applied.by(STALE))
        closing = [*(() if refused else extras), *self._quarantine_rejected()]
        if closing:
            self._write([], closing)
        if refused and self._refusal is not None:
            raise self._refusal

    def _split(self, users: Users, error: DataRefused | Blocked) -> list[Users]:
        """Give the pieces to try next, the last one first; none where one user was to blame."""
        middle = len(users) // 2
        if middle and isinstance(error, Blocked):
            free = self._not_locked(users)
            if free is not users:
                return [free] if free else []
        if middle:
            return [users[middle:], users[:middle]]
        if isinstance(error, DataRefused):
            self.applied.rejected.append(refused_record(users[0], error))
        else:
            self._leave(users[0], error)
        return []

    def _not_locked(self, users: Users) -> Users:
        """Take out users whose rows another session has locked: the next sweep tries them again."""
        try:
            [row] = self.lease.commit([self.table.locked(users)], self.sweep)
        except Blocked:
            return users
        locked = set(row[0] or ()) if row else set()
        for user in users:
            if user.id in locked:
                self._leave_locked(user)
        return users.without(locked) if locked else users

    def _leave(self, user: User, error: Blocked) -> None:
        """Give up a user for now whose row stays locked: the next sweep tries again."""
        self.blocked += 1
        if self.blocked >= MOST_BLOCKED:
            raise Transient(f"{self.table.schema}.users_sync is locked: {error}")
        self._leave_locked(user)

    def _leave_locked(self, user: User) -> None:
        self.applied.results.append((Users.of([user]), STALE))
        log.warning("row.blocked", user=user.id)

    def _quarantine_rejected(self) -> list[Statement]:
        rejected = self.applied.rejected
        return [self.quarantine.put(rejected)] if rejected else []


def _told(row: Row | None) -> Row:
    """Give letters, positions and millis as `Table.apply` returns them."""
    if row is None:
        raise Transient("the database gave no answer to a statement")
    return row


def _length(users: Users, most: int) -> int:
    """Say how many of these users are `most` bytes."""
    return max(1, len(users) * most // max(users.size, most))


def _cut(users: Users, length: int) -> list[Users]:
    """Cut users into parts of this length."""
    return [users[at : at + length] for at in range(0, len(users), length)]
