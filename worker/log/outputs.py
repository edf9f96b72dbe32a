"""Standard output and error: whatever happens to them, the work and the exit code stay the same."""

import io
import os
import select
import sys
from typing import Any, TextIO


class _Output(io.RawIOBase):
    """Writes to the file of `stream`, and discards what that does not take.

    `error` is then the last reason, and `failures` counts the writes that failed.
    """

    def __init__(self, stream: io.TextIOWrapper) -> None:
        self.error: OSError | None = None
        self.failures = 0
        # Unbuffered, as with PYTHONUNBUFFERED, there is nothing between.
        raw: Any = getattr(stream.buffer, "raw", stream.buffer)
        self._raw: io.RawIOBase = raw
        # A stream that nothing refers to any more closes its file.
        self._stream = stream

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._raw.fileno()

    def isatty(self) -> bool:
        return self._raw.isatty()

    def write(self, data: Any) -> int:
        try:
            while (written := self._raw.write(data)) is None:
                # Another process that has the same file made it non-blocking.
                select.select([], [self._raw], [])
        except OSError as error:
            self.error = error
            self.failures += 1
            return memoryview(data).nbytes
        return written


def protect_outputs() -> None:
    """Replace stdout and stderr by streams whose writes never raise an error.

    A closed one becomes the null device, and characters that its encoding lacks are escaped.
    """
    for number in range(3):
        # A connection could get the number of a closed one, and be written to.
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it gets the lowest free number
    sys.stdout = _protected(sys.stdout, 1)
    sys.stderr = _protected(sys.stderr, 2)


def failed_writes() -> int:
    """Count the writes to stdout and stderr that failed so far."""
    return sum(raw.failures for raw in map(_raw, (sys.stdout, sys.stderr)) if raw)


def write_error(stream: TextIO) -> OSError | None:
    """Return why something written to `stream` was lost, if anything was."""
    raw = _raw(stream)
    return raw.error if raw else None


def _raw(stream: TextIO) -> _Output | None:
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    return raw if isinstance(raw, _Output) else None


def _protected(stream: TextIO | None, number: int) -> TextIO:
    if stream is None:  # Python found it closed
        stream = os.fdopen(number, "w", encoding="utf-8", closefd=False)
    if not isinstance(stream, io.TextIOWrapper):
        return stream
    stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(stream)),
        encoding=stream.encoding,
        errors="backslashreplace",
        line_buffering=stream.line_buffering or stream.write_through,
    )
