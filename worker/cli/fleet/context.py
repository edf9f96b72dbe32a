"""The way of a command to the control database."""

from collections.abc import Iterator
from contextlib import contextmanager

from worker.cli.context import stopped_by_signals
from worker.fleet.control import Control
from worker.fleet.lookup import control_of
from worker.settings.settings import Settings


@contextmanager
def opened_control(settings: Settings, *, ready: bool = True) -> Iterator[Control]:
    """Open the control database until the command ends, by itself or by a signal.

    Raises Misconfigured unless it is `ready`, where it has to be.
    """
    url = settings.require_fleet()
    with stopped_by_signals() as signals, control_of(url, signals.stop) as control:
        if ready:
            control.require_init()
        yield control
