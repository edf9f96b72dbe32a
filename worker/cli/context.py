"""What a command works with: its settings, its signals, and the way to the database."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import structlog
import typer

from worker.cli.signals import Signals
from worker.clock import Clock
from worker.errors import DatabaseUnavailable, Misconfigured, Stopped
from worker.log.setup import configure_logging, keep_out_of_logs
from worker.retry import Retry
from worker.settings.settings import EMBEDDED, Settings, load_settings
from worker.store.connecting import CONNECT_SECONDS
from worker.store.connection import Connection
from worker.store.database import Database
from worker.store.migrate import require_tables
from worker.wiring import opened_database

T = TypeVar("T")

log = structlog.stdlib.get_logger(__name__)

# A person who waits is told soon.
RETRY_MINUTES = 0.5


def read_settings(
    config: Path | None,
    log_format: str | None,
    log_level: str | None,
    project: str | None = None,
    *,
    quietly: bool = False,
) -> Settings:
    """Read the settings, and log to stderr as they say; `quietly` only errors unless asked.

    With a `project` they are those of this project of the fleet.
    """
    flags = {"log": {"format": log_format, "level": log_level}}
    settings = load_settings(config=config, overrides=flags, environ=os.environ)
    keep_out_of_logs(settings.secrets())
    level = "error" if quietly and log_level is None else settings.log.level
    configure_logging(level, settings.log.format, sys.stderr)
    for name, used in settings.outdated:
        log.warning("setting.outdated", setting=name, used=used)
    if project is None:
        return settings
    from worker.fleet.lookup import settings_of  # noqa: PLC0415  an extra

    with stopped_by_signals() as signals:
        found = settings_of(project, settings, signals.stop)
    keep_out_of_logs(found.secrets())
    return found


@contextmanager
def stopped_by_signals() -> Iterator[Signals]:
    """Stop on signals; what they stop ends with the exit code that a shell expects."""
    with Signals() as signals:
        try:
            yield signals
        except Stopped:
            raise typer.Exit(signals.exit_code) from None


@contextmanager
def started_database(settings: Settings) -> Iterator[str]:
    """Give the database's URL, starting the embedded server if that is configured."""
    url = settings.require_database().get_secret_value()
    with ExitStack() as started:
        if url == EMBEDDED:
            from worker.sandbox.postgres import EmbeddedPostgres  # noqa: PLC0415  an extra

            folder = Path(settings.database.embedded_dir)
            url = started.enter_context(EmbeddedPostgres(folder)).url()
        yield url


@contextmanager
def opened_telemetry(settings: Settings) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Send telemetry if that is configured; gives what is to be called with the metrics.

    Raises Misconfigured where the extra is not installed, or an OTEL_ variable is wrong.
    """
    if not settings.otel.enabled:
        yield lambda _families: None
        return
    try:
        from worker.service.otel.exporting import exporting  # noqa: PLC0415  an extra
    except ModuleNotFoundError as error:
        raise Misconfigured(
            "otel.enabled is set, but OpenTelemetry is not installed: pip install"
            " 'users-sync[otel]'"
        ) from error
    with exporting(os.environ) as send_metrics:
        yield send_metrics


@contextmanager
def opened(settings: Settings) -> Iterator[Database]:
    """Open the database until the command ends, by itself or by a signal."""
    with (
        stopped_by_signals() as signals,
        started_database(settings) as url,
        opened_at_once(settings, url, Clock(), signals.stop) as database,
    ):
        yield database


def impatient(settings: Settings) -> Settings:
    """Return the settings with retries that end before a person loses patience."""
    sides = {
        name: side.model_copy(update={"retry_minutes": min(side.retry_minutes, RETRY_MINUTES)})
        for name, side in (("stack", settings.stack), ("database", settings.database))
    }
    return settings.model_copy(update=sides)


@contextmanager
def opened_at_once(settings: Settings, url: str, clock: Clock, stop: Event) -> Iterator[Database]:
    """Open the database, or raise DatabaseUnavailable after one attempt of some seconds.

    Later failures that may pass, such as a deadlock, are retried for a while.
    """
    with opened_database(impatient(settings), url, clock, stop) as database:
        retries = database.retry
        database.retry = Retry(retries.service, 0, stop, DatabaseUnavailable)
        database.call(lambda _: None, CONNECT_SECONDS)
        database.retry = retries
        yield database


def initialised(work: Callable[[Connection], T]) -> Callable[[Connection], T]:
    """Refuse with a clear line where the worker's tables do not exist yet."""

    def checked(conn: Connection) -> T:
        require_tables(conn)
        return work(conn)

    return checked
