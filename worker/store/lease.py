"""Who may write: one row per target, and a fence that every writing transaction passes first.

`epoch` counts the acquisitions, also those by the same worker again; `writes` the fenced
transactions, and those of commands that changed a live row. A fence is an update of the row that
succeeds only under the own epoch, and tells `writes`:

             acquire: epoch + 1                 commit, renew: epoch and writes as expected
    free ───────────────────────────▶ held ──────────────────────────────────────────────▶ held
     ▲                                 │ │ │
     │ release, or expired             │ │ └─ another epoch ─────────▶ LeaseLost: free for others
     └─────────────────────────────────┘ └─── other writes, or ──────▶ MirrorOutdated: resync, held
                                              another table

In quiet mode `rest` releases the lease after each job, and the next commit acquires it again: if
epoch or writes moved more than by that, MirrorOutdated.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, TypeVar

import psycopg
import structlog

from worker.errors import LeaseLost, MirrorOutdated, Transient
from worker.settings.names import USUAL_NAMES, Names
from worker.store.connection import Connection
from worker.store.database import Database
from worker.store.identity import IDENTITY, no_table
from worker.store.transaction import LIMITS, Row, Statement, limits, push, transaction

log = structlog.stdlib.get_logger(__name__)

_CREATE = "insert into users_sync_worker.lease (target) values (%(target)s) on conflict do nothing"

_ACQUIRE = f"""
update users_sync_worker.lease
set epoch = epoch + 1, holder = %(holder)s, quiet = %(quiet)s, acquired_at = clock_timestamp(),
    sweep_seconds = %(sweep_seconds)s, sweep_share = %(sweep_share)s,
    expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where target = %(target)s
  and (expires_at <= clock_timestamp() or holder in (%(holder)s, %(dead)s))
  and lower(coalesce(project, %(project)s)) = %(project)s
returning epoch, writes, sweep, lower(project), clock_timestamp(), {IDENTITY}
"""  # noqa: S608  our own statements

_LOOK = """
select epoch, lower(project), holder, expires_at::text,
       greatest(0, extract(epoch from expires_at - clock_timestamp()))::float
from users_sync_worker.lease where target = %(target)s
"""

_BIND = """
update users_sync_worker.lease set project = %(project)s
where target = %(target)s and epoch = %(epoch)s
  and lower(coalesce(project, %(project)s)) = %(project)s
"""

# It checks, renews and puts writers in order at once: a takeover that waits for the row finds the
# new state when it gets it.
_FENCE = f"""
update users_sync_worker.lease
set writes = writes + 1, sweep = greatest(sweep, %(sweep)s),
    polled_at = coalesce(%(polled_at)s, polled_at),
    expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where target = %(target)s and epoch = %(epoch)s and lower(project) = %(project)s
returning writes, clock_timestamp(), {IDENTITY}, pg_current_xact_id()::text
"""  # noqa: S608

_RENEW = f"""
update users_sync_worker.lease
set polled_at = coalesce(%(polled_at)s, polled_at),
    expires_at = clock_timestamp() + make_interval(secs => %(seconds)s)
where target = %(target)s and epoch = %(epoch)s
returning writes, clock_timestamp(), {IDENTITY}
"""  # noqa: S608

_RELEASE = """
update users_sync_worker.lease set expires_at = 'epoch', holder = null
where target = %(target)s and epoch = %(epoch)s
"""

# Its own time-outs end a transaction long before. A backend that blocks the row beyond the end of a
# lease is beyond them: one that is sending to a stopped client, say. `xmax` of a row is the
# transaction that changes or locks it; of several lockers it is no transaction, and none is found.
_END_BLOCKER = """
select a.pid, pg_terminate_backend(a.pid)
from users_sync_worker.lease l join pg_stat_activity a on a.backend_xid = l.xmax
where l.target = %(target)s and l.expires_at <= clock_timestamp()
  and a.xact_start <= clock_timestamp() - make_interval(secs => %(seconds)s)
