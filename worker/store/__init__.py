"""The SQL edge: everything that talks to Postgres."""

from collections.abc import Sequence
from dataclasses import dataclass

from worker.errors import Blocked, Transient
from worker.store.database import Database
from worker.store.invalidations import Invalidations
from worker.store.lease import Lease
from worker.store.quarantine import Quarantine
from worker.store.statement import Statement
from worker.store.suspects import Deletions
from worker.store.sweeps import Progress
from worker.store.table import Table


@dataclass(slots=True)
class Store:
    """One target: its table, and the worker's own tables beside it.

    `table` is described again whenever it is loaded.
    """

    database: Database
    lease: Lease
    table: Table
    deletions: Deletions
    quarantine: Quarantine
    progress: Progress
    invalidations: Invalidations

    def write(self, statements: Sequence[Statement], sweep: int) -> None:
        """Commit statements on the worker's own tables; whoever locks those is waited for."""

        def attempt() -> None:
            try:
                self.lease.commit(statements, sweep)
            except Blocked as error:
                raise Transient(f"a table of the worker is locked: {error}") from error

        self.database.retry.call(attempt)
