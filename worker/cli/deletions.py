"""The commands `deletions` and `deletions approve`."""

from typing import Annotated

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
from worker.errors import Misconfigured
from worker.store.suspects import Suspects

# What a bigint holds.
MOST_SWEEPS = 2**63 - 1

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.callback(invoke_without_command=True)
def deletions(
    context: typer.Context,
    *,
    project: ProjectName = None,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """List suspected, held, approved and hidden rows; `approve` releases held ones."""
    if not group_is_called_alone(context, project, config, log_format, log_level):
        return DONE
    settings = read_settings(config, log_format, log_level, project)
    with opened(settings) as database:
        rows = database.call(initialised(Suspects(settings.database.schema_name).listed))
    own_project = f" --project {project}" if project else ""
    if not rows:
        print("No user of the table is missing from the list.")
        return DONE
    print(output.as_psql(("user", "state", "first noticed", "last noticed"), rows))
    held = [first for _, state, first, _ in rows if state == "held"]
    if held:
        print(
            f"{len(held)} deletions are held. If these users did leave, approve them with\n"
            f"  {own_name()} deletions approve {max(held)}{own_project}"
        )
    return DONE


@app.command()
def approve(
    sweep: Annotated[
        int,
        typer.Argument(
            metavar="SWEEP",
            min=1,
            max=MOST_SWEEPS,
            help="Approve what was first noticed up to this sweep.",
        ),
    ],
    *,
    project: ProjectName = None,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Approve held deletions.

    The next sweep requires a fresh proof of each.
    """
    settings = read_settings(config, log_format, log_level, project)
    rows = Suspects(settings.database.schema_name)
    with opened(settings) as database:
        approved = database.call(initialised(lambda conn: rows.approve(conn, sweep)))
    if not approved:
        raise Misconfigured(
            f"nothing is held that was first noticed up to sweep {sweep};"
            " `users-sync deletions` shows what is held"
        )
    print(
        f"Approved {approved} deletions. The next sweep asks for each user again, and marks those"
        " deleted that are still gone."
    )
    return DONE
