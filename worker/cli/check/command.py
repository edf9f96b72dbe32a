"""The command `check`."""

from threading import Event

from worker.cli.check.checks import check as find_problems
from worker.cli.context import read_settings, started_database, stopped_by_signals
from worker.cli.options import DONE, Config, LogFormat, LogLevel
from worker.settings.settings import Settings


def check(
    *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Check configuration, credentials, privileges and the table; print a fix for each failure."""
    settings = read_settings(config, log_format, log_level)
    settings.require_stack()
    with stopped_by_signals() as signals, started_database(settings) as url:
        return print_findings(settings, url, signals.stop)


def print_findings(settings: Settings, url: str, stop: Event) -> int:
    """Print each finding as it is made; returns the exit code. Raises Stopped."""
    codes = []
    for finding in find_problems(settings, url, stop):
        print(f"{finding.verdict:<5} {finding.subject:<14} {finding.text}", flush=True)
        codes.append(finding.exit_code)
    # The least one counts: what is set wrongly comes before what does not answer.
    return min((code for code in codes if code), default=DONE)
