"""The commands, what they print, and the exit code each ends with."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NoReturn, TypeVar

import structlog
import typer
from rich.console import Console

from worker import display
from worker.clock import Clock
from worker.errors import (
    Blocked,
    DatabaseUnavailable,
    LeaseLost,
    Misconfigured,
    SourceUnavailable,
    Stopped,
    SweepIncomplete,
    UsersSyncError,
)
from worker.log import configure_logging, keep_out_of_logs
from worker.once import opened_database, sweep_once
from worker.operate.check import check as find_problems
from worker.settings import EMBEDDED, Settings, load_settings
from worker.signals import Signals
from worker.store.database import Connection, Database
from worker.store.deletions import Deletions
from worker.store.schema import creation_sql, missing_migrations, prepare

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")

DONE, BUG, USAGE, HELD = 0, 1, 2, 6
EXIT_CODES: dict[type[UsersSyncError], int] = {
    Misconfigured: USAGE,
    SourceUnavailable: 3,
    SweepIncomplete: 3,
    DatabaseUnavailable: 4,
    Blocked: 4,
    LeaseLost: 5,
}

Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="The settings file to read.")
]
LogFormat = Annotated[
    Literal["auto", "json", "console"] | None,
    typer.Option("--log-format", help="How to log; auto is JSON unless on a terminal."),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error"] | None,
    typer.Option("--log-level", help="From which level on to log."),
]
Once = Annotated[bool, typer.Option("--once", help="Sweep once, then exit: for cron.")]

app = typer.Typer(
    name="users-sync",
    help="Keeps neon_auth.users_sync in a Postgres equal to the users of a Stack Auth project.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
deletions_app = typer.Typer(rich_markup_mode=None)


def main() -> NoReturn:
    """Run the command line; every way out leads through here."""
    try:
        code = typer.main.get_command(app).main(prog_name="users-sync", standalone_mode=False)
    except typer.TyperException as error:
        sys.exit(_complain(f"{error.format_message()} (`users-sync --help` lists what there is)"))
    except UsersSyncError as error:
        sys.exit(_exit_code(error))
    except typer.Abort:
        sys.exit(130)
    except Exception as error:
        log.exception("worker.failed")
        sys.exit(_complain(f"a bug, please report it: {type(error).__name__}", BUG))
    sys.exit(code or DONE)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    *,
    once: Once = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    if context.invoked_subcommand is None:
        return run(once=once, config=config, log_format=log_format, log_level=log_level)
    if once or config or log_format or log_level:
        raise Misconfigured("options stand after the command")
    return DONE


@app.command()
def run(
    *,
    once: Once = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Bring the table into line with the project, and keep it so until stopped."""
    settings = _settings(config, log_format, log_level)
    if not once:
        return _serve(settings)
    console = Console(stderr=True)
    with (
        _signals() as signals,
        _database_url(settings) as url,
        display.progress(console) as on_page,
    ):
        # Only now: on a terminal the progress display has its hand on stdout.
        configure_logging(settings.log.level, settings.log.format, sys.stdout)
        report = sweep_once(settings, url, signals.stop, on_page)
    if console.is_terminal:
        console.print(display.summary(report))
    return HELD if report.outcome == "held" else DONE


def _serve(settings: Settings) -> int:
    """Work until a signal; that is what was asked for, so it is a success."""
    from worker.service import Service  # noqa: PLC0415 - one sweep starts sooner without it

    settings.require_stack()
    with Signals() as signals, _database_url(settings) as url:
        configure_logging(settings.log.level, settings.log.format, sys.stdout)
        try:
            Service(settings, url, signals.stop).run()
        except Stopped:
            log.debug("worker.stopped")
    return DONE


