"""Brings single users up to date on request, beside a worker that may be at work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Literal

import httpx

from worker.cli.context import (
    impatient,
    opened_at_once,
    started_database,
    stopped_by_signals,
)
from worker.cli.options import DONE
from worker.clock import Clock
from worker.errors import DataRefused, Misconfigured, Stopped, UpdatesRefused
from worker.model import Proof, Single, Unreadable, User, Users
from worker.settings.settings import Settings
from worker.store.connection import Connection
from worker.store.database import Database
from worker.store.migrate import require_tables
from worker.store.quarantine import BadRecord, Quarantine, refused_record, unreadable_record
from worker.store.suspects import Suspects
from worker.store.table import (
    DELETED,
    INSERTED,
    RESTORED,
    STALE,
    UNCHANGED,
    UPDATED,
    WAITING,
    Table,
)
from worker.store.table_shape import Shape, detect_shape
from worker.store.transaction import Row, Statement
from worker.store.unleased import UnleasedWrites
from worker.sync.confirm import confirm
from worker.sync.fetcher import Fetcher, NoLease
from worker.wiring import opened_fetcher

# How often a user is asked for who is about to sign up.
WAIT_SECONDS = 0.5

Became = Literal[
    "inserted",
    "updated",
    "restored",
    "unchanged",
    "stale",
    "deleted",
    "deleted before",
    "waiting",
    "unreadable",
    "refused",
    "unknown",
]
_BECAME: dict[str, Became] = {
    INSERTED: "inserted",
    UPDATED: "updated",
    RESTORED: "restored",
    UNCHANGED: "unchanged",
    STALE: "stale",
    DELETED: "deleted",
    WAITING: "waiting",
}
_WRITTEN = {INSERTED, UPDATED, RESTORED, DELETED}

# Exit codes: the record could not be read, or the database refuses it.
UNREADABLE, REFUSED = 3, 4


@dataclass(frozen=True, slots=True)
class UserResult:
    """What became of one user; `error` says why it is in quarantine."""

    user_id: str
    became: Became
    error: str = ""

    @property
    def exit_code(self) -> int:
        return {"unreadable": UNREADABLE, "refused": REFUSED}.get(self.became, DONE)

    def sentence(self, settings: Settings) -> str:
        """Say it on one line."""
        grace = f"{settings.deletions.grace_seconds:g} s"
        lease = f"{settings.database.lease_seconds:g} s"
        texts = {
            "stale": "left as it is: the row is newer than the API's answer; try again after"
            f" {grace}",
            "deleted before": "the project does not know this user, whose row was deleted before",
            "waiting": f"gone, but the row is younger than {grace}, or the answer older than"
            f" {lease}: a later sweep deletes it",
            "unreadable": f"in quarantine: {self.error}",
            "refused": f"in quarantine: {self.error}",
            "unknown": "neither the project nor the table knows this user",
        }
        return f"{self.user_id}: {texts.get(self.became, self.became)}"


@dataclass(frozen=True, slots=True)
class Session:
    """Where commands get at both sides. Raises what asking and writing raise."""

    database: Database
    fetcher: Fetcher
    table: Table
    unleased: UnleasedWrites
    suspects: Suspects
    quarantine: Quarantine

    def ask(self, user_id: str) -> Single:
        return self.fetcher.await_answer(self.fetcher.submit_user(user_id))

    def await_user(self, user_id: str, seconds: float) -> Single:
        """Ask for a user, for so long until the API knows it. Raises Stopped in between."""
        deadline = self.database.clock.monotonic() + seconds
        while (single := self.ask(user_id)).found is None:
            left = deadline - self.database.clock.monotonic()
            if left <= 0:
                break
            if self.fetcher.stop.wait(min(WAIT_SECONDS, left)):
                raise Stopped("asked to stop")
        return single

    def gone(self, ids: Sequence[str]) -> set[str]:
        """Give those of these users of whom the API proves that they are gone."""
        verdicts = confirm(self.fetcher, ids)
        if verdicts.trouble is not None:
            raise verdicts.trouble
        return set(verdicts.proofs)

    def sync(self, user_id: str, single: Single | None = None) -> UserResult:
        """Bring one user's row into line with `single`, or with what the API says now."""
        single = single or self.ask(user_id)
        outcome = self._sync(user_id, single)
        # A worker that wrote the row at the same moment may have written just this.
        return self._sync(user_id, single) if outcome.became == "stale" else outcome

    def _sync(self, user_id: str, single: Single) -> UserResult:
        match single.found:
            case None:
                return self._delete(user_id, single)
            case Unreadable() as bad:
                return self._reject(user_id, "unreadable", unreadable_record(bad))
            case User() as user:
                try:
                    letter = self._write(user, single)
                except DataRefused as error:
                    return self._reject(user.id, "refused", refused_record(user, error))
                return UserResult(user.id, _BECAME[letter])

    def _write(self, user: User, single: Single) -> str:
        """Write a user's row; returns a letter. Raises UpdatesRefused if there is one to update."""
        users, at = Users.of([user]), single.observed_at
        try:
            return self._commit(user.id, self.table.apply(users, at))
        except UpdatesRefused:
            # Postgres refuses such a statement also where it would only insert.
            letter = self._commit(user.id, self.table.add(users, at))
            if letter == STALE:
                raise
            return letter

    def _commit(self, user_id: str, statement: Statement) -> str:
        known = [self.suspects.clear([user_id]), self.quarantine.forget(user_id)]
        rows = self.unleased.commit([statement, *known], lambda rows: _written(user_id, rows))
        return _letter(rows)

    def _reject(self, user_id: str, became: Became, rejected: BadRecord) -> UserResult:
        self.unleased.commit([self.quarantine.put([rejected])])
        return UserResult(user_id, became, rejected.error)

    def _delete(self, user_id: str, single: Single) -> UserResult:
        """Mark a user deleted who is proven gone; a user named by a person passes the guard."""
        live = self.database.call(lambda conn: self.table.is_live(conn, user_id))
        if not live:
            statements = [self.quarantine.forget(user_id), self.suspects.strike([user_id])]
            self.unleased.commit(statements)
            return UserResult(user_id, "unknown" if live is None else "deleted before")
        self.unleased.commit([self.quarantine.forget(user_id)])
        # There is no sweep 0, so this deletion, which a person asked for, does not count for the
        # guard.
        statement = self.table.soft_delete([Proof(user_id, single.observed_at)], 0, approved=False)
        rows = self.unleased.commit([statement], lambda rows: _written(user_id, rows))
        became = _BECAME[_letter(rows)]
        if became == "deleted":
            # A row that has to wait stays suspected, or held.
            self.unleased.commit([self.suspects.strike([user_id])])
        return UserResult(user_id, became)


