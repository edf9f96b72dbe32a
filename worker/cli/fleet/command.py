"""The group `fleet`: what the fleet syncs, and the worker that does it."""

from collections.abc import Callable, Sequence
from typing import Annotated

import typer

from worker.cli import output
from worker.cli.check.command import print_findings
from worker.cli.context import read_settings, stopped_by_signals
from worker.cli.fleet.add import add
from worker.cli.fleet.context import opened_control
from worker.cli.fleet.status import status
from worker.cli.fleet.work import work
from worker.cli.options import DONE, AsJson, Config, LogFormat, LogLevel
from worker.errors import Misconfigured
from worker.fleet.control import Control, as_json
from worker.fleet.lookup import settings_of
from worker.fleet.projects import Project, checked_name

app = typer.Typer(
    rich_markup_mode=None, add_completion=False, help="Sync many projects with several workers."
)

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Names of projects.")]


@app.command()
def init(*, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None) -> int:
    """Make the control database ready: create the fleet's tables and the engine's."""
    settings = read_settings(config, log_format, log_level)
    with opened_control(settings, ready=False) as control:
        ran = control.init()
    print(f"users_sync_fleet: {f'{ran} SQL files applied' if ran else 'up to date'}")
    return DONE


app.command()(add)


@app.command("list")
def list_projects(
    *,
    as_objects: AsJson = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """List the projects of the fleet, and where their secrets are."""
    settings = read_settings(config, log_format, log_level)
    with opened_control(settings) as control:
        projects = control.projects()
    if as_objects:
        for each in projects:
            print(as_json(_object(each)))
    elif projects:
        header = ("name", "api", "project", "secret", "database", "schema", "enabled")
        print(output.as_psql(header, [_row(each) for each in projects]))
    else:
        print("The fleet has no projects.")
    return DONE


@app.command()
def pause(
    names: Names, *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Visit these projects no more, until they are resumed."""
    settings = read_settings(config, log_format, log_level)
    with opened_control(settings) as control:
        _change(names, lambda control, names: control.enable(names, enabled=False), control)
    print(f"Paused: {', '.join(names)}. A visit that is under way comes to its end.")
    return DONE


@app.command()
def resume(
    names: Names, *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Visit these projects again."""
    settings = read_settings(config, log_format, log_level)
    with opened_control(settings) as control:
        _change(names, lambda control, names: control.enable(names, enabled=True), control)
    print(f"Resumed: {', '.join(names)}.")
    return DONE


@app.command()
def remove(
    names: Names, *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Remove these projects from the fleet; their tables stay as they are."""
    settings = read_settings(config, log_format, log_level)
    with opened_control(settings) as control:
        _change(names, Control.remove, control)
    print(f"Removed: {', '.join(names)}. Their tables stay as they are.")
    return DONE


@app.command()
def check(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a project.")],
    *,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Check a project as `users-sync check` does, with the references of this machine."""
    settings = read_settings(config, log_format, log_level)
    with stopped_by_signals() as signals:
        own = settings_of(name, settings, signals.stop)
        url = own.require_database().get_secret_value()
        return print_findings(own, url, signals.stop)


app.command()(status)
app.command()(work)


def _change(
    names: Sequence[str], change: Callable[[Control, Sequence[str]], set[str]], control: Control
) -> None:
    """Change these projects. Raises Misconfigured if there is none of some name."""
    found = change(control, [checked_name(name) for name in names])
    if missing := [name for name in names if name not in found]:
        others = f" (done: {', '.join(sorted(found))})" if found else ""
        raise Misconfigured(
            f"the fleet has no project {', '.join(missing)}{others}:"
            " `users-sync fleet list` shows those it has"
        )


def _row(project: Project) -> Sequence[object]:
    return (
        project.name,
        project.api_url,
        project.project_id,
        project.secret_ref,
        project.database_ref,
        project.schema,
        "yes" if project.enabled else "paused",
    )


def _object(project: Project) -> dict[str, object]:
    names = ("name", "api_url", "project_id", "secret_ref", "database_ref", "schema", "webhook_ref")
    own = {name: getattr(project, name) for name in names}
    return {**own, "settings": project.settings, "enabled": project.enabled}
