"""The way of a command to the control database, and from there to one project."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from worker.cli.context import stopped_by_signals
from worker.errors import Misconfigured
from worker.fleet.control import Control
from worker.fleet.projects import Project, Secrets, checked_name, resolved
from worker.settings.settings import Settings


@contextmanager
def opened_control(settings: Settings, *, ready: bool = True) -> Iterator[Control]:
    """Open the control database until the command ends, by itself or by a signal.

    Raises Misconfigured unless it is `ready`, where it has to be.
    """
    url = settings.require_fleet()
    with stopped_by_signals() as signals, _control(url, signals.stop) as control:
        if ready:
            control.require_init()
        yield control


def settings_of(project: str, settings: Settings, stop: Event) -> Settings:
    """Return the settings of a project of the fleet, with its secrets, and this command's log.

    Raises Misconfigured, DatabaseUnavailable or Stopped.
    """
    with _control(settings.require_fleet(), stop) as control:
        control.require_init()
        found = required(control, project)
    secrets = Secrets(settings.fleet.secrets_dir)
    names = (own := resolved(found, secrets)).require_stack().names
    combined = own.model_copy(update={"log": settings.log, "fleet": settings.fleet})
    combined.remember(names, ())
    return combined


def required(control: Control, name: str) -> Project:
    """Return a project. Raises Misconfigured if there is none of that name."""
    found = control.project(checked_name(name))
    if found is None:
        raise Misconfigured(
            f"the fleet has no project {name}: `users-sync fleet list` shows those it has"
        )
    return found


@contextmanager
def _control(url: str, stop: Event) -> Iterator[Control]:
    control = Control(url, stop)
    try:
        yield control
    finally:
        control.close()
