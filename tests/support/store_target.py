"""A users_sync table in a schema of its own, and what the store does with it."""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from threading import Event
from typing import Any
from uuid import UUID

import psycopg
from psycopg import sql

from worker.clock import Clock
from worker.errors import DatabaseUnavailable
from worker.model import User, Users, is_sign_up
from worker.retry import Retry
from worker.sandbox.records import blank
from worker.stack_auth.canonical_json import canonical, dump
from worker.stack_auth.fingerprint import fingerprint
from worker.store.database import Database
from worker.store.lease import Lease, LeaseRequest
from worker.store.table import Table
from worker.store.table_shape import Shape
from worker.store.transaction import Row, Statement

IGNORED = "last_active_at_millis"
SIGNED_UP = 1_600_000_000_000
PROJECT = "11111111-1111-4111-8111-111111111111"

PLAIN_COLUMNS = """
    id {id_type} primary key, raw_json jsonb, name text, email text, created_at timestamptz,
    deleted_at timestamptz, updated_at timestamptz
"""

_COLUMNS = """
select raw_json, name, email, (extract(epoch from created_at) * 1000)::bigint, updated_at,
       deleted_at
from users_sync where id::text = %s
"""
_WAITING = """
select count(*) from pg_stat_activity
where datname = current_database() and wait_event_type = 'Lock'
"""


@dataclass
class Target:
    """One users_sync table, and a connection to look at it, whose search_path is its schema."""

    url: str
    schema: str
    shape: Shape
    conn: psycopg.Connection
    ends: ExitStack

    def query(self, text: str, *params: object) -> list[tuple[Any, ...]]:
        cursor = self.conn.execute(text.encode(), params or None)
        return cursor.fetchall() if cursor.description else []

    def value(self, text: str, *params: object) -> Any:
        return self.query(text, *params)[0][0]

    def now(self) -> datetime:
        moment: datetime = self.value("select clock_timestamp()")
        return moment

    def row(self, user: User) -> tuple[Any, ...]:
        """Give raw_json, name, email, created_at in millis, updated_at, deleted_at."""
        return self.query(_COLUMNS, user.id)[0]

    def ids(self) -> set[str]:
        return {row[0] for row in self.query("select id::text from users_sync")}

    def table(self, grace_seconds: float = 0) -> Table:
        return Table(self.schema, self.shape, (IGNORED,), grace_seconds)

    def run(self, statement: Statement, conn: psycopg.Connection | None = None) -> Row:
        """Run a statement and give its only row."""
        cursor = (conn or self.conn).execute(statement.query, statement.params)
        (row,) = cursor.fetchall()
        return row

    def apply(
        self,
        users: Sequence[User],
        observed_at: datetime | None = None,
        grace_seconds: float = 0,
        conn: psycopg.Connection | None = None,
    ) -> str:
        """Apply users as of now, or of another moment, and give the letters."""
        observed_at = observed_at or self.now()
        letters: str = self.run(
            self.table(grace_seconds).apply(Users.of(users), observed_at), conn
        )[0]
        return letters

    def connect(self, *, lock_timeout: str = "0") -> psycopg.Connection:
        """Open one more autocommit connection; it waits for locks no longer than this."""
        conn = self.ends.enter_context(psycopg.connect(self.url, autocommit=True))
        conn.execute("select set_config('lock_timeout', %s, false)", (lock_timeout,))
        path = sql.Identifier(self.schema).as_string()
        conn.execute("select set_config('search_path', %s, false)", (path,))
        return conn

    def database(
        self,
        *,
        url: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
        retry_seconds: float = 0,
    ) -> Database:
        """Make a worker's connection, which gives up at the first failure unless told otherwise."""
        retry = Retry("the database", retry_seconds / 60, Event(), DatabaseUnavailable)
        database = Database(url or self.url, Clock(monotonic), retry)
        self.ends.callback(database.close)
        return database

    def lease(
        self,
        database: Database | None = None,
        *,
        holder: str = "one",
        project: str = PROJECT,
        seconds: float = 60,
    ) -> Lease:
        """Make a lease that is yet to be acquired."""
        return Lease(
            database or self.database(), LeaseRequest(self.schema, project, holder, seconds)
        )

    def held_lease(self, database: Database | None = None, *, seconds: float = 60) -> Lease:
        """Make a lease, acquire it, and bind the target to the project."""
        lease = self.lease(database, seconds=seconds)
        assert lease.acquire()
        lease.bind()
        return lease

    def run_out(self) -> None:
        """Let the time of the lease pass."""
        self.query(
            "update users_sync_worker.lease set expires_at = clock_timestamp() where target = %s",
            self.schema,
        )

    def lease_row(self, column: str) -> Any:
        query = f"select {column} from users_sync_worker.lease where target = %s"  # noqa: S608
        return self.value(query, self.schema)

    def qualified(self, table: str) -> str:
        """Write the name of a table of this schema, for a statement with parameters."""
        return sql.Identifier(self.schema, table).as_string().replace("%", "%%")

    def await_waiting(self, waiting: int = 1) -> None:
        """Return as soon as so many others wait for a lock."""
        deadline = time.monotonic() + 10
        # Within a transaction the server would give the same answer again and again.
        observer = self.connect()
        while observer.execute(_WAITING).fetchall()[0][0] < waiting:
            assert time.monotonic() < deadline, "nobody waits for a lock"


def user_id(number: int) -> str:
    """Give the id of a user by a number, in the same order."""
    return str(UUID(int=(number << 80) + 0x4000_8000_0000_0000_0000))


def person(number: int, **changes: Any) -> User:
    """Make a user as the API would describe it; `changes` are fields of the record."""
    record = {
        **blank(user_id(number), SIGNED_UP + number),
        "display_name": f"User {number}",
        "primary_email": f"{number}@example.com",
        **changes,
    }
    short = fingerprint(canonical(record, (IGNORED,)))
    millis = record["signed_up_at_millis"]
    return User(record["id"], millis if is_sign_up(millis) else 0, short, dump(record))


def people(*numbers: int, **changes: Any) -> list[User]:
    return [person(number, **changes) for number in numbers]
