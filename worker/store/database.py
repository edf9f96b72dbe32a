"""One connection: opened when it is needed, replaced when it broke; its errors mapped once."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import RLock
from typing import Any, TypeVar

import psycopg
import structlog
from psycopg.rows import RowFactory

from worker.clock import Clock
from worker.errors import (
    Blocked,
    DataRefused,
    Misconfigured,
    Transient,
    UpdatesRefused,
    UsersSyncError,
)
from worker.retry import Retry
from worker.store.patience import LONGEST_SECONDS, PatientConnection, Stopping, unless_stopped

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")
Connection = psycopg.Connection[tuple[Any, ...]]

# A failed connection has no SQLSTATE, only the server's words, a pooler's or libpq's own.
_SAID_BY_SERVER = re.compile(r"(?:FATAL|ERROR): +(.*)")
_NOT_LET_IN = (
    "password authentication failed",
    "SASL authentication failed",
    "no pg_hba.conf entry",
    "pg_hba.conf rejects",
    "permission denied for database",
    "role ",
    "database ",
    "no such database",
    "no such user",
)
_SAID_BY_LIBPQ = (
    "certificate",
    "no password supplied",
    "but SSL was required",
    "connection is bad: invalid",
)

# Of these classes the standard makes no use, and Postgres neither: a trigger's author made it up.
_MADE_UP = tuple("6789IJKLMNOQRSTUVWYZ")

# What a function says, such as a trigger's, may quote the row. These of Postgres' own, by their
# names in its source, speak of privileges and locks alone.
_SPEAKERS = {"aclcheck_error", "DeadLockReport", "ProcessInterrupts"}

# Whether subscribers could find an updated row is looked at for every update of any row.
_REPLICATION = "CheckCmdReplicaIdentity"

# `alter database … allow_connections false`, as for a restore or an upgrade.
_CLOSED_FOR_NOW = "is not currently accepting connections"

# How an error ends that the check explains; the check itself leaves it out.
SEE_CHECK = "; `users-sync check` says why"

# A database that sleeps when idle takes some seconds to wake up.
CONNECT_SECONDS = 10

_PARAMETERS: dict[str, Any] = {
    "application_name": "users-sync",
    "client_encoding": "utf8",
    # A peer that is gone without a word is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


class _Cursor(psycopg.Cursor[tuple[Any, ...]]):
    """A cursor that reads binary results: as text, moments depend on the server's DateStyle."""

    def __init__(self, connection: Connection, *, row_factory: RowFactory[tuple[Any, ...]]) -> None:
        super().__init__(connection, row_factory=row_factory)
        self.format = psycopg.pq.Format.BINARY


class Database:
    """The way to Postgres; relies on nothing of a session, so transaction poolers work.

    `seconds` is how long a call may take that does not ask for more.
    """

    def __init__(
        self, url: str, clock: Clock, retry: Retry, seconds: float = LONGEST_SECONDS
    ) -> None:
        self.clock = clock
        self.retry = retry
        # Several threads share the one connection.
        self.lock = RLock()
        self._url = url
        self._seconds = seconds
        self._stopping = Stopping(retry.stop)
        self._connection: PatientConnection | None = None

    def call(self, work: Callable[[Connection], T], seconds: float | None = None) -> T:
        """Run `work` with a connection, again for as long as it fails in passing.

        An attempt that takes longer than `seconds` is given up as one whose connection broke.
        Raises DatabaseUnavailable when the retries are used up; Misconfigured, DataRefused and
        Blocked at once. `work` must be safe to repeat: it owns its transaction.
        """
        with self.lock:
            return self.retry.call(lambda: self._attempt(work, seconds or self._seconds))

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _attempt(self, work: Callable[[Connection], T], seconds: float) -> T:
        with errors_mapped():
            try:
                return work(self._connected(seconds))
            except UsersSyncError:
                raise
            except BaseException:
                # What state a connection is in after an error is not worth finding out.
                self.close()
                raise

    def _connected(self, seconds: float) -> Connection:
        if self._connection is not None and not self._connection.closed:
            self._connection.limit(seconds, self._stopping)
            return self._connection
        self._connection = unless_stopped(lambda: connect(self._url), self._stopping)
        self._connection.limit(seconds, self._stopping)
        row = self._connection.execute("select clock_timestamp()").fetchone()
        if row is not None:
            self.clock.learn(row[0])
        return self._connection


def connect(url: str) -> PatientConnection:
    """Open a connection that proxies like: autocommit, and no prepared statements."""
    return PatientConnection.connect(
        url,
        autocommit=True,
        prepare_threshold=None,
        cursor_factory=_Cursor,
        connect_timeout=CONNECT_SECONDS,
        **_PARAMETERS,
    )


@contextmanager
def errors_mapped() -> Iterator[None]:
    """Turn psycopg's errors into ours, named by what the caller must do."""
    try:
        yield
    except psycopg.Error as error:
        ours = _ours(error)
        if ours is None:
            raise
        raise ours from (None if error.sqlstate else error)


def _ours(error: psycopg.Error) -> UsersSyncError | None:
    state = error.sqlstate
    if state is None:
        return _without_sqlstate(error)
    # For what a record met, the server's own words hold emails: only the SQLSTATE is kept.
    if state[:2] in {"21", "22", "23", "44", "54", "P0"} or state.startswith(_MADE_UP):
        return DataRefused(state, error.diag.constraint_name)
    text = f"{_words(error)} ({state})"
    replicated = error.diag.source_function == _REPLICATION
    if state in {"55P03", "57014"}:
        return Blocked(text)
    if state[:2] in {"08", "25", "40", "53", "55", "57", "58", "XX"} and not replicated:
        return Transient(text)
    if replicated or state[:2] in {"0A", "28", "3D", "3F", "42"}:
        kind = UpdatesRefused if replicated else Misconfigured
        return kind(f"the database refuses: {text}{SEE_CHECK}")
    # Postgres has no such errors for statements like ours, but what a trigger runs may raise any.
    return DataRefused(state, error.diag.constraint_name) if error.diag.context else None


def _words(error: psycopg.Error) -> str:
    diag = error.diag
    if diag.context and diag.source_function not in _SPEAKERS:
        return type(error).__name__
    return diag.message_primary or ""


def _without_sqlstate(error: psycopg.Error) -> UsersSyncError | None:
    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return None
    lines = str(error).strip().splitlines()
    reason = lines[0].strip() if lines else type(error).__name__
    said = [
        text
        for text in _SAID_BY_SERVER.findall(str(error))
        if text.startswith(_NOT_LET_IN) and not text.endswith(_CLOSED_FOR_NOW)
    ]
    if said or any(text in reason for text in _SAID_BY_LIBPQ):
        return Misconfigured(
            f"the database does not let us in: {said[0] if said else reason};"
            " see database.url (DATABASE_URL)"
        )
    return Transient(f"no connection to the database: {reason}")
