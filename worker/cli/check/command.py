"""The command `check`."""

from worker.cli.check.checks import check as find_problems
from worker.cli.context import read_settings, started_database, stopped_by_signals
from worker.cli.options import DONE, Config, LogFormat, LogLevel


def check(
    *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Check configuration, credentials, privileges and the table; print a fix for each failure."""
    settings = read_settings(config, log_format, log_level)
    settings.require_stack()
    codes = []
    with stopped_by_signals() as signals, started_database(settings) as url:
        for finding in find_problems(settings, url, signals.stop):
            print(f"{finding.verdict:<5} {finding.subject:<14} {finding.text}", flush=True)
            codes.append(finding.exit_code)
    return min((code for code in codes if code), default=DONE)
