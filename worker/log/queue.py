"""The way of log lines to their reader: a bounded queue, so that logging never waits for it."""

import logging
import sys
from dataclasses import dataclass, field
from logging.handlers import QueueHandler, QueueListener
from queue import Queue
from threading import Lock
from typing import TextIO

import structlog

from worker.log.outputs import failed_writes

log = structlog.stdlib.get_logger(__name__)

# A minute at debug level, and hours at info; even of tracebacks no more than some megabytes.
MOST_LINES = 1000


@dataclass(slots=True)
class Losses:
    """Lines that never reached the reader, and how many of them the log has not told of."""

    total: int = 0
    _untold: int = 0
    _lock: Lock = field(default_factory=Lock)

    def add(self, lines: int) -> None:
        with self._lock:
            self.total += lines
            self._untold += lines

    def take(self) -> int:
        """Return how many are not told of; from now on they are."""
        with self._lock:
            lines, self._untold = self._untold, 0
            return lines


losses = Losses()


class LineHandler(QueueHandler):
    """Renders a record in the thread that logs it, and queues the line unless the queue is full."""

    def __init__(self, lines: "Queue[logging.LogRecord]") -> None:
        super().__init__(lines)
        self._lines = lines

    def enqueue(self, record: logging.LogRecord) -> None:
        # The queue itself has no bound: it must always take what ends the writer.
        if self._lines.qsize() < MOST_LINES:
            self._lines.put_nowait(record)
        else:
            losses.add(1)

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """Tell of a record that cannot be rendered. The standard report would quote secrets."""
        kind, _, _ = sys.exc_info()
        if record.name == __name__ or kind is None:
            losses.add(1)
        else:
            log.error("log.failed", source=record.name, error=kind.__name__)


class LineWriter(QueueListener):
    """Writes queued lines to `stream` in a thread of its own, until it is stopped."""

    def __init__(self, lines: "Queue[logging.LogRecord]", stream: TextIO) -> None:
        self._lines = lines
        self._stream = _Stream(stream)
        super().__init__(lines, self._stream)

    def handle(self, record: logging.LogRecord) -> None:
        """Write a line. The last one after a stall is followed by one about lines that are lost."""
        before = self._failures()
        super().handle(record)
        failed = self._failures() - before
        if failed:
            losses.add(failed)
        elif self._lines.empty() and (lines := losses.take()):
            log.warning("log.dropped", lines=lines)

    def flush(self) -> None:
        """Wait until every line is written that was logged before."""
        self._lines.join()

    def _failures(self) -> int:
        return self._stream.failures + failed_writes()


class _Stream(logging.StreamHandler[TextIO]):
    """A handler that counts what its stream refuses; the standard one prints a traceback each."""

    failures = 0

    def handleError(self, _record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        self.failures += 1
