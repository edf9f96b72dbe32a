"""How long the server's answers are waited for, on a connection that may have fallen silent.

TCP notices a peer that is gone. It notices nothing where a proxy in between still acknowledges.
"""

import math
import socket
import time
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from contextlib import suppress
from threading import Event
from typing import Any, Self, TypeVar

import psycopg
import structlog
from psycopg.abc import PQGenConn

from worker.errors import Stopped
from worker.net import close_when_opened, run_abandonable
from worker.store.connecting import opening

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")
Connection = psycopg.Connection[tuple[Any, ...]]

# No call takes as long, not even the one for the keys of millions of users.
LONGEST_SECONDS = 600.0

# A stop lets what has begun come to its end, well within the time that process managers give.
STOPPING_SECONDS = 3.0

# What begins only after the stop, such as giving back the lease, shares one deadline, however many
# calls and connections it needs: a process ends within five seconds.
TIDYING_SECONDS = 4.5

# A database that answers is given its last statement even when a long computation delayed it.
LEAST_SECONDS = 0.5

# Nothing wakes a thread that waits for a connection, so it looks at the stop this often.
GLANCE_SECONDS = 0.1


class Stopping:
    """The deadlines after a stop, counted from when it is first noticed, for one database."""

    def __init__(self, stop: Event) -> None:
        self._stop = stop
        self._noticed_at: float | None = None

    def patience(self, seconds: float) -> float:
        """Return how long after a stop something may last that begins now; `seconds` before one."""
        noticed_at = self._notice()
        if noticed_at is None:
            return seconds
        return max(TIDYING_SECONDS, time.monotonic() - noticed_at + LEAST_SECONDS)

    def ends_at(self, patience: float) -> float:
        """Return the moment at which that time is over; never before a stop."""
        noticed_at = self._notice()
        return math.inf if noticed_at is None else noticed_at + patience

    def _notice(self) -> float | None:
        if not self._stop.is_set():
            self._noticed_at = None  # the end of a visit, after which there may be another one
        elif self._noticed_at is None:
            self._noticed_at = time.monotonic()
        return self._noticed_at


class DeadlineConnection(Connection):
    """A connection whose every wait ends; `limit` says when."""

    _stopping: Stopping | None = None
    _patience = STOPPING_SECONDS
    _ends_at = math.inf

    @classmethod
    def _connect_gen(cls, conninfo: str = "", *, timeout: float = 0.0) -> PQGenConn[Self]:  # noqa: ARG003
        """Connect in a way that tells the SQLSTATE of a failure.

        This is a private name of psycopg. A version that calls another one connects as usual, and
        failures are told apart by their words alone.
        """
        return cls((yield from opening(conninfo)))

    def limit(self, seconds: float, stopping: Stopping) -> None:
        """Give up so many seconds from now, and soon after a stop.

        Whatever waits then raises psycopg.OperationalError, for the connection is broken off.
        """
        self._stopping = stopping
        self._patience = stopping.patience(STOPPING_SECONDS)
        self._ends_at = time.monotonic() + seconds

    def wait(self, gen: Generator[Any, Any, T], *args: Any, **kwargs: Any) -> T:
        return super().wait(self._limited(gen), *args, **kwargs)

    def _limited(self, gen: Generator[Any, Any, T]) -> Generator[Any, Any, T]:
        """Look at the clock whenever psycopg does at the socket: ten times a second, or oftener."""
        try:
            state = next(gen)
            while True:
                ready = yield state
                self._check()
                state = gen.send(ready)
        except StopIteration as ended:
            value: T = ended.value
            return value

    def _check(self) -> None:
        if self._stopping is not None:
            self._ends_at = min(self._ends_at, self._stopping.ends_at(self._patience))
        if time.monotonic() > self._ends_at:
            log.warning("connection.abandoned")
            self._stopping, self._ends_at = None, math.inf
            self._break_off()

    def _break_off(self) -> None:
        """Break the connection under libpq, and let psycopg find that out wherever it waits.

        An error that is raised here instead would leave its generators in the middle of their work.
        """
        with suppress(OSError), socket.socket(fileno=self.pgconn.socket) as ours:
            try:
                ours.shutdown(socket.SHUT_RDWR)
            finally:
                # It is libpq's to close.
                ours.detach()


def unless_stopped(
    connect: Callable[[], DeadlineConnection], stopping: Stopping
) -> DeadlineConnection:
    """Wait for `connect`, and leave it behind at a stop, or soon after one. Raises Stopped.

    Neither looking up a name nor connecting can be interrupted.
    """
    opening = run_abandonable(connect)
    try:
        _wait_unless_stopped(opening, stopping)
    except BaseException:
        close_when_opened(opening)
        raise
    return opening.result()


def _wait_unless_stopped(opening: Future[DeadlineConnection], stopping: Stopping) -> None:
    patience = stopping.patience(0)
    while not wait([opening], GLANCE_SECONDS).done:
        if time.monotonic() > stopping.ends_at(patience):
            raise Stopped("asked to stop")
