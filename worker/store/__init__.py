"""The SQL edge: everything that talks to Postgres."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from worker.errors import Blocked, Transient
from worker.store.connection import Connection
from worker.store.database import Database
from worker.store.hints import Hints
from worker.store.invalidations import Invalidations
from worker.store.lease import Lease
from worker.store.quarantine import Quarantine
from worker.store.snapshots import Snapshots
from worker.store.suspects import Suspects
from worker.store.sweeps import Sweeps
from worker.store.table import Table
from worker.store.transaction import Statement

T = TypeVar("T")


@dataclass(slots=True)
class Store:
    """One target: its table, and the worker's own tables beside it.

    `table` is described again whenever it is loaded.
    """

    database: Database
    lease: Lease
    table: Table
    suspects: Suspects
    quarantine: Quarantine
    sweeps: Sweeps
    invalidations: Invalidations
    hints: Hints
    snapshots: Snapshots

    def read(self, work: Callable[[Connection], T], seconds: float | None = None) -> T:
        """Run `work`, which only reads; a lock or a cancelled query is waited for like an outage.

        `seconds` and errors are those of `Database.call`, without Blocked.
        """
        return self.database.retry.call(
            lambda: _unblocked(lambda: self.database.call(work, seconds))
        )

    def write(self, statements: Sequence[Statement], sweep: int) -> None:
        """Commit statements on the worker's own tables; waits while they are locked."""
        self.database.retry.call(lambda: _unblocked(lambda: self.lease.commit(statements, sweep)))


def _unblocked(attempt: Callable[[], T]) -> T:
    try:
        return attempt()
    except Blocked as error:
        raise Transient(f"a table is locked, or the query was cancelled: {error}") from error