"""

T = TypeVar("T")
Closing = Callable[[Sequence[Row | None]], Sequence[Statement]]


class _RowLocked(Transient):
    """The lease row is locked."""


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """Who wants to write to which target for which Stack Auth project, `seconds` at a time.

    In quiet mode the lease is given back whenever there is nothing to write. How it means to sweep
    is left for `status`, which judges by it what is too old. `names` is what to call the
    project's settings in an error.
    """

    target: str
    project: str
    holder: str
    seconds: float
    quiet: bool = False
    sweep_seconds: float = 60
    sweep_share: float = 0.25
    names: Names = USUAL_NAMES


@dataclass(frozen=True, slots=True)
class LeaseStatus:
    """What a worker without the lease sees of it; `remaining` is in seconds."""

    epoch: int
    project: str | None
    holder: str | None
    expires_at: str
    remaining: float


class Lease:
    """The right to write; `held` as far as we know."""

    def __init__(self, database: Database, request: LeaseRequest) -> None:
        self.target = request.target
        self.seconds = request.seconds
        self.names = request.names
        self.bound = False
        self.held = False
        self.sweep = 0
        # How often all that is known of the table was given up: it is another one, lacks rows, was
        # written much by others, or could not be loaded again.
        self.distrusted = 0
        # The writing transactions of this worker that the next census of rows may meet.
        self.own_transactions: list[str] = []
        self._database = database
        self._quiet = request.quiet
        # What `writes` must be; None after another writer was detected.
        self._writes: int | None = 0
        # Up to which `writes` the mirror is true, as long as no other worker held the lease.
        self._true_until: int | None = None
        # What the table was when the mirror was loaded.
        self._identity: int | None = None
        self._touched_at = float("-inf")
        self._params: dict[str, Any] = {**asdict(request), "epoch": 0, "polled_at": None}
        self._limits = limits(request.seconds)

    @property
    def writes(self) -> int | None:
        """The number of writing transactions, as far as is known; None after others wrote."""
        return self._writes

    @property
    def identity(self) -> int | None:
        """What the table was when the lease was taken, or the mirror was loaded again."""
        return self._identity

    def forget_before(self, horizon: str) -> None:
        """Forget own transactions that no later census can meet."""
        kept = [each for each in self.own_transactions if int(each) >= int(horizon)]
        self.own_transactions[:] = kept

    def acquire(self, dead: str | None = None) -> bool:
        """Take the lease if it is free, ours or has run out. False if not, or for another project.

        That of a holder who is known to be `dead` is not waited for. Should it live after all, the
        fence keeps it from writing.
        """
        with self._database.lock:
            self._run(_CREATE)
            row = self._run(_ACQUIRE, dead=dead)
            if row is None:
                return False
            self._params["epoch"], self._writes, sweep, project, now, self._identity = row
            self.sweep = max(sweep, self.sweep)
            self._true_until = None
            self.bound = project is not None
            self.held = True
            self._touched(now)
            return True

    def resync(self) -> tuple[int, int] | None:
        """Take over `writes` as it is, before the mirror is brought up to date. Raises LeaseLost.

        Returns from where to where it went since the mirror was true, or None if another holder
        may have been in between, or the table is another one. Raises Misconfigured if there is no
        table.
        """
        with self._database.lock:
            since, self._true_until = self._true_until, None
            if not self.held:
                self._take_again()
                since = None
            row = self._run(_RENEW)
            writes, identity = (row[0], row[2]) if row else (0, None)
            if row and identity is None:
                raise no_table(self.target)
            if identity != self._identity:
                self._identity, since = identity, None
            self._check(row, writes)
            self._writes = writes
            return None if since is None else (since, writes)

    def distrust(self) -> None:
        """Let nothing be written until all that is known of the table was loaded again."""
        with self._database.lock:
            self.distrusted += 1
            self._writes = self._true_until = None

    def rest(self) -> None:
        """Give the lease and the connection back until there is something to write again."""
        with self._database.lock:
            if self.held:
                self.release()
            self._database.close()

    def note_poll(self, at: datetime) -> None:
        """Let the next renewal or write tell when the newest users were last looked at."""
        self._params["polled_at"] = at

    def look(self) -> LeaseStatus | None:
        """See who holds the lease. None if it was never taken."""
        row = self._call(lambda conn: conn.execute(_LOOK, self._params).fetchone())
        return None if row is None else LeaseStatus(*row)

    def bind(self) -> None:
        """Bind the target to our project, for good."""
        self._run(_BIND)
        self.bound = True

    def release(self) -> None:
        """Give the lease back, if it is still ours."""
        self.held = False
        self._run(_RELEASE)

    def renew_if_due(self) -> None:
        """Renew the lease every third of its life. Raises LeaseLost or MirrorOutdated.

        A worker that makes no progress does not, so that another one takes over.
        """
        watch = self._database.retry.watch
        if watch is not None and watch.stalled():
            return
        with self._database.lock:
            if not self.held:
                self._rested_or_lost()
            elif self._database.clock.monotonic() - self._touched_at >= self.seconds / 3:
                self._check(self._run(_RENEW), self._writes)
            if self._writes is None:
                raise MirrorOutdated("the mirror is yet to be loaded again")

    def commit(
        self, statements: Sequence[Statement], sweep: int, closing: Closing | None = None
    ) -> list[Row | None]:
        """Run statements in one fenced transaction, two round trips in all.

        `closing` is told what they returned, and gives more to run before the transaction ends.
        Returns the first row of each statement, or (how many it wrote,) if it gives none. Raises
        LeaseLost if another worker took the lease, MirrorOutdated if another writer used it,
        DataRefused or Blocked for what the statements met. In quiet mode a lease that was given
        back is taken again first.
        """
        with self._database.lock:
            if not self.held:
                epoch, writes, identity = self._params["epoch"], self._writes, self._identity
                self._take_again()
                if identity != self._identity:
                    raise self._another_table()
                alone = epoch == self._params["epoch"] - 1
                if not alone or writes != self._writes:
                    self._writes, self._true_until = None, writes if alone else None
                    raise MirrorOutdated("another writer changed the table meanwhile")
            rows = self._call(lambda conn: self._commit(conn, statements, sweep, closing))
        if (watch := self._database.retry.watch) is not None:
            watch.moved()
        return rows

    def _take_again(self) -> None:
        """Take the lease again, which raises the epoch by one. Raises LeaseLost."""
        self._rested_or_lost()
        if not self.acquire():
            raise LeaseLost(f"another worker is at work on {self.target}")

    def _rested_or_lost(self) -> None:
        if not self._quiet:
            raise LeaseLost(f"the lease on {self.target} is not held any more")

    def _run(self, query: str, **more: object) -> Row | None:
        """Run one statement on the lease row alone, within the same limits as any write."""
        return self._call(lambda conn: self._run_limited(conn, query, {**self._params, **more}))

    def _run_limited(
        self, conn: Connection, query: str, params: Mapping[str, object]
    ) -> Row | None:
        try:
            with transaction(conn):
                conn.execute(LIMITS, self._limits)
                cursor = conn.execute(query, params)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled) as error:
            raise lease_row_is_locked() from error
        return cursor.fetchone() if cursor.description else None

    def _call(self, work: Callable[[Connection], T]) -> T:
        # The next worker ends what takes longer.
        seconds = self.seconds
        return self._database.call(lambda conn: self._past_stuck_backends(conn, work), seconds)

    def _past_stuck_backends(self, conn: Connection, work: Callable[[Connection], T]) -> T:
        """Run `work`; if the row is locked past the lease's expiry, terminate the blocking backend.

        That may be the holder before, or what is left of a connection that we lost.
        """
        try:
            return work(conn)
        except _RowLocked:
            for pid, ended in conn.execute(_END_BLOCKER, self._params):
                log.warning("backend.ended", pid=pid, ended=ended, target=self.target)
            raise

    def _commit(
        self,
        conn: Connection,
        statements: Sequence[Statement],
        sweep: int,
        closing: Closing | None,
    ) -> list[Row | None]:
        fence = None
        try:
            with transaction(conn) as pipeline:
                conn.execute(LIMITS, self._limits)
                fence = conn.execute(_FENCE, {**self._params, "sweep": sweep})
                cursors = []
                for each in statements:
                    cursors.append(conn.execute(each.query, each.params))
                    push(conn)
                pipeline.sync()
                self._check(fenced := fence.fetchone(), self._next())
                rows = [_returned(cursor) for cursor in cursors]
                for each in closing(rows) if closing else ():
                    conn.execute(each.query, each.params)
                push(conn)
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled) as error:
            if fence is None or fence.pgresult is None:
                raise lease_row_is_locked() from error
            raise
        except psycopg.Error:
            # In a table that is another one statements fail for no fault of their own.
            if fence is not None and fence.pgresult is not None and (row := fence.fetchone()):
                self._check(row, self._next())
            raise
        self._writes = self._next()
        self.own_transactions += [fenced[3]] if fenced else []
        return rows

    def _next(self) -> int | None:
        return None if self._writes is None else self._writes + 1

    def _check(self, row: Row | None, writes: int | None) -> None:
        if row is None:
            self.held = False
            raise LeaseLost(f"another worker took the lease on {self.target}")
        if row[2] != self._identity:
            raise self._another_table()
        if row[0] != writes:
            if self._writes is not None:
                self._writes, self._true_until = None, self._writes
            raise MirrorOutdated("another writer changed the table meanwhile")
        self._touched(row[1])

    def _another_table(self) -> MirrorOutdated:
        self.distrust()
        return MirrorOutdated("the table was emptied, replaced or altered")

    def _touched(self, now: datetime) -> None:
        self._database.clock.learn(now)
        self._touched_at = self._database.clock.monotonic()


def _returned(cursor: psycopg.Cursor[Row]) -> Row | None:
    return cursor.fetchone() if cursor.description else (cursor.rowcount,)


def lease_row_is_locked() -> Transient:
    return _RowLocked("the lease row is locked by another session")
