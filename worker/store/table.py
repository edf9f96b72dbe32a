"""What is done to users_sync: load the live keys, apply users, mark users deleted."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from operator import attrgetter
from typing import Self

from psycopg import sql
from psycopg.types.json import Jsonb

from worker.model import NO_MILLIS, Proof, Users
from worker.store.census import COUNT, LIST, MOVES, Census
from worker.store.connection import Connection
from worker.store.identity import no_table
from worker.store.table_shape import TABLE, Shape, detect_shape
from worker.store.table_sql import (
    ADD,
    ANSWER_NOT_OLDER,
    APPLY,
    FRESH,
    LOAD,
    LOCKED,
    MILLIS,
    MOVED,
    PLAIN_VALUES,
    PROOF_NOT_OLDER,
    RECORD_DIFFERS,
    SAMPLE,
    SOFT_DELETE,
    STATE,
    THESE,
    YOUNG,
)
from worker.store.transaction import Statement, long_transaction

INSERTED, UPDATED, RESTORED, UNCHANGED, STALE = "iur=s"
DELETED, WAITING = "dw"

RowResults = tuple[Users, str]
"""Users and what became of them, a letter for each."""

# With the letters of a whole transaction this stays below what fits into a socket's buffers: a
# backend that sends more to a stopped client is ended by no time-out. Old keys beyond it stay in
# the mirror: a later sweep finds them missing, asks for their users, and drops them.
MOST_MOVED = 200

_LOAD_CHUNK = 20_000

# Their ids fit into a socket's buffers, as MOST_MOVED do.
MOST_LOCKED = 500


@dataclass(frozen=True, slots=True)
class Table:
    """The users_sync table of one schema, in the shape that was found, and how it is compared.

    A proof that is older than `proof_seconds` marks no row deleted.
    """

    schema: str
    shape: Shape
    ignored_fields: tuple[str, ...]
    grace_seconds: float
    proof_seconds: float = field(default=60, kw_only=True)

    @property
    def relation(self) -> sql.SQL:
        """What is read from and written to, for a query that has parameters."""
        return quoted(self.schema)

    @property
    def own_values(self) -> dict[str, str]:
        """Give the columns that we write beside the record, each with what it must hold."""
        return {} if self.shape is Shape.GENERATED else PLAIN_VALUES

    def as_found(self, conn: Connection) -> Self:
        """Give the table as it is now. Raises Misconfigured if it is gone, or of no known shape."""
        shape = detect_shape(conn, self.schema)
        if shape is None:
            raise no_table(self.schema)
        return replace(self, shape=shape)

    def census(
        self, conn: Connection, before: Census | None = None, own: Sequence[str] = ()
    ) -> Census | None:
        """Count the live rows, and those that were written since, but not by our transactions.

        None if Postgres counted no write since.
        """
        [(moves,)] = conn.execute(MOVES, {"target": self.schema}).fetchall()
        if before is not None and moves is not None and moves == before.moves:
            return None
        params = {"since": before and before.horizon, "own": list(own)}
        [(horizon, live, by_others)] = conn.execute(self._sql(COUNT), params).fetchall()
        return Census(moves, horizon, live, by_others)

    def written_by_others(self, conn: Connection, before: Census, own: Sequence[str]) -> list[str]:
        """Give the ids of the rows that were written since, but not by our transactions."""
        params = {"since": before.horizon, "own": list(own)}
        return [row[0] for row in conn.execute(self._sql(LIST), params)]

    def load_keys(self, conn: Connection) -> Iterator[tuple[int, bytes]]:
        """Give (millis, 16-byte id) of every live row in the order of the list, in one pass."""
        with long_transaction(conn), conn.cursor("users_sync_keys", binary=True) as cursor:
            cursor.itersize = _LOAD_CHUNK
            yield from cursor.execute(self._sql(LOAD, these=sql.SQL("true")), {})

    def load_keys_of(self, conn: Connection, ids: Sequence[str]) -> list[tuple[int, bytes]]:
        """Give (millis, 16-byte id) of those of these users whose rows are live."""
        these = sql.SQL(THESE).format(id_type=self.shape.id_type)
        rows = conn.execute(self._sql(LOAD, these=these), {"ids": list(ids)})
        return [(row[0], row[1]) for row in rows]

    def sample_ids(self, conn: Connection, count: int) -> list[str]:
        """Give up to `count` ids of live rows, spread over the table."""
        with long_transaction(conn):
            return [row[0] for row in conn.execute(self._sql(SAMPLE), {"count": count})]

    def is_live(self, conn: Connection, user_id: str) -> bool | None:
        """Whether a user's row is live; None if there is none."""
        row = conn.execute(self._sql(STATE), {"id": user_id}).fetchone()
        return None if row is None else bool(row[0])

    def apply(self, users: Users, observed_at: datetime) -> Statement:
        """Write what `observed_at` saw of these users, unless a row is newer.

        Returns one letter per user, in order, and of the rows whose key changed the positions and
        the millis they had before.
        """
        params = {
            "records": Jsonb(users, dumps=attrgetter("json")),
            "ignored": list(self.ignored_fields),
            "observed_at": observed_at,
            "grace_seconds": self.grace_seconds,
            "most_moved": MOST_MOVED,
        }
        return Statement(self._sql(APPLY), params)

    def add(self, users: Users, observed_at: datetime) -> Statement:
        """Write those of these users who have no row, and leave the others as they are.

        Returns as `apply` does.
        """
        return replace(self.apply(users, observed_at), query=self._sql(ADD))

    def locked(self, users: Users) -> Statement:
        """Find rows of these users that another session has locked; returns an array of ids."""
        these = sql.SQL(THESE).format(id_type=self.shape.id_type)
        params = {"ids": users.ids, "most": MOST_LOCKED}
        return Statement(self._sql(LOCKED, these=these), params)

    def soft_delete(self, proofs: Sequence[Proof], sweep: int, *, approved: bool) -> Statement:
        """Mark users deleted who are proven gone; returns a letter for each.

        The row of the sweep, which must be there, counts them in the same statement: the guard
        relies on that count.
        """
        params = {
            "target": self.schema,
            "sweep": sweep,
            "ids": [proof.user_id for proof in proofs],
            "observed_at": [proof.asked_at for proof in proofs],
            "grace_seconds": self.grace_seconds,
            "proof_seconds": self.proof_seconds,
        }
        counter = sql.Identifier("approved" if approved else "deleted")
        return Statement(self._sql(SOFT_DELETE, counter=counter), params)

    def _sql(self, template: str, **names: sql.Composable) -> sql.Composed:
        own = self.own_values
        columns = {"raw_json": "i.record", **own}
        if self.shape is not Shape.GENERATED:
            columns["id"] = "i.id"
        differs = [RECORD_DIFFERS, *(f"u.{name} is distinct from {of}" for name, of in own.items())]
        return sql.SQL(template).format(
            **names,
            table=self.relation,
            id_type=self.shape.id_type,
            millis=sql.SQL(MILLIS).format(u=sql.Identifier("u")),
            no_millis=sql.Literal(NO_MILLIS),
            answer_not_older=sql.SQL(ANSWER_NOT_OLDER),
            proof_not_older=sql.SQL(PROOF_NOT_OLDER),
            fresh=sql.SQL(FRESH),
            young=sql.SQL(YOUNG),
            moved=sql.SQL(MOVED),
            differs=sql.SQL(" or ").join(map(sql.SQL, differs)),
            assignments=_listed(f"{name} = {of}" for name, of in columns.items() if name != "id"),
            columns=_listed(columns),
            values=_listed(columns.values()),
        )


def quoted(schema: str) -> sql.SQL:
    """Give the name of a schema's table for a query that has parameters."""
    # A percent sign must be doubled there, and psycopg leaves that to us.
    return sql.SQL(sql.Identifier(schema, TABLE).as_string().replace("%", "%%"))


def _listed(parts: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.SQL, parts))
