"""The store without its writing edge: what would be written is asked about, in the same SQL."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from typing import Protocol, Self

from psycopg import sql

from worker.model import Proof, Users
from worker.store.census import Census
from worker.store.connection import Connection
from worker.store.database import Database
from worker.store.lease import Closing, Lease, LeaseRequest
from worker.store.quarantine import BadRecord, Quarantine, QuarantineMark
from worker.store.suspects import Suspect, Suspects
from worker.store.sweeps import Sweeps
from worker.store.table import Table, quoted
from worker.store.table_sql import COMPARED, PROVEN, RETURNED
from worker.store.transaction import LIMITS, Row, Statement, limits, push, transaction

# Nothing is written, so that a single comparison decides.
_COMPARE = f"""{COMPARED}, letters as (
    select position, o.old_millis, i.millis,
           case when o.same is null then 'i'
                when o.same then '='
                when not ({{answer_not_older}}) then 's'
                when o.was_deleted then 'r'
                else 'u' end as letter,
           o.was_deleted, u.raw_json, {{disagreeing}} as columns
    from incoming i left join old o using (position) left join {{table}} u on u.id = i.id
)
{RETURNED},
       coalesce(array_agg(
           json_build_object('raw_json', case letter when 'u' then raw_json end,
                             'columns', columns, 'was_deleted', was_deleted)::text
           order by position) filter (where letter in ('u', 's')), '{{{{}}}}')
from letters
"""  # noqa: S608  our own statements

_PROVE = f"""{PROVEN}
select coalesce(string_agg(
    case when u.id is null or u.deleted_at is not null then 's'
         when {{young}} then 'w'
         when {{proof_not_older}} then 'd'
         else 's' end, '' order by p.position), '')
from proof p left join {{table}} u on u.id = p.id
"""  # noqa: S608

_DISAGREEING = """
case when u.{name} is distinct from {of}
     then jsonb_build_object('{name}', jsonb_build_array(u.{name}, {of})) else '{{}}' end
