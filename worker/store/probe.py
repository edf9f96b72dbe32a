"""A made-up user, and the statements by which a check tries what the table does with a user."""

from dataclasses import dataclass
from typing import Any

import orjson
from psycopg import sql

from worker.model import UNKNOWN_FINGERPRINT, User, Users
from worker.store.connection import Connection
from worker.store.table import RESTORED, UPDATED, Table
from worker.store.table_sql import RECORD_DIFFERS
from worker.store.transaction import Row, Statement

# The API draws ids of version 4; this one is of version 8, and spells "users-" and "check".
PROBE_ID = "75736572-732d-8000-8000-00636865636b"

_MILLIS = 1_600_000_000_123

_DIFFERING = """
select array_remove(array[
    case when {record} then 'raw_json' end, {others}
    case when {millis} is distinct from (i.record->>'signed_up_at_millis')::bigint
         then 'created_at' end], null)
from {table} u, (select %(record)s::jsonb as record) i
where u.id = %(id)s::{id_type}
"""

_OTHER = "case when u.{name} is distinct from {of} then '{name}' end,"

# Without looking for a row first: what follows then tells an insert from an update.
_INSERT = """
insert into {table} ({columns}, updated_at, deleted_at)
select {values}, null, null
from (select record, (record->>'id')::{id_type} as id
      from jsonb_array_elements(%(records)s::jsonb) as r (record)) i
"""

_MARK = """
update {table} u set deleted_at = clock_timestamp()
where u.id = %(id)s::{id_type} and u.deleted_at is null
returning u.deleted_at is not null
"""


def probe_user(**changes: Any) -> User:
    """Make a user as the API would describe it; `changes` are fields of the record."""
    record = {
        "id": PROBE_ID,
        "signed_up_at_millis": _MILLIS,
        "display_name": "Users-Sync Check",
        "primary_email": "Users-Sync-Check@example.com",
        "primary_email_verified": False,
        "profile_image_url": None,
        "client_metadata": None,
        "client_read_only_metadata": None,
        "server_metadata": None,
        "is_anonymous": False,
        **changes,
    }
    return User(PROBE_ID, _MILLIS, UNKNOWN_FINGERPRINT, orjson.dumps(record))


@dataclass(frozen=True, slots=True)
class ProbedTable(Table):
    """A users_sync table in which a transaction that is rolled back tries everything.

    Each method returns whether the table did as it should.
    """

    def try_insert(self, conn: Connection) -> bool:
        """Insert the user as one who has no row."""
        params = {"records": f"[{probe_user().json.decode()}]"}
        return conn.execute(self._sql(_INSERT), params).rowcount == 1

    def try_find(self, conn: Connection) -> bool:
        """Find the user's row by its id, in each way in which rows are looked for."""
        found = self.load_keys_of(conn, [PROBE_ID])
        _only_row(conn, self.locked(Users.of([probe_user()])))
        return len(found) == 1

    def try_update(self, conn: Connection) -> bool:
        """Write a new name and a new email."""
        changed = probe_user(display_name="Users-Sync", primary_email="Users-Sync@example.com")
        return self._letter(conn, changed) == UPDATED

    def try_soft_delete(self, conn: Connection) -> bool:
        """Mark the user deleted."""
        statement = Statement(self._sql(_MARK), {"id": PROBE_ID})
        return conn.execute(statement.query, statement.params).fetchall() == [(True,)]

    def try_restore(self, conn: Connection) -> bool:
        """Bring the user back."""
        return self._letter(conn, probe_user()) == RESTORED

    def differing(self, conn: Connection) -> list[str]:
        """Name the columns of the user's row that hold another value than was written."""
        own = {name: of for name, of in self.own_values.items() if name != "created_at"}
        others = [sql.SQL(_OTHER).format(name=sql.SQL(n), of=sql.SQL(of)) for n, of in own.items()]
        query = self._sql(
            _DIFFERING, record=sql.SQL(RECORD_DIFFERS), others=sql.SQL(" ").join(others)
        )
        params = {
            "id": PROBE_ID,
            "record": probe_user().json.decode(),
            "ignored": list(self.ignored_fields),
        }
        return [name for (names,) in conn.execute(query, params) for name in names]

    def _letter(self, conn: Connection, user: User) -> str:
        # A second ahead: the statement before may have rounded its moment up to the millisecond.
        [(now,)] = conn.execute("select clock_timestamp() + interval '1 second'").fetchall()
        letters: str = _only_row(conn, self.apply(Users.of([user]), now))[0]
        return letters


def _only_row(conn: Connection, statement: Statement) -> Row:
    return conn.execute(statement.query, statement.params).fetchall()[0]
