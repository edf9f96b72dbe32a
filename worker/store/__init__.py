"""The SQL edge: everything that talks to Postgres."""

from dataclasses import dataclass

from worker.store.database import Database
from worker.store.deletions import Deletions
from worker.store.lease import Lease
from worker.store.progress import Progress
from worker.store.quarantine import Quarantine
from worker.store.users import Table


@dataclass(frozen=True, slots=True)
class Store:
    """One target: its table, and the worker's own tables beside it."""

    database: Database
    lease: Lease
    table: Table
    deletions: Deletions
    quarantine: Quarantine
    progress: Progress
