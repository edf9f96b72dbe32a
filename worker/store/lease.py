"""Who may write: one row per target, and a fence that every writing transaction passes first."""

import selectors
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime

import psycopg

from worker.errors import LeaseLost, MirrorOutdated, Transient
from worker.store.database import Connection, Database
from worker.store.statement import Row, Statement

# Waiting longer for a row that an application has locked would hold up everybody else's changes.
LOCK_TIMEOUT_SECONDS = 2.0

_CREATE = "insert into users_sync_worker.lease (target) values (%(target)s) on conflict do nothing"

_ACQUIRE = """
update users_sync_worker.lease
set epoch = epoch + 1, holder = %(holder)s, quiet = false,
    expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where target = %(target)s
  and (expires_at <= clock_timestamp() or holder = %(holder)s)
  and coalesce(project, %(project)s) = %(project)s
returning epoch, writes, sweep, project, clock_timestamp()
"""

_LOOK = """
select epoch, project, holder, expires_at::text,
       greatest(0, extract(epoch from expires_at - clock_timestamp()))::float
from users_sync_worker.lease where target = %(target)s
"""

_BIND = """
update users_sync_worker.lease set project = %(project)s
where target = %(target)s and epoch = %(epoch)s and coalesce(project, %(project)s) = %(project)s
"""

# It checks, renews and puts writers in order at once: a takeover that waits for the row finds the
# new state when it gets it.
_FENCE = """
update users_sync_worker.lease
set writes = writes + 1, sweep = greatest(sweep, %(sweep)s),
    expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where target = %(target)s and epoch = %(epoch)s and project = %(project)s
returning writes, clock_timestamp()
"""

_RENEW = """
update users_sync_worker.lease
set expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where target = %(target)s and epoch = %(epoch)s
returning writes, clock_timestamp()
"""

_RELEASE = """
update users_sync_worker.lease set expires_at = 'epoch', holder = null
where target = %(target)s and epoch = %(epoch)s
"""

# Only for this transaction: behind a pooler the session belongs to others as well.
_TIME_LIMITS = """
select set_config('statement_timeout', %(statement)s, true),
       set_config('lock_timeout', %(lock)s, true),
       set_config('idle_in_transaction_session_timeout', %(idle)s, true)
"""


Closing = Callable[[Sequence[Row | None]], Sequence[Statement]]


@dataclass(frozen=True, slots=True)
class Sight:
    """What somebody without the lease sees of it; `remaining` is in seconds."""

    epoch: int
    project: str | None
    holder: str | None
    expires_at: str
    remaining: float


