"""The commands, what they print, and the exit code each ends with."""

import sys
from functools import partial
from typing import Annotated, NoReturn

import structlog
import typer
from rich.console import Console

from worker import display, operator
from worker.command import (
    BUG,
    DONE,
    HELD,
    USAGE,
    Config,
    LogFormat,
    LogLevel,
    group_is_called_alone,
    opened,
    own_name,
    read_settings,
    started_database,
    stopped_by_signals,
)
from worker.ending import leave
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
from worker.log import configure_logging, flush_logging
from worker.once import sweep_once
from worker.operate.check import check as find_problems
from worker.outputs import protect_outputs
from worker.settings import Settings
from worker.signals import Signals
from worker.store.row_security import row_security_sql
from worker.store.schema import (
    creation_sql,
    missing_migrations,
    prepare,
    schema_exists,
    shared_name,
)

log = structlog.stdlib.get_logger(__name__)

EXIT_CODES: dict[type[UsersSyncError], int] = {
    Misconfigured: USAGE,
    SourceUnavailable: 3,
    SweepIncomplete: 3,
    DatabaseUnavailable: 4,
    Blocked: 4,
    LeaseLost: 5,
}

Once = Annotated[bool, typer.Option("--once", help="Sweep once, then exit: for cron.")]

app = typer.Typer(
    name="users-sync",
    help="Keeps neon_auth.users_sync equal to the users of a Stack Auth (now Hexclave) project.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> NoReturn:
    """Run the command line; every way out leads through here."""
    protect_outputs()
    leave(*_outcome())


def _outcome() -> tuple[int, str | None]:
    """Run the command; return its exit code, and what to complain of on stderr."""
    try:
        code = typer.main.get_command(app).main(prog_name="users-sync", standalone_mode=False)
    except typer.TyperException as error:
        text = f"{error.format_message()} (`users-sync --help` lists what there is)"
        return USAGE, _pasteable(text)
    except UsersSyncError as error:
        return _exit_code(error), _pasteable(str(error))
    except typer.Abort:
        return 130, None
    except Exception as error:
        log.exception("worker.failed")
        return BUG, f"a bug, please report it: {type(error).__name__}"
    return code or DONE, None


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    *,
    once: Once = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    if group_is_called_alone(context, once, config, log_format, log_level):
        return run(once=once, config=config, log_format=log_format, log_level=log_level)
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
    settings = read_settings(config, log_format, log_level)
    if not once:
        return _serve(settings)
    console = Console(stderr=True)
    with (
        stopped_by_signals() as signals,
        started_database(settings) as url,
        display.progress(console) as on_page,
    ):
        # Only now: on a terminal the progress display has its hand on stdout.
        configure_logging(settings.log.level, settings.log.format, sys.stdout)
        report = sweep_once(settings, url, signals.stop, on_page)
        flush_logging()
    if console.is_terminal:
        console.print(display.summary(report))
    return HELD if report.outcome == "held" else DONE


def _serve(settings: Settings) -> int:
    """Work until a signal; that is what was asked for, so it is a success."""
    from worker.service import Service  # noqa: PLC0415 - one sweep starts sooner without it

    settings.require_stack()
    with Signals() as signals, started_database(settings) as url:
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
    rls: Annotated[
        bool,
        typer.Option("--rls", help="With --print-sql: row-level security, too."),
    ] = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Create the schema, the tables and the index; what is there stays as it is."""
    settings = read_settings(config, log_format, log_level)
    target = settings.database.schema_name
    if print_sql:
        print(creation_sql(target), end="")
        if rls:
            print(f"\n{row_security_sql(target)}", end="")
        return DONE
    if rls:
        raise Misconfigured("--rls goes with --print-sql: the table's owner is to read and run it")
    with opened(settings) as database:
        missing = len(database.call(missing_migrations))
        created = not database.call(partial(schema_exists, schema=target))
        shape = prepare(database, target)
    print(f"{target}.users_sync: ready ({shape.value})")
    print(f"users_sync_worker: {f'{missing} SQL files applied' if missing else 'up to date'}")
    if created and (warning := shared_name(target)):
        print(f"users-sync: {warning}", file=sys.stderr)
    return DONE


@app.command()
def check(
    *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Look at all that a sweep needs: a line each, with what mends it."""
    settings = read_settings(config, log_format, log_level)
    settings.require_stack()
    codes = []
    with stopped_by_signals() as signals, started_database(settings) as url:
        for finding in find_problems(settings, url, signals.stop):
            print(f"{finding.verdict:<5} {finding.subject:<14} {finding.text}", flush=True)
            codes.append(finding.exit_code)
    return min((code for code in codes if code), default=DONE)


app.command()(operator.plan)
app.command()(operator.status)
app.command(name="sync-user")(operator.sync_user)
app.add_typer(operator.deletions_app, name="deletions")
app.add_typer(operator.quarantine_app, name="quarantine")
app.command()(operator.purge)


@app.command(hidden=True)
def probe(
    *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Ask the worker on this machine whether it is alive: for the image's health check."""
    from worker.web import probe as is_alive  # noqa: PLC0415 - one sweep starts sooner

    http = read_settings(config, log_format, log_level).http
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
    with stopped_by_signals() as signals:
        Demo(users=users, keep=keep, command=own_name(), new_stop=signals.new_stop, say=say).run()
    return DONE


def _exit_code(error: UsersSyncError) -> int:
    codes = (code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
    return next(codes, BUG)


def _pasteable(message: str) -> str:
    """Put a message on one line, with commands named as this one was started."""
    return " ".join(message.split()).replace("`users-sync ", f"`{own_name()} ")