@app.command()
def init(
    *,
    print_sql: Annotated[
        bool, typer.Option("--print-sql", help="Print the SQL instead of running it.")
    ] = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Create the schema, the tables and the index; what is there stays as it is."""
    settings = _settings(config, log_format, log_level)
    target = settings.database.schema_name
    if print_sql:
        print(creation_sql(target), end="")
        return DONE
    with _opened(settings) as database:
        missing = len(database.call(missing_migrations))
        shape = prepare(database, target)
    print(f"{target}.users_sync: ready ({shape.value})")
    print(f"users_sync_worker: {f'{missing} SQL files applied' if missing else 'up to date'}")
    return DONE


@app.command()
def check(
    *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Look at configuration, credentials, privileges and the table; a line each, with the fix."""
    settings = _settings(config, log_format, log_level)
    settings.require_stack()
    codes = []
    with _database_url(settings) as url:
        for finding in find_problems(settings, url):
            print(f"{finding.verdict:<5} {finding.subject:<14} {finding.text}", flush=True)
            codes.append(finding.exit_code)
    return min((code for code in codes if code), default=DONE)


app.add_typer(deletions_app, name="deletions")


@deletions_app.callback(invoke_without_command=True)
def deletions(
    context: typer.Context,
    *,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Show which rows are suspected, held, approved or hidden; `approve` lets held ones through."""
    if context.invoked_subcommand is not None:
        if config or log_format or log_level:
            raise Misconfigured("options stand after the command")
        return DONE
    settings = _settings(config, log_format, log_level)
    with _opened(settings) as database:
        rows = database.call(_initialised(Deletions(settings.database.schema_name).listed))
    if not rows:
        print("No user of the table is missing from the list.")
        return DONE
    print(display.as_psql(("user", "state", "first noticed", "last noticed"), rows))
    held = [first for _, state, first, _ in rows if state == "held"]
    if held:
        print(
            f"{len(held)} deletions are held. If these users did leave, let them through with\n"
            f"  {_command()} deletions approve {max(held)}"
        )
    return DONE


@deletions_app.command()
def approve(
    sweep: Annotated[int, typer.Argument(help="Covers what was first noticed up to this sweep.")],
    *,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Let held deletions through; the next sweep asks for a fresh proof of each."""
    settings = _settings(config, log_format, log_level)
    rows = Deletions(settings.database.schema_name)
    with _opened(settings) as database:
        approved = database.call(_initialised(lambda conn: rows.approve(conn, sweep)))
    if not approved:
        raise Misconfigured(
            f"nothing is held that was first noticed up to sweep {sweep};"
            f" `{_command()} deletions` shows what is held"
        )
    print(
        f"Approved {approved} deletions. The next sweep asks for each user again, and marks those"
        " deleted that are still gone."
    )
    return DONE


@app.command(hidden=True)
def probe(
    *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Ask the worker on this machine whether it is alive: for the image's health check."""
    from worker.web import probe as is_alive  # noqa: PLC0415 - one sweep starts sooner

    http = _settings(config, log_format, log_level).http
    # Whoever turned the endpoints off does without.
    return DONE if http.port == 0 or is_alive(http.host, http.port) else BUG


@app.command()
def demo(
    *,
    users: Annotated[
        int, typer.Option("--users", min=0, help="How many users to begin with.")
    ] = 5000,
    keep: Annotated[
        bool, typer.Option("--keep", help="Leave API and database running until Ctrl-C.")
    ] = False,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Show it all on this machine: a Postgres, a fake Stack Auth API, and two sweeps."""
    from worker.sandbox.demo import Demo  # noqa: PLC0415 - the extra may not be installed

    configure_logging(log_level or "error", log_format or "auto", sys.stderr)
    say = partial(print, flush=True)  # also down a pipe, where Python would keep the lines back
    with _signals() as signals:
        Demo(users=users, keep=keep, command=_command(), new_stop=signals.new_stop, say=say).run()
    return DONE


def _settings(config: Path | None, log_format: str | None, log_level: str | None) -> Settings:
    """Read the settings, and log to stderr as they say."""
    flags = {"log": {"format": log_format, "level": log_level}}
    settings = load_settings(config=config, overrides=flags, environ=os.environ)
    keep_out_of_logs(settings.secrets())
    configure_logging(settings.log.level, settings.log.format, sys.stderr)
    return settings


@contextmanager
def _signals() -> Iterator[Signals]:
    """Stop on signals; what they stop ends with the exit code that a shell expects."""
    with Signals() as signals:
        try:
            yield signals
        except Stopped:
            raise typer.Exit(signals.exit_code) from None


@contextmanager
def _database_url(settings: Settings) -> Iterator[str]:
    """Give the database's URL, starting the embedded one if that is what is wanted."""
    url = settings.require_database().get_secret_value()
    with ExitStack() as started:
        if url == EMBEDDED:
            from worker.sandbox.postgres import EmbeddedPostgres  # noqa: PLC0415 - an extra

            folder = Path(settings.database.embedded_dir)
            url = started.enter_context(EmbeddedPostgres(folder)).url()
        yield url


@contextmanager
def _opened(settings: Settings) -> Iterator[Database]:
    with (
        _signals() as signals,
        _database_url(settings) as url,
        opened_database(settings, url, Clock(), signals.stop) as database,
    ):
        yield database


def _initialised(work: Callable[[Connection], T]) -> Callable[[Connection], T]:
    """Refuse with a clear line where the worker's tables do not exist yet."""

    def checked(conn: Connection) -> T:
        if missing_migrations(conn):
            raise Misconfigured(f"the worker's tables are not there yet: run `{_command()} init`")
        return work(conn)

    return checked


def _exit_code(error: UsersSyncError) -> int:
    return _complain(str(error), EXIT_CODES.get(type(error), BUG))


def _complain(message: str, code: int = USAGE) -> int:
    print(f"users-sync: {' '.join(message.split())}", file=sys.stderr)
    return code


def _command() -> str:
    """Give what the user typed to start us, so that lines we print can be pasted."""
    program = Path(sys.argv[0])
    return f"{sys.executable} -m worker" if program.name == "__main__.py" else sys.argv[0]
