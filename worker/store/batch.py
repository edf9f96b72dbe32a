"""Applies the users of one answer: in parts, halved where the database refuses one of them."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from worker.errors import Blocked, DataRefused, Transient, UpdatesRefused
from worker.model import Key, User, Users
from worker.store.lease import Lease
from worker.store.quarantine import BadRecord, Quarantine, refused_record
from worker.store.statement import Row, Statement
from worker.store.table import INSERTED, STALE, RowResults, Table

log = structlog.stdlib.get_logger(__name__)

# More in one transaction would make both sides hold too much at once; a tuned page fits into one,
# so that it costs two round trips.
PART_BYTES = 16_000_000

# The server reads a statement as a whole before it does anything. Of 8 MB it took 51 us a user, and
# 45 us in four statements, of which it works on the first while the second is still being sent.
STATEMENT_BYTES = 2_000_000

# So many in a row, whose rows nobody keeps locked, are not some users but the whole table.
MOST_BLOCKED = 3


# A statement to commit with the last part of a batch, or one that tells what became of its users.
Extra = Statement | Callable[[Sequence[RowResults]], Statement]


class _KnownAfterAll(Exception):
    """Somebody who was taken for a newcomer has a row."""


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
    """Users of one answer on their way into the table, and what must be written with the last.

    `newcomers` says that nobody of them is known to have a row.
    """

    table: Table
    lease: Lease
    quarantine: Quarantine
    sweep: int
    observed_at: datetime
    assume_new: bool = False
    part_bytes: int = PART_BYTES
    statement_bytes: int = STATEMENT_BYTES
    applied: BatchResult = field(default_factory=BatchResult)
    blocked: int = 0
    _length: int = 1
    _refusal: UpdatesRefused | None = None
    _recorded: int = 0

    def apply(self, users: Users, extras: Sequence[Extra]) -> BatchResult:
        """Apply `users`; `extras` are committed with the last part.

        Raises what Lease.commit raises, and Transient if the table as a whole is locked. Before it
        raises UpdatesRefused, because a row would have to be updated, it has inserted those who had
        none, without the extras.
        """
        self._length = _length(users, self.statement_bytes)
        parts = _cut(users, _length(users, self.part_bytes))
        for part in parts[:-1]:
            self._apply(part, ())
        self._apply(parts[-1], extras)
        if self._refusal is not None and any(self.applied.by(STALE)):
            self._commit_rejected()
            raise self._refusal
        if self._refusal is not None:
            self._commit([], extras)
        self._commit_rejected()
        return self.applied

    def _apply(self, users: Users, extras: Sequence[Extra]) -> None:
        extras = () if self._refusal else extras
        if not users:
            self._commit([], extras)
            return
        parts = _cut(users, self._length)
        statements = [self._write(part) for part in parts]
        try:
            rows = self._commit(statements, extras, parts)
        except _KnownAfterAll:
            self._look_up(users, extras)
        except UpdatesRefused as error:
            if self._refusal is not None:
                raise  # it is a table of ours that takes no updates
            self._refusal = error
            self._apply(users, ())
        except (DataRefused, Blocked) as error:
            if self.assume_new:
                self._look_up(users, extras)
            else:
                self._halve(users, extras, error)
        else:
            self.blocked = 0
            for part, row in zip(parts, rows, strict=False):
                self._take(part, row)

    def _write(self, users: Users) -> Statement:
        if self.assume_new:
            return self.table.insert(users, self.observed_at)
        write = self.table.add if self._refusal else self.table.apply
        return write(users, self.observed_at)

    def _look_up(self, users: Users, extras: Sequence[Extra]) -> None:
        """Apply those of whom nobody was known to have a row, after all as any others."""
        self.assume_new = False
        self._apply(users, extras)

    def _halve(self, users: Users, extras: Sequence[Extra], error: DataRefused | Blocked) -> None:
        """Look for the culprit: one of two halves, or the one user that is left."""
        middle = len(users) // 2
        if middle and isinstance(error, Blocked) and (free := self._not_locked(users)) is not users:
            self._apply(free, extras)
        elif middle:
            self._apply(users[:middle], ())
            self._apply(users[middle:], extras)
        elif isinstance(error, DataRefused):
            self._reject(users[0], error, extras)
        else:
            self._leave(users[0], error, extras)

    def _not_locked(self, users: Users) -> Users:
        """Leave rows that an application keeps locked for the next sweep, however many."""
        try:
            [row] = self._commit([self.table.locked(users)], ())
        except Blocked:
            return users
        locked = set(row[0] or ()) if row else set()
        for user in users:
            if user.id in locked:
                self._leave_locked(user)
        return users.without(locked) if locked else users

    def _leave_locked(self, user: User) -> None:
        self.applied.results.append((Users.of([user]), STALE))
        log.warning("row.blocked", user=user.id)

    def _reject(self, user: User, error: DataRefused, extras: Sequence[Extra]) -> None:
        self.applied.rejected.append(refused_record(user, error))
        self._commit([], extras)

    def _leave(self, user: User, error: Blocked, extras: Sequence[Extra]) -> None:
        """Leave a user at whom the database keeps waiting for the next sweep."""
        self.blocked += 1
        if self.blocked >= MOST_BLOCKED:
            raise Transient(f"{self.table.schema}.users_sync is locked: {error}")
        self._leave_locked(user)
        self._commit([], extras)

    def _commit(
        self,
        first: list[Statement],
        extras: Sequence[Extra],
        parts: Sequence[Users] = (),
    ) -> list[Row | None]:
        """Commit statements, the first of which apply these parts, and the extras."""
        known = [extra for extra in extras if isinstance(extra, Statement)]
        known += self._record() if extras else []
        later = [extra for extra in extras if not isinstance(extra, Statement)]
        if not (first or extras):
            return []

        def closing(rows: Sequence[Row | None]) -> list[Statement]:
            results = list(self.applied.results)
            for part, row in zip(parts, rows, strict=False):
                letters, *_ = self._told(row)
                if len(letters) < len(part):
                    raise _KnownAfterAll
                results.append((part, letters))
            return [build(results) for build in later]

        rows = self.lease.commit([*first, *known], self.sweep, closing)
        self._recorded = len(self.applied.rejected) if extras else self._recorded
        return rows

    def _commit_rejected(self) -> None:
        """Quarantine who was refused and is not recorded yet."""
        if unrecorded := self._record():
            self.lease.commit(unrecorded, self.sweep)

    def _record(self) -> list[Statement]:
        """Give the statement that quarantines who was refused: all of them together, at the end."""
        new = self.applied.rejected[self._recorded :]
        return [self.quarantine.put(new)] if new else []

    def _told(self, row: Row | None) -> Row:
        """Give letters, positions and millis as `Table.apply` returns them."""
        if row is None:
            raise Transient("the database gave no answer to a statement")
        return (INSERTED * row[0], None, None) if self.assume_new else row

    def _take(self, users: Users, row: Row | None) -> None:
        letters, positions, millis = self._told(row)
        self.applied.results.append((users, letters))
        for position, old in zip(positions or (), millis or (), strict=True):
            self.applied.moved.append((old, users[position].id))


def _length(users: Users, most: int) -> int:
    """Say how many of these users are `most` bytes."""
    return max(1, len(users) * most // max(users.size, most))


def _cut(users: Users, length: int) -> list[Users]:
    """Cut users into parts of this length; nobody is one part, too."""
    return [users[at : at + length] for at in range(0, len(users), length)] or [users]
