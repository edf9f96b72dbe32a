"""The command `sync-user`."""

from typing import Annotated

import typer

from worker.cli.context import read_settings
from worker.cli.options import DAY_SECONDS, Config, LogFormat, LogLevel, ProjectName
from worker.cli.session import command_session
from worker.errors import Misconfigured
from worker.ids import is_user_id


def sync_user(
    user_id: Annotated[str, typer.Argument(metavar="ID", help="The user's id.")],
    *,
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            min=0,
            max=DAY_SECONDS,
            help="Retry for SECONDS until the user exists.",
        ),
    ] = 0,
    project: ProjectName = None,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Update one user's row now, also while a worker is running."""
    settings = read_settings(config, log_format, log_level, project)
    wanted = user_id.strip().lower()
    if not is_user_id(wanted):
        raise Misconfigured(f"{user_id!r} is no user id: those are UUIDs")
    with command_session(settings) as session:
        result = session.sync(wanted, session.await_user(wanted, wait))
    if result.became == "unknown":
        raise Misconfigured(f"neither the project nor the table knows the user {wanted}")
    print(result.sentence(settings))
    return result.exit_code
