"""The commands `quarantine` and `quarantine retry`."""

import typer

from worker.cli import output
from worker.cli.context import initialised, opened, read_settings
from worker.cli.options import (
    DONE,
    Config,
    LogFormat,
    LogLevel,
    ProjectName,
    group_is_called_alone,
    own_name,
)
from worker.cli.session import command_session
from worker.store.quarantine import Quarantine

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.callback(invoke_without_command=True)
def quarantine(
    context: typer.Context,
    *,
    project: ProjectName = None,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """List records that could not be stored, and why; `retry` tries them again."""
    if not group_is_called_alone(context, project, config, log_format, log_level):
        return DONE
    settings = read_settings(config, log_format, log_level, project)
    with opened(settings) as database:
        rows = database.call(initialised(Quarantine(settings.database.schema_name).listed))
    if not rows:
        print("Nothing is in quarantine.")
        return DONE
    header = ("user", "error", "first seen", "last seen", "times")
    cells = [
        (
            row.user_id or row.record,
            row.error,
            f"{row.first_seen:%Y-%m-%d %H:%M:%S}",
            f"{row.last_seen:%Y-%m-%d %H:%M:%S}",
            row.times,
        )
        for row in rows
    ]
    print(output.as_psql(header, cells))
    own_project = f" --project {project}" if project else ""
    print(f"Once the cause is fixed: {own_name()} quarantine retry{own_project}")
    return DONE


@app.command()
def retry(
    *,
    project: ProjectName = None,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Fetch these users again and try to store them; print a line for each."""
    settings = read_settings(config, log_format, log_level, project, quietly=True)
    with command_session(settings) as session:
        for row in session.database.call(session.quarantine.listed):
            if row.user_id is None:
                print(f"{row.record}: it names no user; the next sweep looks at it again")
            else:
                print(session.sync(row.user_id).sentence(settings), flush=True)
        left = len(session.database.call(session.quarantine.listed))
    print(f"{left} left in quarantine." if left else "Nothing is in quarantine.")
    return DONE
