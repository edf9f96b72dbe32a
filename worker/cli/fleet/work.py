"""The command `fleet work`."""

import sys

from worker.cli.context import read_settings
from worker.cli.options import DONE, Config, LogFormat, LogLevel
from worker.cli.signals import Signals
from worker.errors import Misconfigured
from worker.log.setup import configure_logging


def work(*, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None) -> int:
    """Visit the projects of the fleet, together with its other workers, until stopped."""
    settings = read_settings(config, log_format, log_level)
    settings.require_fleet()
    try:
        from worker.fleet.work import FleetWorker  # noqa: PLC0415  an extra
    except ModuleNotFoundError as error:
        raise Misconfigured(
            f"{error.name} is not installed: pip install 'users-sync[fleet]'"
        ) from error
    with Signals() as signals:
        configure_logging(settings.log.level, settings.log.format, sys.stdout)
        FleetWorker(settings, signals.stop).run()
    return DONE
