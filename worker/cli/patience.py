"""How long a command insists on either side while a person waits for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from worker.clock import Clock
from worker.errors import DatabaseUnavailable
from worker.retry import Retry
from worker.settings.settings import Settings
from worker.store.connecting import CONNECT_SECONDS
from worker.store.database import Database
from worker.wiring import opened_database

# Whatever is out of order is told soon.
PATIENCE_MINUTES = 0.5


def impatient(settings: Settings) -> Settings:
    """Return the settings with no more patience than a person has."""
    sides = {
        name: side.model_copy(update={"retry_minutes": min(side.retry_minutes, PATIENCE_MINUTES)})
        for name, side in (("stack", settings.stack), ("database", settings.database))
    }
    return settings.model_copy(update=sides)


@contextmanager
def opened_at_once(settings: Settings, url: str, clock: Clock, stop: Event) -> Iterator[Database]:
    """Open the database, or raise DatabaseUnavailable after one attempt of some seconds.

    What fails in passing later, such as a deadlock, is tried again for a while.
    """
    with opened_database(impatient(settings), url, clock, stop) as database:
        patient = database.retry
        database.retry = Retry(patient.service, 0, stop, DatabaseUnavailable)
        database.call(lambda _: None, CONNECT_SECONDS)
        database.retry = patient
        yield database
