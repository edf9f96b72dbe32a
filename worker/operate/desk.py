"""Brings single users up to date on request, beside a worker that may be at work."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Event
from typing import Literal

import httpx

from worker.clock import Clock
from worker.errors import DataRefused, Misconfigured, Stopped
from worker.model import Single, Unreadable, User, Users
from worker.once import opened_source
from worker.operate.patience import impatient, opened_at_once
from worker.settings import Settings
from worker.source import Source
from worker.store.beside import Beside
from worker.store.database import Connection, Database
from worker.store.deletions import Deletions
from worker.store.quarantine import Quarantine, Rejected, refused, unreadable
from worker.store.schema import require_tables
from worker.store.shape import Shape, detect_shape
from worker.store.statement import Row
from worker.store.users import (
    DELETED,
    INSERTED,
    RESTORED,
    STALE,
    UNCHANGED,
    UPDATED,
    WAITING,
    Table,
)

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


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one user; `error` says why it is in quarantine."""

    user_id: str
    became: Became
    error: str = ""


class _NoLease:
    """There is nothing to renew."""

    def renew_if_due(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Desk:
    """Where commands get at both sides. Raises what asking and writing raise."""

    database: Database
    source: Source
    table: Table
    beside: Beside
    deletions: Deletions
    quarantine: Quarantine

    def ask(self, user_id: str) -> Single:
        return self.source.await_answer(self.source.ask_user(user_id))

    def await_user(self, user_id: str, seconds: float) -> Single:
        """Ask for a user, for so long until the API knows it. Raises Stopped in between."""
        deadline = self.database.clock.monotonic() + seconds
        while (single := self.ask(user_id)).found is None:
            left = deadline - self.database.clock.monotonic()
            if left <= 0:
                break
            if self.source.stop.wait(min(WAIT_SECONDS, left)):
                raise Stopped("asked to stop")
        return single

    def gone(self, ids: Sequence[str]) -> set[str]:
        """Give those of these users of whom the API proves that they are gone."""
        answers = [(user_id, self.source.ask_user(user_id)) for user_id in ids]
        try:
            return {
                user_id
                for user_id, answer in answers
                if self.source.await_answer(answer).found is None
            }
        finally:
            for _, answer in answers:
                answer.cancel()

    def sync(self, user_id: str, single: Single | None = None) -> Outcome:
        """Bring one user's row into line with `single`, or with what the API says now."""
        single = single or self.ask(user_id)
        outcome = self._sync(user_id, single)
        # A worker that wrote the row at the same moment may have written just this.
        return self._sync(user_id, single) if outcome.became == "stale" else outcome

    def _sync(self, user_id: str, single: Single) -> Outcome:
        match single.found:
            case None:
                return self._delete(user_id, single)
            case Unreadable() as bad:
                return self._reject(user_id, "unreadable", unreadable(bad))
            case User() as user:
                return self._apply(user, single)

    def _apply(self, user: User, single: Single) -> Outcome:
        statements = [
            self.table.apply(Users.of([user]), single.observed_at),
            self.deletions.clear([user.id]),
            self.quarantine.forget(user.id),
        ]
        try:
            rows = self.beside.commit(statements, lambda rows: _written(user.id, rows))
        except DataRefused as error:
            return self._reject(user.id, "refused", refused(user, error))
        return Outcome(user.id, _BECAME[_letter(rows)])

    def _reject(self, user_id: str, became: Became, rejected: Rejected) -> Outcome:
        self.beside.commit([self.quarantine.put([rejected])])
        return Outcome(user_id, became, rejected.error)

    def _delete(self, user_id: str, single: Single) -> Outcome:
        """Mark a user deleted whom the API proved gone; the guard is for those nobody named."""
        live = self.database.call(lambda conn: self.table.is_live(conn, user_id))
        statements = [self.quarantine.forget(user_id)]
        if not live:
            self.beside.commit([*statements, self.deletions.strike([user_id])])
            return Outcome(user_id, "unknown" if live is None else "deleted before")
        self.beside.commit(statements)
        statement = self.table.soft_delete([(user_id, single.observed_at)], 0, approved=False)
        rows = self.beside.commit([statement], lambda rows: _written(user_id, rows))
        became = _BECAME[_letter(rows)]
        if became == "deleted":
            # A row that has to wait stays suspected, or held.
            self.beside.commit([self.deletions.strike([user_id])])
        return Outcome(user_id, became)


@contextmanager
def opened_desk(
    settings: Settings, url: str, stop: Event, transport: httpx.BaseTransport | None = None
) -> Iterator[Desk]:
    """Open database and API for a person who waits; creates nothing.

    Raises Misconfigured where no sweep was made yet, or one of another project.
    """
    settings = impatient(settings)
    clock = Clock()
    target = settings.database.schema_name
    with (
        opened_at_once(settings, url, clock, stop) as database,
        opened_source(settings, clock, stop, _NoLease(), transport=transport) as source,
    ):
        shape = database.call(lambda conn: _shape(conn, target))
        stack = settings.require_stack()
        seconds = settings.database.lease_seconds
        beside = Beside(database, target, stack.project_id, seconds, stack.names.project_id)
        beside.require_project()
        ignored = tuple(settings.stack.ignored_fields)
        table = Table(target, shape, ignored, settings.deletions.grace_seconds)
        yield Desk(database, source, table, beside, Deletions(target), Quarantine(target))


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