@contextmanager
def command_session(settings: Settings) -> Iterator[Session]:
    """Open both sides until the command ends, by itself or by a signal."""
    settings.require_stack()
    with (
        stopped_by_signals() as signals,
        started_database(settings) as url,
        opened_session(settings, url, signals.stop) as session,
    ):
        yield session


@contextmanager
def opened_session(
    settings: Settings, url: str, stop: Event, transport: httpx.BaseTransport | None = None
) -> Iterator[Session]:
    """Open database and API for a person who waits; creates nothing.

    Raises Misconfigured where no sweep was made yet, or one of another project.
    """
    settings = impatient(settings)
    clock = Clock()
    target = settings.database.schema_name
    with (
        opened_at_once(settings, url, clock, stop) as database,
        opened_fetcher(settings, clock, stop, NoLease(), transport=transport) as fetcher,
    ):
        shape = database.call(lambda conn: _shape(conn, target))
        stack = settings.require_stack()
        seconds = settings.database.lease_seconds
        unleased = UnleasedWrites(
            database, target, stack.project_id, seconds, stack.names.project_id
        )
        unleased.require_project()
        ignored = tuple(settings.stack.ignored_fields)
        table = Table(
            target, shape, ignored, settings.deletions.grace_seconds, proof_seconds=seconds
        )
        yield Session(database, fetcher, table, unleased, Suspects(target), Quarantine(target))


def _shape(conn: Connection, target: str) -> Shape:
    require_tables(conn)
    shape = detect_shape(conn, target)
    if shape is None:
        raise Misconfigured(f"there is no {target}.users_sync: run `users-sync init`")
    return shape


def _letter(rows: Sequence[Row | None]) -> str:
    row = rows[0]
    return str(row[0]) if row else STALE


def _written(user_id: str, rows: Sequence[Row | None]) -> Sequence[str]:
    return [user_id] if _letter(rows) in _WRITTEN else []
