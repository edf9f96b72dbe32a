"""The hidden command `probe`: the image's health check."""

from worker.cli.context import read_settings
from worker.cli.options import BUG, DONE, Config, LogFormat, LogLevel
from worker.service.endpoints import probe as is_alive


def probe(
    *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Check whether the worker on this machine is alive: for the image's health check."""
    http = read_settings(config, log_format, log_level).http
    # With the endpoints turned off there is nothing to ask.
    return DONE if http.port == 0 or is_alive(http.host, http.port) else BUG
