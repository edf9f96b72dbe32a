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

from worker.aside import aside, leave_behind
from worker.errors import Stopped
from worker.store.connecting import opening

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")

# No call takes as long, not even the one for the keys of millions of users.
LONGEST_SECONDS = 600.0

# A stop lets what has begun come to its end, well within the time that process managers give.
STOPPING_SECONDS = 3.0

# Nor does whoever tidies up after it wait for long until there is a connection.
STOPPED_CONNECT_SECONDS = 2.0

# Nothing wakes a thread that waits for a connection, so it looks at the stop this often.
GLANCE_SECONDS = 0.1


class PatientConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose every wait ends; `limit` says when."""

    _stop: Event | None = None
    _ends_at = math.inf

    @classmethod
    def _connect_gen(cls, conninfo: str = "", *, timeout: float = 0.0) -> PQGenConn[Self]:  # noqa: ARG003
        """Connect in a way that tells the SQLSTATE of a failure.

        This is a private name of psycopg. A version that calls another one connects as usual, and
        failures are told apart by their words alone.
        """
        return cls((yield from opening(conninfo)))

    def limit(self, seconds: float, stop: Event) -> None:
        """Give up so many seconds from now, and soon after a stop.

        Whatever waits then raises psycopg.OperationalError, for the connection is broken off.
        """
        self._stop = stop
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
        now = time.monotonic()
        if self._stop is not None and self._stop.is_set():
            self._ends_at = min(self._ends_at, now + STOPPING_SECONDS)
        if now > self._ends_at:
            log.warning("connection.abandoned")
            self._ends_at = math.inf
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


def unless_stopped(connect: Callable[[], PatientConnection], stop: Event) -> PatientConnection:
    """Wait for `connect`, and leave it behind at a stop, or soon after one. Raises Stopped.

    Neither looking up a name nor connecting can be interrupted.
    """
    opening = aside(connect)
    try:
        _wait_unless_stopped(opening, stop)
    except BaseException:
        leave_behind(opening)
        raise
    return opening.result()


def _wait_unless_stopped(opening: Future[PatientConnection], stop: Event) -> None:
    ends_at = time.monotonic() + STOPPED_CONNECT_SECONDS if stop.is_set() else 0.0
    while not wait([opening], GLANCE_SECONDS).done:
        if stop.is_set() and time.monotonic() > ends_at:
            raise Stopped("asked to stop")
