"""What the commands share: exit codes, options, ages, and the name they were started by."""

import re
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from worker.errors import Misconfigured

DONE, BUG, USAGE, HELD, DIFFERENT, UNHEALTHY = 0, 1, 2, 6, 7, 8

DAY_SECONDS = 86_400

# Moments before year 1 are beyond what Postgres and Python can write.
LONGEST_AGE_SECONDS = 36_500 * DAY_SECONDS

_AGE = re.compile(r"(\d{1,6})\s*([smhdw])")
_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": DAY_SECONDS, "w": 604_800}

Once = Annotated[bool, typer.Option("--once", help="Sweep once, then exit: for cron.")]
Config = Annotated[
    Path | None, typer.Option("--config", metavar="FILE", help="Read settings from FILE.")
]
LogFormat = Annotated[
    Literal["auto", "json", "console"] | None,
    typer.Option("--log-format", help="Log format; auto is JSON unless on a terminal."),
]
LogLevel = Annotated[
    Literal["debug", "info", "warning", "error", "critical"] | None,
    typer.Option("--log-level", help="Minimum log level."),
]
ProjectName = Annotated[
    str | None,
    typer.Option("--project", metavar="NAME", help="Work on this project of the fleet."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


def group_is_called_alone(context: typer.Context, *options: object) -> bool:
    """Whether no command follows the group; options in front of a command would be lost."""
    if context.invoked_subcommand is None:
        return True
    if any(options):
        raise Misconfigured("options stand after the command")
    return False


def seconds_of(text: str, option: str) -> int:
    """Read an age such as `30d`. Raises Misconfigured."""
    found = _AGE.fullmatch(text.strip().lower())
    if found is None:
        raise Misconfigured(f"{option}: should be a number with s, m, h, d or w, such as 30d")
    seconds = int(found[1]) * _UNIT_SECONDS[found[2]]
    if seconds > LONGEST_AGE_SECONDS:
        raise Misconfigured(f"{option}: should be at most {LONGEST_AGE_SECONDS // DAY_SECONDS}d")
    return seconds


def own_name() -> str:
    """Give what the user typed to start us, so that lines we print can be pasted."""
    program = Path(sys.argv[0])
    return f"{sys.executable} -m worker" if program.name == "__main__.py" else sys.argv[0]
