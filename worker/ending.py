"""How the process ends: what is buffered is written first, but not for long."""

import errno
import os
import sys
from threading import Timer
from typing import NoReturn

from worker.log import reset_logging
from worker.outputs import write_error

# A second for the log; then what commands print, and threads that are about to end.
LONGEST_ENDING_SECONDS = 2.0


def leave(code: int, message: str | None = None) -> NoReturn:
    """Print `message` on stderr, write what is buffered, and end the process with this code.

    That does not last long: what a reader that stalls has not read is lost, and a thread that is
    stuck is left behind.
    """
    deadline = Timer(LONGEST_ENDING_SECONDS, os._exit, (code,))
    deadline.daemon = True
    deadline.start()
    _write_the_rest(message)
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
