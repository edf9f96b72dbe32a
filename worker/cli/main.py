"""The entry point: the list of commands, and the exit code that each error ends with."""

from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import Annotated, Any, NoReturn

import structlog
import typer
from typer.core import TyperGroup

from worker import installed_version
from worker.cli.ending import leave
from worker.cli.options import (
    BUG,
    DONE,
    USAGE,
    Config,
    LogFormat,
    LogLevel,
    Once,
    group_is_called_alone,
    own_name,
)
from worker.errors import (
    Blocked,
    DatabaseUnavailable,
    LeaseLost,
    Misconfigured,
    SourceUnavailable,
    SweepIncomplete,
    UsersSyncError,
)
from worker.log.outputs import protect_outputs

log = structlog.stdlib.get_logger(__name__)

EXIT_CODES: dict[type[UsersSyncError], int] = {
    Misconfigured: USAGE,
    SourceUnavailable: 3,
    SweepIncomplete: 3,
    DatabaseUnavailable: 4,
    Blocked: 4,
    LeaseLost: 5,
}

# The image is built without it.
SANDBOX = "worker.sandbox"
NO_SANDBOX = (
    "the demo and the embedded Postgres are not in the container image: run this where"
    " `pip install 'users-sync[embedded]'` was run"
)

# Where each command is, and its line in the list of commands. A module is imported when its command
# is used: most of them need the database, the API client or the scheduler.
COMMANDS = {
    "run": ("run:run", "Sync the table with the project continuously, until stopped."),
    "init": ("init:init", "Create the schema, the tables and the index; keep existing ones."),
    "check": (
        "check.command:check",
        "Check configuration, credentials, privileges and the table.",
    ),
    "plan": ("plan.command:plan", "Show what a sweep would change, user by user; write nothing."),
    "status": ("status:status", "Show freshness, recent sweeps and what needs attention."),
    "sync-user": ("sync_user:sync_user", "Update one user's row now."),
    "create-user": (
        "create_user:create_user",
        "Create a user in the project; return when the row is in the table.",
    ),
    "deletions": ("deletions:app", "List suspected, held, approved and hidden rows."),
    "quarantine": ("quarantine:app", "List records that could not be stored, and why."),
    "purge": ("purge:purge", "Remove rows that were soft-deleted long ago."),
    "fleet": ("fleet.command:app", "Sync many projects with several workers."),
    "demo": ("demo:demo", "Run a demo on this machine: a Postgres, a fake API, and two sweeps."),
}


class LazyCommands(MutableMapping[str, Any]):
    """The commands by name, each imported when it is looked up."""

    def __iter__(self) -> Iterator[str]:
        return iter(COMMANDS)

    def __len__(self) -> int:
        return len(COMMANDS)

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = COMMANDS[name][0].partition(":")
        found = getattr(import_module(f"worker.cli.{module}"), attribute)
        if isinstance(found, typer.Typer):
            return typer.main.get_command(found)
        alone = typer.Typer(rich_markup_mode=None, add_completion=False)
        alone.command(name)(found)
        return typer.main.get_command(alone)

    def __setitem__(self, name: str, command: Any) -> None:
        raise TypeError(f"the command {name} belongs into COMMANDS")

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"the command {name} belongs into COMMANDS")


class Program(TyperGroup):
    """The group of all commands; lists them without importing any."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = LazyCommands()

    def format_commands(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


app = typer.Typer(
    name="users-sync",
    cls=Program,
    help="Keep neon_auth.users_sync equal to the users of a Stack Auth (now Hexclave) project.",
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
    """Run the command; return its exit code, and the error message for stderr."""
    try:
        # Standing alone, Typer would print errors in its own words and end the process.
        code = typer.main.get_command(app).main(prog_name="users-sync", standalone_mode=False)
    except typer.TyperException as error:
        text = f"{error.format_message()} (`users-sync --help` lists the commands)"
        return USAGE, _pasteable(text)
    except UsersSyncError as error:
        codes = (code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        return next(codes, BUG), _pasteable(str(error))
    except typer.Abort:
        return 130, None
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == SANDBOX:
            return USAGE, NO_SANDBOX
        log.exception("worker.failed")
        return BUG, f"a bug, please report it: {type(error).__name__}"
    return code or DONE, None


def _show_version(wanted: bool) -> None:  # noqa: FBT001  typer calls it so
    if wanted:
        print(f"users-sync {installed_version()}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    *,
    once: Once = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
    version: Annotated[  # noqa: ARG001  its callback has ended the program
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> int:
    if group_is_called_alone(context, once, config, log_format, log_level):
        from worker.cli.run import run  # noqa: PLC0415  `--help` starts sooner without it

        return run(once=once, config=config, log_format=log_format, log_level=log_level)
    return DONE


def _pasteable(message: str) -> str:
    """Put a message on one line, with commands named as this one was started."""
    return " ".join(message.split()).replace("`users-sync ", f"`{own_name()} ")
