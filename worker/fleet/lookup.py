"""Finds a project of the fleet in the control database, and its settings with their secrets."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event

from worker.errors import Misconfigured
from worker.fleet.control import Control
from worker.fleet.projects import Project, Secrets, checked_name, resolved
from worker.settings.settings import Settings


@contextmanager
def control_of(url: str, stop: Event) -> Iterator[Control]:
    """Open the control database."""
    control = Control(url, stop)
    try:
        yield control
    finally:
        control.close()


def settings_of(project: str, settings: Settings, stop: Event) -> Settings:
    """Return the settings of a project of the fleet, with its secrets, and this command's log.

    Raises Misconfigured, DatabaseUnavailable or Stopped.
    """
    with control_of(settings.require_fleet(), stop) as control:
        control.require_init()
        found = required(control, project)
    own = resolved(found, Secrets(settings.fleet.secrets_dir))
    combined = own.model_copy(update={"log": settings.log, "fleet": settings.fleet})
    combined.remember(own.names, ())
    return combined


def required(control: Control, name: str) -> Project:
    """Return a project. Raises Misconfigured if there is none of that name."""
    found = control.project(checked_name(name))
    if found is None:
        raise Misconfigured(
            f"the fleet has no project {name}: `users-sync fleet list` shows those it has"
        )
    return found
