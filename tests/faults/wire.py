"""A TCP proxy of the tests' own: it cuts connections, and lets them fall silent unclosed."""

import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from select import select
from threading import Event, Lock, Thread

# Close with a reset, as a firewall does, and not with an orderly end.
RESET = struct.pack("ii", 1, 0)


@dataclass
class Wire:
    """Relays connections from `port`, and counts them; `cut_after` so many bytes all of them break.

    While `silent`, nothing more is relayed in either direction, new connections included, but they
    are accepted and stay open, and what is sent into them is acknowledged by the system.
    """

    port: int
    accepted: int = 0
    silent: Event = field(default_factory=Event)
    over: Event = field(default_factory=Event)
    broken: Event = field(default_factory=Event)
    lost: Event = field(default_factory=Event)
    _words: bytes = b""
    _again: bool = False
    _left: int | None = None
    _which: int = 0
    _reset: bool = False
    _sockets: list[socket.socket] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def cut_after(self, sent: int, direction: int, *, reset: bool = False) -> None:
        """Break all connections after so many more bytes to the server (0) or from it (1)."""
        with self._lock:
            self.broken.clear()
            self._left, self._which, self._reset = sent, direction, reset

    def lose_at(self, words: bytes, *, again: bool = False) -> None:
        """Lose the next connection on which the server is told these words, and no other.

        `again` means every such connection from now on.

        It stays open on both sides, and nothing comes through any more, not even the answer.
        """
        self._words, self._again = words, again
        self.lost.clear()

    def loses(self, part: bytes, direction: int) -> bool:
        with self._lock:
            if direction or not self._words or self._words not in part:
                return False
            self._words = self._words if self._again else b""
            return True

    def let_through(self, part: bytes, direction: int) -> tuple[bytes, bool]:
        """Give what of this still gets through, and whether the wire breaks behind it."""
        with self._lock:
            if self._left is None or direction != self._which:
                return part, False
            part, cut = part[: self._left], len(part) >= self._left
            self._left -= len(part)
            if cut:
                self._left = None
            return part, cut

    def take(self, *sockets: socket.socket) -> None:
        with self._lock:
            self._sockets += sockets

    def break_all(self) -> None:
        """Close every connection that there is, in mid-word."""
        with self._lock:
            sockets, self._sockets = self._sockets, []
        for each in sockets:
            with suppress(OSError):
                if self._reset:
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            each.close()
        self.broken.set()


Open = Callable[[], socket.socket]


@contextmanager
def wire_to(connect: Open) -> Iterator[Wire]:
    """Open a wire to what `connect` connects to."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.05)  # no other way to end a waiting accept works on every system
        wire = Wire(listener.getsockname()[1])
        thread = Thread(target=_accept, args=(wire, listener, connect), name="wire")
        thread.start()
        try:
            yield wire
        finally:
            wire.over.set()
            wire.silent.clear()
            wire.break_all()
            thread.join()


def _accept(wire: Wire, listener: socket.socket, connect: Open) -> None:
    threads: list[Thread] = []
    while not wire.over.is_set():
        with suppress(OSError):
            near = listener.accept()[0]
            wire.accepted += 1
            near.setblocking(True)  # noqa: FBT003  it inherits the listener's time-out
            far = connect()
            wire.take(near, far)
            lost = Event()
            for way in ((near, far, 0), (far, near, 1)):
                threads.append(Thread(target=_relay, args=(wire, lost, *way), name="relay"))
                threads[-1].start()
    for thread in threads:
        thread.join()


def _relay(
    wire: Wire, lost: Event, source: socket.socket, target: socket.socket, direction: int
) -> None:
    # A socket that was closed meanwhile has no number any more.
    with suppress(OSError, ValueError):
        while not wire.over.is_set():
            if lost.is_set():
                wire.over.wait()
            elif wire.silent.is_set():
                wire.over.wait(0.01)
            elif select([source], [], [], 0.02)[0]:
                part, cut = wire.let_through(source.recv(65536), direction)
                if lost.is_set():
                    continue
                if wire.loses(part, direction):
                    lost.set()
                    wire.lost.set()
                target.sendall(part)
                if cut:
                    wire.break_all()
                if cut or not part:
                    break
    for each in (source, target):
        each.close()