class Lease:
    """The right to write to one target for one Stack Auth project, for `seconds` at a time."""

    def __init__(
        self, database: Database, *, target: str, project: str, holder: str, seconds: float
    ) -> None:
        self.target = target
        self.seconds = seconds
        self.bound = False
        self.sweep = 0
        self._database = database
        self._writes = 0
        self._touched_at = float("-inf")
        self._params = {
            "target": target,
            "project": project,
            "holder": holder,
            "seconds": seconds,
            "epoch": 0,
        }
        self._limits = {
            "statement": f"{int(seconds * 1000 / 2)}ms",
            "lock": f"{int(min(LOCK_TIMEOUT_SECONDS, seconds / 4) * 1000)}ms",
            "idle": f"{int(seconds * 1000 / 3)}ms",
        }

    def acquire(self) -> bool:
        """Take the lease if it is free or has run out. False if not, or for another project."""
        self._run(_CREATE)
        row = self._run(_ACQUIRE)
        if row is None:
            return False
        self._params["epoch"], self._writes, self.sweep, project, now = row
        self.bound = project is not None
        self._touched(now)
        return True

    def resync(self) -> None:
        """Take over `writes` as it is, after the mirror was thrown away. Raises LeaseLost."""
        row = self._run(_RENEW)
        self._writes = row[0] if row else 0
        self._check(row, self._writes)

    def look(self) -> Sight | None:
        """See who holds the lease. None if nobody ever did."""
        row = self._database.call(lambda conn: conn.execute(_LOOK, self._params).fetchone())
        return None if row is None else Sight(*row)

    def bind(self) -> None:
        """Bind the target to our project, for good."""
        self._run(_BIND)
        self.bound = True

    def release(self) -> None:
        """Give the lease back, if it is still ours."""
        self._run(_RELEASE)

    def renew_if_due(self) -> None:
        """Renew the lease every third of its life. Raises LeaseLost or MirrorOutdated."""
        if self._database.clock.monotonic() - self._touched_at < self.seconds / 3:
            return
        self._check(self._run(_RENEW), self._writes)

    def commit(
        self, statements: Sequence[Statement], sweep: int, closing: Closing | None = None
    ) -> list[Row | None]:
        """Run statements in one fenced transaction, two round trips in all.

        `closing` is told what they returned, and gives more to run before the transaction ends.
        Returns the first row of each statement. Raises LeaseLost if somebody took the lease,
        MirrorOutdated if somebody else wrote under it, DataRefused or Blocked for what the
        statements met.
        """
        return self._database.call(lambda conn: self._commit(conn, statements, sweep, closing))

    def _run(self, query: str) -> Row | None:
        """Run one statement on the lease row alone, within the same limits as any write."""
        return self._database.call(lambda conn: self._run_limited(conn, query))

    def _run_limited(self, conn: Connection, query: str) -> Row | None:
        try:
            with _transaction(conn):
                conn.execute(_TIME_LIMITS, self._limits)
                cursor = conn.execute(query, self._params)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled) as error:
            raise _lease_row_is_locked() from error
        return cursor.fetchone() if cursor.description else None

    def _commit(
        self,
        conn: Connection,
        statements: Sequence[Statement],
        sweep: int,
        closing: Closing | None,
    ) -> list[Row | None]:
        fence = None
        try:
            with _transaction(conn) as pipeline:
                conn.execute(_TIME_LIMITS, self._limits)
                fence = conn.execute(_FENCE, {**self._params, "sweep": sweep})
                cursors = [conn.execute(each.query, each.params) for each in statements]
                _push(conn)
                pipeline.sync()
                self._check(fence.fetchone(), self._writes + 1)
                rows = [cursor.fetchone() if cursor.description else None for cursor in cursors]
                for each in closing(rows) if closing else ():
                    conn.execute(each.query, each.params)
                _push(conn)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled) as error:
            if fence is None or fence.pgresult is None:
                raise _lease_row_is_locked() from error
            raise
        self._writes += 1
        return rows

    def _check(self, row: Row | None, writes: int) -> None:
        if row is None:
            raise LeaseLost(f"another worker took the lease on {self.target}")
        if row[0] != writes:
            raise MirrorOutdated("somebody else wrote to the table meanwhile")
        self._touched(row[1])

    def _touched(self, now: datetime) -> None:
        self._database.clock.learn(now)
        self._touched_at = self._database.clock.monotonic()


@contextmanager
def _transaction(conn: Connection) -> Iterator[psycopg.Pipeline]:
    """Run a transaction in a pipeline: psycopg's own would cost three round trips more."""
    try:
        with conn.pipeline() as pipeline:
            conn.execute("begin")
            yield pipeline
            conn.execute("commit")
    except BaseException:
        if not conn.closed:
            conn.rollback()
        raise


def _push(conn: Connection) -> None:
    """Send all that is queued. A pipeline's sync would wait for answers to what it has not sent.

    psycopg gives up sending when the socket's buffer is full, which a page of users fills, and then
    only reads (its issue 685, mended for the end of a pipeline alone).
    """
    with selectors.DefaultSelector() as selector:
        selector.register(conn.fileno(), selectors.EVENT_READ | selectors.EVENT_WRITE)
        while conn.pgconn.flush():
            for _, events in selector.select():
                if events & selectors.EVENT_READ:
                    conn.pgconn.consume_input()


def _lease_row_is_locked() -> Transient:
    return Transient("the lease row is locked by somebody else")
