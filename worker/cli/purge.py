"""Removes users who left long ago, after a last look that they are really gone."""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from worker.cli.session import Session
from worker.errors import Blocked, DataRefused, Misconfigured, Stopped
from worker.store.connection import LONGEST_SECONDS
from worker.store.purge import Purging, Reference

BATCH = 500

# So many answers lie between two signs of life, and a stop ends it between any two.
ASKED_AT_ONCE = 20

# So old that no answer which is still under way can bring a purged user back.
LEAST_SECONDS = 3600

DAY_SECONDS = 86_400

# Moments before year 1 are beyond what Postgres and Python can write.
LONGEST_AGE_SECONDS = 36_500 * DAY_SECONDS

FOREIGN_KEY_VIOLATION = "23503"

OnAsked = Callable[[int, int], None]

_AGE = re.compile(r"(\d{1,6})\s*([smhdw])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": DAY_SECONDS, "w": 604_800}
_BEFORE_ALL = "00000000-0000-0000-0000-000000000000"


@dataclass(slots=True)
class Purged:
    """What was purged, or would be: how many users, and who had to stay.

    `known` users the project has again; `kept` are those the database would not let go, with its
    reason; `referring` counts the rows that refer to purged users.
    """

    users: int = 0
    known: int = 0
    kept: list[tuple[str, str]] = field(default_factory=list)
    referring: Counter[Reference] = field(default_factory=Counter)
    uncounted: list[Reference] = field(default_factory=list)


def seconds_of(text: str, option: str) -> int:
    """Read an age such as `30d`. Raises Misconfigured."""
    found = _AGE.fullmatch(text.strip().lower())
    if found is None:
        raise Misconfigured(f"{option}: should be a number with s, m, h, d or w, such as 30d")
    seconds = int(found[1]) * _UNIT_SECONDS[found[2]]
    if seconds > LONGEST_AGE_SECONDS:
        raise Misconfigured(f"{option}: should be at most {LONGEST_AGE_SECONDS // DAY_SECONDS}d")
    return seconds


@dataclass(slots=True)
class Purge:
    """One purge of rows soft-deleted more than `seconds` ago; raises what asking and writing do.

    `on_asked` is told how many users the API was asked for, of how many in all.
    """

    session: Session
    seconds: int
    dry_run: bool
    on_asked: OnAsked = lambda _asked, _of: None
    purged: Purged = field(default_factory=Purged)
    _asked: int = 0
    _of: int = 0

    def run(self) -> Purged:
        """Purge in batches; rows that somebody else keeps are passed by."""
        rows = Purging(self.session.table, self.seconds)
        references = self.session.database.call(rows.references) if self.dry_run else []
        self.purged.uncounted = [each for each in references if not each.countable]
        self._of = self.session.database.call(rows.count_due, LONGEST_SECONDS)
        self.on_asked(0, self._of)
        for ids in self._due(rows):
            gone = self._gone(ids)
            self.purged.known += len(ids) - len(gone)
            batch = [user_id for user_id in ids if user_id in gone]
            if self.dry_run:
                self._count(rows, references, batch)
            else:
                self._purge(rows, batch)
        return self.purged

    def _gone(self, ids: Sequence[str]) -> set[str]:
        """Ask for these users, a few at a time; gives those that are gone."""
        gone: set[str] = set()
        for at in range(0, len(ids), ASKED_AT_ONCE):
            some = ids[at : at + ASKED_AT_ONCE]
            gone |= self.session.gone(some)
            self._asked += len(some)
            # Rows may fall due while it works.
            self._of = max(self._of, self._asked)
            self.on_asked(self._asked, self._of)
        return gone

    def _due(self, rows: Purging) -> Iterator[list[str]]:
        behind = _BEFORE_ALL
        while ids := self._next(rows, behind):
            yield ids
            behind = ids[-1]
            if self.session.fetcher.stop.is_set():
                raise Stopped("asked to stop")

    def _next(self, rows: Purging, behind: str) -> list[str]:
        due = partial(rows.due, behind=behind, limit=BATCH)
        return self.session.database.call(due, LONGEST_SECONDS)

    def _purge(self, rows: Purging, ids: Sequence[str]) -> None:
        """Purge in one transaction, or in ever smaller ones to pass what is refused."""
        if not ids:
            return
        try:
            [row] = self.session.unleased.commit([rows.purge(ids)])
            self.purged.users += row[0] if row else 0
        except (DataRefused, Blocked) as error:
            middle = len(ids) // 2
            if not middle:
                self.purged.kept.append((ids[0], _reason(error)))
                return
            self._purge(rows, ids[:middle])
            self._purge(rows, ids[middle:])

    def _count(self, rows: Purging, references: Sequence[Reference], ids: Sequence[str]) -> None:
        """Count what refers to the users who would go; those whom a foreign key keeps stay."""
        database = self.session.database
        found = {
            by: database.call(partial(rows.referring, reference=by, ids=ids), LONGEST_SECONDS)
            for by in references
            if by.countable
        }
        kept = {user_id: by for by, counts in found.items() if by.keeps for user_id in counts}
        self.purged.kept += [(user_id, _kept_by(by.name)) for user_id, by in sorted(kept.items())]
        self.purged.users += len(ids) - len(kept)
        for by, referring in found.items():
            if not by.keeps:
                going = sum(count for id_, count in referring.items() if id_ not in kept)
                self.purged.referring[by] += going


def _reason(error: DataRefused | Blocked) -> str:
    if isinstance(error, DataRefused) and error.sqlstate == FOREIGN_KEY_VIOLATION:
        return _kept_by(error.constraint or "")
    return f"the database refuses: {error.code if isinstance(error, DataRefused) else error}"


def _kept_by(constraint: str) -> str:
    return f"rows still refer to it: {constraint}"
