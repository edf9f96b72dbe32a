"""How long the server's answers are waited for, on a connection that may have fallen silent.

TCP notices a peer that is gone. It notices nothing where a proxy in between still acknowledges.
"""

import math
import socket
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Event
from typing import Any, TypeVar

import psycopg
import structlog

from worker.errors import Stopped

log = structlog.stdlib.get_logger(__name__)

T = TypeVar("T")

# No call takes as long, not even the one for the keys of millions of users.
LONGEST_SECONDS = 600.0

# A stop lets what has begun come to its end, well within the time that process managers give.
STOPPING_SECONDS = 3.0

_awaited_stop: ContextVar[Event | None] = ContextVar("awaited_stop", default=None)


@contextmanager
def ended_by(stop: Event) -> Iterator[None]:
    """Raise Stopped from whatever is being connected to inside the block once `stop` is set."""
    token = _awaited_stop.set(stop)
    try:
        yield
    finally:
        _awaited_stop.reset(token)


class PatientConnection(psycopg.Connection[tuple[Any, ...]]):
    """A connection whose every wait ends; `limit` says when."""

    _stop: Event | None = None
    _ends_at = math.inf

    def limit(self, seconds: float, stop: Event) -> None:
        """Give up so many seconds from now, and soon after a stop.

        Whatever waits then raises psycopg.OperationalError, for the connection is broken off.
        """
        self._stop = stop
        self._ends_at = time.monotonic() + seconds

    @classmethod
    def _connect_gen(cls, *args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        """Connect as psycopg does; it offers no public way to give that up before its time-out."""
        return _unless_stopped(super()._connect_gen(*args, **kwargs), _awaited_stop.get())

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


def _unless_stopped(gen: Generator[Any, Any, T], stop: Event | None) -> Generator[Any, Any, T]:
    """Look at the stop whenever psycopg looks at the socket."""
    try:
        state = next(gen)
        while True:
            ready = yield state
            if stop is not None and stop.is_set():
                # With it goes libpq's connection, which is nobody else's yet.
                gen.close()
                raise Stopped("asked to stop")
            state = gen.send(ready)
    except StopIteration as ended:
        value: T = ended.value
        return value
