"""One connection: opened when it is needed, replaced when it broke; its errors mapped once."""

import re
import time
from collections.abc import Callable, Iterator, Mapping
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
from worker.settings.names import USUAL_NAMES, Names
from worker.store.connecting import CONNECT_SECONDS, not_connected
from worker.store.connection import (
    LONGEST_SECONDS,
    Connection,
    DeadlineConnection,
    Stopping,
    unless_stopped,
)

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")

# What the server finds wrong with a row.
_ABOUT_ROWS = {"21", "22", "23", "44", "54", "P0"}

# Of these classes the standard makes no use, and Postgres neither: a trigger's author made it up.
_MADE_UP = tuple("6789IJKLMNOQRSTUVWYZ")

# What a function says, such as a trigger's, may quote the row. These of Postgres' own, by their
# names in its source, speak of privileges and locks alone.
_SPEAKERS = {"aclcheck_error", "DeadLockReport", "ProcessInterrupts"}

# Whether subscribers could find an updated row is looked at for every update of any row.
_REPLICATION = "CheckCmdReplicaIdentity"
# Triggers and functions, in every language of the server: their author may raise any SQLSTATE. The
# context may quote a row, so it is looked at and never told. It is in the server's language, and
# not all of them put spaces around the name: only ASCII counts as part of a word.
_IN_CODE = re.compile(r"\bPL/|\bSQL\b", re.ASCII)

# By these, in the source of Postgres, an author raises an error on purpose.
_RAISERS = {"exec_stmt_raise", "PLy_elog_impl", "throw_tcl_error"}

# A peer that is gone without a word is noticed within half a minute.
KEEPALIVES: Mapping[str, int] = {
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}
_PARAMETERS: dict[str, Any] = {
    "application_name": "users-sync",
    "client_encoding": "utf8",
    **KEEPALIVES,
}


_GREETING = "select clock_timestamp(), current_setting('server_encoding')"


class _Cursor(psycopg.Cursor[tuple[Any, ...]]):
    """A cursor that reads binary results: as text, moments depend on the server's DateStyle."""

    def __init__(self, connection: Connection, *, row_factory: RowFactory[tuple[Any, ...]]) -> None:
        super().__init__(connection, row_factory=row_factory)
        self.format = psycopg.pq.Format.BINARY


class Database:
    """The way to Postgres; relies on nothing of a session, so transaction poolers work.

    `seconds` is how long a call may take that does not ask for more. `names` is what to call the
    database and its settings in an error.
    """

    def __init__(
        self,
        url: str,
        clock: Clock,
        retry: Retry,
        seconds: float = LONGEST_SECONDS,
        *,
        names: Names = USUAL_NAMES,
    ) -> None:
        self.clock = clock
        self.retry = retry
        self.names = names
        # Several threads share the one connection.
        self.lock = RLock()
        self._url = url
        self._seconds = seconds
        self._stopping = Stopping(retry.stop)
        self._connection: DeadlineConnection | None = None

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
        with errors_mapped(self.names):
            try:
                conn, began = self._connected(seconds), time.monotonic()
                result = work(conn)
            except UsersSyncError:
                raise
            except BaseException as error:
                if not _leaves_connection_whole(error, self._connection):
                    self.close()
                raise
        if self.retry.watch is not None:
            self.retry.watch.took(self.retry.service, time.monotonic() - began)
        return result

    def _connected(self, seconds: float) -> Connection:
        if self._connection is not None and not self._connection.closed:
            self._connection.limit(seconds, self._stopping)
            return self._connection
        self._connection = unless_stopped(lambda: connect(self._url), self._stopping)
        self._connection.limit(seconds, self._stopping)
        row = self._connection.execute(_GREETING).fetchone()
        if row is not None:
            now, encoding = row
            if encoding != "UTF8":
                self.close()
                raise Misconfigured(
                    f"{self.names.database}'s encoding is {encoding}, which cannot hold every name:"
                    " create a database with the encoding UTF8, and set"
                    f" {self.names.database_url} to it"
                )
            self.clock.learn(now)
        return self._connection


