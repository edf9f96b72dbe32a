"""The SQL edge: everything that talks to Postgres."""

from collections.abc import Sequence
from dataclasses import dataclass

from worker.errors import Blocked, Transient
from worker.store.database import Database
from worker.store.invalidations import Invalidations
from worker.store.lease import Lease
from worker.store.quarantine import Quarantine
from worker.store.statement import Statement
from worker.store.suspects import Suspects
from worker.store.sweeps import Sweeps
from worker.store.table import Table


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

    def write(self, statements: Sequence[Statement], sweep: int) -> None:
        """Commit statements on the worker's own tables; whoever locks those is waited for."""

        def attempt() -> None:
            try:
                self.lease.commit(statements, sweep)
            except Blocked as error:
                raise Transient(f"a table of the worker is locked: {error}") from error

        self.database.retry.call(attempt)
