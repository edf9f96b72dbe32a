"""What commands write beside the holder of the lease, so that the holder finds out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import psycopg

from worker.errors import Misconfigured
from worker.store.connection import Connection
from worker.store.database import Database
from worker.store.lease import lease_row_is_locked
from worker.store.transaction import LIMITS, Row, Statement, limits, push, transaction

# The holder's next write waits for it, and then finds `writes` moved.
_LOCK = "select lower(project) from users_sync_worker.lease where target = %(target)s for update"

# For what changes no live row: the holder need not wait.
_LOOK = "select lower(project) from users_sync_worker.lease where target = %(target)s for key share"

_TOUCH = """
with moved as (
    update users_sync_worker.lease set writes = writes + 1 where target = %(target)s
    returning writes
)
insert into users_sync_worker.touched (target, writes, user_id, touched_at)
select %(target)s, writes, id, clock_timestamp() from moved, unnest(%(ids)s::text[]) as id
"""

# The holder looks within a third of its lease; a later leader reads everything anyway.
_PRUNE = """
delete from users_sync_worker.touched
where target = %(target)s and touched_at < clock_timestamp() - interval '1 day'
"""

Changed = Callable[[Sequence[Row | None]], Sequence[str]]
"""Tells from the first row of each statement which live rows were changed."""


def no_live_row(_rows: Sequence[Row | None]) -> Sequence[str]:
    """Say that statements change no live row, whatever they return."""
    return ()


@dataclass(frozen=True, slots=True)
class UnleasedWrites:
    """The way to write to a target without its lease; `seconds` is how long a lease lasts.

    `project_setting` is what to call the project's setting in an error.
    """

    database: Database
    target: str
    project: str
    seconds: float
    project_setting: str

    def commit(
        self, statements: Sequence[Statement], changed: Changed = no_live_row
    ) -> list[Row | None]:
        """Run statements in one transaction; returns the first row of each.

        Raises Misconfigured if the target is not this project's; DataRefused or Blocked for what
        the statements met.
        """
        return self.database.call(lambda conn: self._commit(conn, statements, changed))

    def require_project(self) -> None:
        """Raise Misconfigured if the target is not this project's."""
        query = _LOOK.removesuffix(" for key share")
        params = {"target": self.target}
        self._check(self.database.call(lambda conn: conn.execute(query, params).fetchone()))

    def _commit(
        self, conn: Connection, statements: Sequence[Statement], changed: Changed
    ) -> list[Row | None]:
        params = {"target": self.target}
        lock = None
        try:
            with transaction(conn) as pipeline:
                conn.execute(LIMITS, limits(self.seconds))
                lock = conn.execute(_LOOK if changed is no_live_row else _LOCK, params)
                cursors = [conn.execute(each.query, each.params) for each in statements]
                push(conn)
                pipeline.sync()
                self._check(lock.fetchone())
                rows = [cursor.fetchone() if cursor.description else None for cursor in cursors]
                if ids := changed(rows):
                    conn.execute(_PRUNE, params)
                    conn.execute(_TOUCH, {**params, "ids": list(ids)})
        except (psycopg.errors.LockNotAvailable, psycopg.errors.QueryCanceled) as error:
            if lock is None or lock.pgresult is None:
                raise lease_row_is_locked() from error
            raise
        return rows

    def _check(self, row: Row | None) -> None:
        if row is None or row[0] is None:
            raise Misconfigured(
                f"no sweep of {self.target}.users_sync was made yet: run `users-sync --once` first"
            )
        if row[0] != self.project:
            raise Misconfigured(
                f"{self.target}.users_sync holds the users of another Stack Auth project"
                f" ({row[0]}); set {self.project_setting} to it"
            )
