"""What a process of `Shell` does first; starting Python and importing takes most of a second."""

import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import worker.cli.check.checks
import worker.cli.demo
import worker.service.supervisor  # noqa: F401  imported once, for all the processes that are forked
from worker.cli.main import main


def run_command(
    arguments: Sequence[str], folder: Path, environ: Mapping[str, str], stdout: Path, stderr: Path
) -> None:
    """Become the command: another folder and environment, and what is printed goes to files."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environ)
    sys.argv = ["users-sync", *arguments]
    given = folder / "stdin"
    stdin = given if given.exists() else Path(os.devnull)
    sys.stdin = stdin.open(encoding="utf-8")
    sys.stdout = stdout.open("w", encoding="utf-8")
    sys.stderr = stderr.open("w", encoding="utf-8")
    # What is not written by Python goes there, too.
    os.dup2(sys.stdout.fileno(), 1)
    os.dup2(sys.stderr.fileno(), 2)
    warnings.simplefilter("error")
    main()