def connect(url: str) -> DeadlineConnection:
    """Open a connection that proxies like: autocommit, and no prepared statements."""
    return DeadlineConnection.connect(
        url,
        autocommit=True,
        prepare_threshold=None,
        cursor_factory=_Cursor,
        connect_timeout=CONNECT_SECONDS,
        **_PARAMETERS,
    )


@contextmanager
def errors_mapped(names: Names = USUAL_NAMES) -> Iterator[None]:
    """Turn psycopg's errors into ours, named by what the caller must do."""
    try:
        yield
    except psycopg.Error as error:
        ours = _ours(error, names)
        if ours is None:
            raise
        raise ours from (None if error.sqlstate else error)


def _ours(error: psycopg.Error, names: Names) -> UsersSyncError | None:
    state = error.sqlstate
    if state is None:
        return _without_sqlstate(error, names)
    text = f"{_words(error)} ({state})"
    replicated = error.diag.source_function == _REPLICATION
    if not replicated and _is_about_a_row(error, state):
        message = f"{names.database} refuses: {text}; see its log, and the triggers and constraints"
        constraint, in_code = error.diag.constraint_name, _is_in_code(error)
        return DataRefused(message, state, constraint, in_code=in_code)
    if state in {"55P03", "57014"}:
        return Blocked(text)
    if state[:2] in {"08", "25", "40", "53", "55", "57", "58", "XX"} and not replicated:
        return Transient(text)
    if replicated or state[:2] in {"0A", "28", "3D", "3F", "42"}:
        kind = UpdatesRefused if replicated else Misconfigured
        return kind(f"{names.database} refuses: {text}{see_check(names)}")
    return None


def see_check(names: Names) -> str:
    """Say how an error ends that the check explains; the check itself leaves it out."""
    return f"; `{names.check}` says why" if names.check else ""


def _is_about_a_row(error: psycopg.Error, state: str) -> bool:
    """Whether other rows may pass: the row is refused, or code that it ran into failed.

    That code may be locked out, deadlocked or stopped as any statement; and what ends the
    connection says nothing of a row.
    """
    if state[:2] in _ABOUT_ROWS or state.startswith(_MADE_UP):
        return True
    diag = error.diag
    if diag.severity_nonlocalized != "ERROR" or not _is_in_code(error):
        return False
    passing = state in {"55P03", "57014"} or state.startswith("40")
    return not passing or diag.source_function in _RAISERS


def _is_in_code(error: psycopg.Error) -> bool:
    return names_code(error.diag.context or "")


def names_code(context: str) -> bool:
    """Whether the context of an error names a function, or a statement within one."""
    return bool(_IN_CODE.search(context))


def _words(error: psycopg.Error) -> str:
    """Give the server's own words where they cannot quote a row; else the name of the SQLSTATE."""
    diag = error.diag
    quotes = diag.context or (error.sqlstate or "")[:2] in _ABOUT_ROWS
    if quotes and diag.source_function not in _SPEAKERS:
        return _name_of(error)
    return diag.message_primary or _name_of(error)


def _name_of(error: psycopg.Error) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", " ", type(error).__name__).lower()


def _leaves_connection_whole(error: BaseException, connection: DeadlineConnection | None) -> bool:
    """Whether the connection is as before: a row was refused, and the transaction rolled back.

    After any other error it is not worth finding out what state a connection is in.
    """
    return (
        isinstance(error, psycopg.Error)
        and error.sqlstate is not None
        and _is_about_a_row(error, error.sqlstate)
        and connection is not None
        and connection.info.transaction_status is psycopg.pq.TransactionStatus.IDLE
    )


def _without_sqlstate(error: psycopg.Error, names: Names) -> UsersSyncError | None:
    if isinstance(error, psycopg.InternalError):
        # psycopg lost track of the answers, as when a FETCH is cancelled just as it ends.
        return Transient(f"the connection to {names.database} got out of step: {error}")
    if isinstance(error, psycopg.OperationalError | psycopg.InterfaceError):
        return not_connected(error, names)
    return None
