"""One connection: opened when it is needed, replaced when it broke; its errors mapped once."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import psycopg
import structlog

from worker.clock import Clock
from worker.errors import Blocked, DataRefused, Misconfigured, Transient, UsersSyncError
from worker.retry import Retry

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")
Connection = psycopg.Connection[tuple[Any, ...]]

# libpq says these only as text: a failed connection has no SQLSTATE.
_WRONG_CREDENTIALS = (
    "password authentication failed",
    "no password supplied",
    "no pg_hba.conf entry",
    "role ",
    "database ",
    "certificate",
    "SSL was required",
    "server does not support SSL",
)

_PARAMETERS: dict[str, Any] = {
    "application_name": "users-sync",
    "client_encoding": "utf8",
    "connect_timeout": 10,
    # A peer that is gone without a word is noticed within half a minute.
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


class Database:
    """The way to Postgres; relies on nothing of a session, so transaction poolers work."""

    def __init__(self, url: str, clock: Clock, retry: Retry) -> None:
        self.clock = clock
        self.retry = retry
        self._url = url
        self._connection: Connection | None = None

    def call(self, work: Callable[[Connection], T]) -> T:
        """Run `work` with a connection, again for as long as it fails in passing.

        Raises DatabaseUnavailable when the retries are used up; Misconfigured, DataRefused and
        Blocked at once. `work` must be safe to repeat: it owns its transaction.
        """
        return self.retry.call(lambda: self._attempt(work))

    def close(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def _attempt(self, work: Callable[[Connection], T]) -> T:
        with errors_mapped():
            try:
                return work(self._connected())
            except psycopg.Error:
                # What state a connection is in after an error is not worth finding out.
                self.close()
                raise

    def _connected(self) -> Connection:
        if self._connection is None or self._connection.closed:
            self._connection = connect(self._url)
            row = self._connection.execute("select clock_timestamp()").fetchone()
            if row is not None:
                self.clock.learn(row[0])
        return self._connection


def connect(url: str) -> Connection:
    """Open a connection that proxies like: autocommit, and no prepared statements."""
    return psycopg.connect(url, autocommit=True, prepare_threshold=None, **_PARAMETERS)


@contextmanager
def errors_mapped() -> Iterator[None]:
    """Turn psycopg's errors into ours, named by what the caller must do."""
    try:
        yield
    except psycopg.Error as error:
        ours = _ours(error)
        if ours is None:
            raise
        raise ours from (None if isinstance(ours, DataRefused) else error)


def _ours(error: psycopg.Error) -> UsersSyncError | None:
    state = error.sqlstate
    if state is None:
        return _without_sqlstate(error)
    # For what a record met, the server's own words hold emails: only the SQLSTATE is kept.
    if state[:2] in {"22", "23", "54"} or state == "P0001":
        return DataRefused(state, error.diag.constraint_name)
    text = f"{error.diag.message_primary or ''} ({state})"
    if state in {"55P03", "57014"}:
        return Blocked(text)
    if state[:2] in {"08", "25", "40", "53", "55", "57", "58", "XX"}:
        return Transient(text)
    if state[:2] in {"0A", "28", "3D", "3F", "42"}:
        return Misconfigured(f"the database refuses: {text}; `users-sync check` says why")
    return None


def _without_sqlstate(error: psycopg.Error) -> UsersSyncError | None:
    if not isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return None
    lines = str(error).strip().splitlines()
    reason = lines[0].strip() if lines else type(error).__name__
    fatal = [line.partition("FATAL:")[2].strip() for line in lines if "FATAL:" in line]
    if any(text.startswith(_WRONG_CREDENTIALS) for text in fatal) or "certificate" in reason:
        return Misconfigured(
            f"the database does not let us in: {fatal[0] if fatal else reason};"
            " see database.url (DATABASE_URL)"
        )
    return Transient(f"no connection to the database: {reason}")
