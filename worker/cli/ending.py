"""How the process ends: what is buffered is written first, but not for long."""

import errno
import os
import sys
from threading import Timer
from typing import NoReturn

from worker.log.outputs import write_error
from worker.log.setup import close_logging

# For the last words on stderr, and for threads that are about to end.
LONGEST_ENDING_SECONDS = 1.5


def leave(code: int, message: str | None = None) -> NoReturn:
    """Write what is buffered, print `message` on stderr, and end the process with this code.

    A pager may take its time to read what a command printed. A log that is not read, or a
    thread that is stuck, does not keep the process alive.
    """
    if close_logging():
        sys.stdout.flush()
    deadline = Timer(LONGEST_ENDING_SECONDS, os._exit, (code,))
    deadline.daemon = True
    deadline.start()
    if message:
        _say(message)
    error = write_error(sys.stdout)
    if error and error.errno != errno.EPIPE:  # a reader that wants no more, such as `head`
        _say(f"stdout could not be written: {error.strerror}")
    sys.stderr.flush()
    sys.exit(code)


def _say(text: str) -> None:
    print(f"users-sync: {text}", file=sys.stderr)