"""

# Stands for a table that is yet to be created.
_NO_ROWS = """(
    select null::jsonb as raw_json, null::text as id, null::text as name, null::text as email,
           null::timestamptz as created_at, null::timestamptz as updated_at,
           null::timestamptz as deleted_at
    where false
)"""

# Moments within JSON are written in the session's time zone.
_READ_ONLY = """
select set_config('transaction_read_only', 'on', true), set_config('TimeZone', 'UTC', true)
"""

_OWN_TABLES_EXIST = "select to_regclass('users_sync_worker.lease') is not null"

_STANDING = "select lower(project), sweep from users_sync_worker.lease where target = %(target)s"


class Preview(Protocol):
    """Who is told what a sweep would have written.

    A batch may be tried again: what is told twice is the same.
    """

    def compared(self, users: Users, letters: str, old: Sequence[str]) -> str:
        """Take a letter for each user; `old` are the rows, as JSON, of those with u or s.

        Returns the letters that writing would give: who was written with an earlier page is
        unchanged.
        """

    def proven(self, proofs: Sequence[Proof], letters: str, *, approved: bool) -> None: ...

    def rejected(self, records: Sequence[BadRecord]) -> None: ...

    def hidden(self, ids: Iterable[str]) -> None: ...


@dataclass(frozen=True, slots=True)
class Question(Statement):
    """A statement that only reads; `answered` makes what the written one would return."""

    answered: Callable[[Row], Row] = field(kw_only=True)


@dataclass(frozen=True, slots=True)
class DryRunTable(Table):
    """A users_sync table, there or not, that is compared and never written."""

    exists: bool
    preview: Preview

    @property
    def relation(self) -> sql.SQL:
        return quoted(self.schema) if self.exists else sql.SQL(_NO_ROWS)

    def as_found(self, conn: Connection) -> Self:  # noqa: ARG002
        """Stay as it was described: it may not be there."""
        return self

    def census(
        self,
        conn: Connection,
        before: Census | None = None,
        own: Sequence[str] = (),
    ) -> None:
        """Count nothing: what is read once need not be compared later."""

    def apply(self, users: Users, observed_at: datetime) -> Question:
        """Ask what applying these users would do."""
        parts = [_DISAGREEING.format(name=name, of=of) for name, of in self.own_values.items()]
        disagreeing = sql.SQL(" || ").join(map(sql.SQL, ["'{}'::jsonb", *parts]))
        query = self._sql(_COMPARE, disagreeing=disagreeing)
        params = Table.apply(self, users, observed_at).params
        return Question(query, params, answered=partial(self._compared, users))

    def soft_delete(self, proofs: Sequence[Proof], sweep: int, *, approved: bool) -> Statement:
        """Ask which of these users would be marked deleted."""
        params = Table.soft_delete(self, proofs, sweep, approved=approved).params
        answered = partial(self._proven, proofs, approved)
        return Question(self._sql(_PROVE), params, answered=answered)

    def _compared(self, users: Users, row: Row) -> Row:
        return (self.preview.compared(users, row[0], row[-1]), *row[1:-1])

    def _proven(self, proofs: Sequence[Proof], approved: bool, row: Row) -> Row:  # noqa: FBT001
        self.preview.proven(proofs, row[0], approved=approved)
        return row


class DryRunLease(Lease):
    """A lease that is never taken: a commit only asks its questions."""

    def __init__(self, database: Database, request: LeaseRequest) -> None:
        super().__init__(database, request)
        self._asking = database

    def look_up(self) -> str | None:
        """Take over the number of the last sweep; returns the project the target is bound to."""
        row = self._asking.call(lambda conn: _standing(conn, self.target))
        project, self.sweep = row or (None, 0)
        self.bound = project is not None
        return project

    def commit(
        self,
        statements: Sequence[Statement],
        sweep: int,  # noqa: ARG002  the sweep that there is none of
        closing: Closing | None = None,
    ) -> list[Row | None]:
        """Ask the questions among these statements; raises DataRefused or Blocked as a write."""
        rows = [
            each.answered(self._asking.call(partial(self._ask, each)))
            if isinstance(each, Question)
            else None
            for each in statements
        ]
        if closing is not None:
            closing(rows)  # which may object to what it is told
        return rows

    def renew_if_due(self) -> None:
        pass

    def bind(self) -> None:
        pass

    def release(self) -> None:
        pass

    def _ask(self, question: Question, conn: Connection) -> Row:
        with transaction(conn):
            conn.execute(_READ_ONLY)
            conn.execute(LIMITS, limits(self.seconds))
            cursor = conn.execute(question.query, question.params)
            push(conn)
        return cursor.fetchall()[0]


@dataclass(frozen=True, slots=True)
class DryRunSuspects(Suspects):
    """The suspicions that there are, if there is a table of them."""

    exists: bool
    preview: Preview

    def load(self, conn: Connection) -> dict[str, Suspect]:
        return Suspects.load(self, conn) if self.exists else {}

    def hide(self, ids: Iterable[str]) -> Statement:
        ids = list(ids)
        self.preview.hidden(ids)
        return Suspects.hide(self, ids)


@dataclass(frozen=True, slots=True)
class DryRunQuarantine(Quarantine):
    """What is in quarantine, if there is a table of it."""

    exists: bool
    preview: Preview

    def load(self, conn: Connection) -> dict[str, QuarantineMark]:
        return Quarantine.load(self, conn) if self.exists else {}

    def put(self, rejected: Sequence[BadRecord]) -> Statement:
        self.preview.rejected(rejected)
        return Quarantine.put(self, rejected)

    def errors(self, conn: Connection) -> dict[str, str]:
        """Give what is wrong with each record, by what it is known by."""
        return {kept.record: kept.error for kept in self.listed(conn)} if self.exists else {}


@dataclass(frozen=True, slots=True)
class DryRunSweeps(Sweeps):
    """What sweeps did, if there is a table of that."""

    exists: bool

    def deleted_today(self, conn: Connection) -> int:
        return Sweeps.deleted_today(self, conn) if self.exists else 0


def own_tables_exist(conn: Connection) -> bool:
    """Whether the worker's own tables are there."""
    return conn.execute(_OWN_TABLES_EXIST).fetchone() == (True,)


def _standing(conn: Connection, target: str) -> tuple[str | None, int] | None:
    if not own_tables_exist(conn):
        return None
    row = conn.execute(_STANDING, {"target": target}).fetchone()
    return None if row is None else (row[0], row[1])
