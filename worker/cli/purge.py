"""The command `purge`: remove users who left long ago, after a last proof that they are gone."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated

import typer
from rich.console import Console

from worker.cli import output
from worker.cli.context import read_settings
from worker.cli.options import DONE, Config, LogFormat, LogLevel, ProjectName, seconds_of
from worker.cli.session import Session, command_session
from worker.errors import Blocked, DataRefused, Misconfigured, Stopped
from worker.store.connection import LONGEST_SECONDS
from worker.store.purge import Purging, Reference

BATCH = 500

# So many answers lie between two signs of life, and a stop ends it between any two.
ASKED_AT_ONCE = 20

# So old that no answer which is still under way can bring a purged user back.
LEAST_SECONDS = 3600

FOREIGN_KEY_VIOLATION = "23503"

OnAsked = Callable[[int, int], None]

_BEFORE_ALL = "00000000-0000-0000-0000-000000000000"


def purge(
    *,
    older_than: Annotated[
        str,
        typer.Option(
            "--older-than",
            metavar="AGE",
            help="Purge rows deleted at least this long ago, as in 30d.",
        ),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would be purged; change nothing.")
    ] = False,
    project: ProjectName = None,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Remove rows that were soft-deleted long ago, so that ON DELETE actions run."""
    settings = read_settings(config, log_format, log_level, project)
    seconds = seconds_of(older_than, "--older-than")
    if seconds < LEAST_SECONDS:
        raise Misconfigured(
            "--older-than: should be 1h or more, so that no late answer brings a purged user back"
        )
    with command_session(settings) as session, output.asking(Console(stderr=True)) as on_asked:
        purged = Purge(session, seconds, dry_run, on_asked).run()
    for line in _lines(purged, dry_run=dry_run):
        print(line)
    return DONE


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

    def run(self) -> Purged:
        """Purge in batches; locked rows and rows that others refer to are skipped."""
        rows, database = Purging(self.session.table, self.seconds), self.session.database
        references = database.call(rows.references) if self.dry_run else []
        self.purged.uncounted = [each for each in references if not each.countable]
        asked, of = 0, database.call(rows.count_due, LONGEST_SECONDS)
        self.on_asked(asked, of)
        for ids in self._due(rows):
            gone: set[str] = set()
            for at in range(0, len(ids), ASKED_AT_ONCE):
                some = ids[at : at + ASKED_AT_ONCE]
                gone |= self.session.gone(some)
                asked += len(some)
                of = max(of, asked)  # rows may fall due while it works
                self.on_asked(asked, of)
            self.purged.known += len(ids) - len(gone)
            batch = [user_id for user_id in ids if user_id in gone]
            if self.dry_run:
                self._count(rows, references, batch)
            else:
                self._purge(rows, batch)
        return self.purged

    def _due(self, rows: Purging) -> Iterator[list[str]]:
        behind = _BEFORE_ALL
        while ids := self.session.database.call(
            partial(rows.due, behind=behind, limit=BATCH), LONGEST_SECONDS
        ):
            yield ids
            behind = ids[-1]
            if self.session.fetcher.stop.is_set():
                raise Stopped("asked to stop")

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


def _lines(purged: Purged, *, dry_run: bool) -> Iterator[str]:
    yield f"{'Would purge' if dry_run else 'Purged'} {_amount(purged.users, 'user')}."
    if purged.known:
        yield f"Left {_amount(purged.known, 'user')} whom the project has again."
    for user_id, reason in purged.kept:
        yield f"Left {user_id}: {reason}"
    effects = {
        "cascade": "would go",
        "set null": "would be nulled",
        "set default": "would get their default",
    }
    for reference, rows in purged.referring.items():
        yield f"  {reference}: {_amount(rows, 'row')} {effects[reference.action]}"
    for reference in purged.uncounted:
        yield f"  {reference}: not counted, for this role may not read it"


def _amount(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
