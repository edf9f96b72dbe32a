"""The command `run`: sync continuously, or once."""

import sys

import structlog
from rich.console import Console

from worker.cli import output
from worker.cli.context import (
    opened_telemetry,
    read_settings,
    started_database,
    stopped_by_signals,
)
from worker.cli.options import DONE, HELD, Config, LogFormat, LogLevel, Once
from worker.cli.signals import Signals
from worker.errors import Stopped
from worker.log.setup import configure_logging, flush_logging
from worker.settings.settings import Settings

log = structlog.stdlib.get_logger(__name__)


def run(
    *,
    once: Once = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Sync the table with the project continuously, until stopped."""
    settings = read_settings(config, log_format, log_level)
    return _sweep(settings) if once else _serve(settings)


def _sweep(settings: Settings) -> int:
    from worker.service.once import sweep_once  # noqa: PLC0415  a usage error needs none of it
    from worker.service.ping import ping  # noqa: PLC0415

    console = Console(stderr=True)
    with (
        stopped_by_signals() as signals,
        opened_telemetry(settings),
        started_database(settings) as url,
        output.progress(console) as on_page,
    ):
        # Only now: on a terminal the progress display redirects stdout.
        configure_logging(settings.log.level, settings.log.format, sys.stdout)
        report = sweep_once(settings, url, signals.stop, on_page)
        if settings.once.ping_url and report.outcome == "complete":
            # sweep_once has set signals.stop at its end; this event is set by a signal alone.
            ping(settings.once.ping_url.get_secret_value(), signals.new_stop())
        flush_logging()
    if console.is_terminal:
        console.print(output.summary(report))
    return HELD if report.outcome == "held" else DONE


def _serve(settings: Settings) -> int:
    """Work until a signal, which is a success."""
    from worker.service.supervisor import Supervisor  # noqa: PLC0415  `--once` needs none of it

    settings.require_stack()
    with (
        Signals() as signals,
        opened_telemetry(settings) as send_metrics,
        started_database(settings) as url,
    ):
        configure_logging(settings.log.level, settings.log.format, sys.stdout)
        supervisor = Supervisor(settings, url, signals.stop)
        send_metrics(supervisor.metrics.families)
        try:
            supervisor.run()
        except Stopped:
            log.debug("worker.stopped")
    return DONE
