"""What all commands share: their options, how settings are read, and the way to the database."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import structlog
import typer

from worker.cli.patience import opened_at_once
from worker.cli.signals import Signals
from worker.clock import Clock
from worker.errors import Misconfigured, Stopped
from worker.log.setup import configure_logging, keep_out_of_logs
from worker.settings.settings import EMBEDDED, Settings, load_settings
from worker.store.connection import Connection
from worker.store.database import Database
from worker.store.migrate import require_tables

T = TypeVar("T")

log = structlog.stdlib.get_logger(__name__)

DONE, BUG, USAGE, HELD, DIFFERENT, UNHEALTHY = 0, 1, 2, 6, 7, 8

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The settings file to read.")
]
LogFormat = Annotated[
    Literal["auto", "json", "console"] | None,
    typer.Option("--log-format", help="How to log; auto is JSON unless on a terminal."),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error", "critical"] | None,
    typer.Option("--log-level", help="From which level on to log."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


def group_is_called_alone(context: typer.Context, *options: object) -> bool:
    """Whether no command follows the group; what stands before one that does would be lost."""
    if context.invoked_subcommand is None:
        return True
    if any(options):
        raise Misconfigured("options stand after the command")
    return False


def read_settings(
    config: Path | None, log_format: str | None, log_level: str | None, *, quietly: bool = False
) -> Settings:
    """Read the settings, and log to stderr as they say; `quietly` only errors unless asked."""
    flags = {"log": {"format": log_format, "level": log_level}}
    settings = load_settings(config=config, overrides=flags, environ=os.environ)
    keep_out_of_logs(settings.secrets())
    level = "error" if quietly and log_level is None else settings.log.level
    configure_logging(level, settings.log.format, sys.stderr)
    for name, used in settings.outdated:
        log.warning("setting.outdated", setting=name, used=used)
    return settings


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
    """Give the database's URL, starting the embedded one if that is what is wanted."""
    url = settings.require_database().get_secret_value()
    with ExitStack() as started:
        if url == EMBEDDED:
            from worker.sandbox.postgres import EmbeddedPostgres  # noqa: PLC0415 - an extra

            folder = Path(settings.database.embedded_dir)
            url = started.enter_context(EmbeddedPostgres(folder)).url()
        yield url


@contextmanager
def opened(settings: Settings) -> Iterator[Database]:
    """Open the database until the command ends, by itself or by a signal."""
    with (
        stopped_by_signals() as signals,
        started_database(settings) as url,
        opened_at_once(settings, url, Clock(), signals.stop) as database,
    ):
        yield database


def initialised(work: Callable[[Connection], T]) -> Callable[[Connection], T]:
    """Refuse with a clear line where the worker's tables do not exist yet."""

    def checked(conn: Connection) -> T:
        require_tables(conn)
        return work(conn)

    return checked


def own_name() -> str:
    """Give what the user typed to start us, so that lines we print can be pasted."""
    program = Path(sys.argv[0])
    return f"{sys.executable} -m worker" if program.name == "__main__.py" else sys.argv[0]
