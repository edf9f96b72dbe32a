"""The command `plan`."""

from functools import partial
from typing import Annotated

import typer

from worker.cli.context import read_settings, started_database, stopped_by_signals
from worker.cli.options import DIFFERENT, DONE, AsJson, Config, LogFormat, LogLevel, ProjectName
from worker.cli.plan.output import PlanPrinter
from worker.cli.plan.plan import plan as find_changes


def plan(
    *,
    as_objects: AsJson = False,
    values: Annotated[
        bool,
        typer.Option("--values", help="Show old and new values, which are personal data."),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=0, help="Show at most N changes; count all of them."
        ),
    ] = None,
    project: ProjectName = None,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Show what a sweep would change, user by user; write nothing."""
    settings = read_settings(config, log_format, log_level, project, quietly=True)
    settings.require_stack()
    printer = PlanPrinter(partial(print, flush=True), as_objects, values, limit)
    with stopped_by_signals() as signals, started_database(settings) as url:
        found = find_changes(settings, url, signals.stop, printer.tell)
    printer.end(found)
    return DIFFERENT if found.difference else DONE
