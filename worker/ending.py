"""How the process ends: what is buffered is written first, but not for long."""

import errno
import os
import sys
from concurrent.futures import wait
from typing import NoReturn

from worker.aside import aside
from worker.log import FLUSH_SECONDS, reset_logging
from worker.outputs import write_error

# The log first, and then what commands print.
LONGEST_ENDING_SECONDS = 2 * FLUSH_SECONDS


def leave(code: int, message: str | None = None) -> NoReturn:
    """Print `message` on stderr, write what is buffered, and end the process with this code.

    A reader that stalls does not keep the process alive: what it has not read is then lost.
    """
    ending = aside(lambda: _write_the_rest(message))
    if wait([ending], LONGEST_ENDING_SECONDS).not_done:
        # The interpreter would wait for the thread that is writing.
        os._exit(code)
    sys.exit(code)


def _write_the_rest(message: str | None) -> None:
    reset_logging(forget_secrets=False)
    if message:
        _say(message)
    sys.stdout.flush()
    error = write_error(sys.stdout)
    if error and error.errno != errno.EPIPE:  # a reader that wants no more, such as `head`
        _say(f"stdout could not be written: {error.strerror}")
    sys.stderr.flush()


def _say(text: str) -> None:
    print(f"users-sync: {text}", file=sys.stderr)
