"""A way to Postgres that breaks, or stalls, where it is told to: before a statement or after it."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event, Lock, Thread

import psycopg
from psycopg.conninfo import make_conninfo

# Much longer than anything takes that does not hang.
PATIENCE_SECONDS = 10

# Of all messages of a client these two run a statement; the text is in the query, or in the parse.
EXECUTE, PARSE, QUERY = b"E", b"P", b"Q"


@dataclass(slots=True)
class Cut:
    """Where to break off: at the nth statement from now on that has `text` in it.

    Before it the server never hears of the statement; `after` it the server has done what it says,
    and the client never hears of that. To `stall` is to wait before it, and then to go on.
    """

    nth: int = 1
    after: bool = False
    text: bytes = b""
    stall: bool = False


@dataclass(eq=False, slots=True)
class Link:
    """One connection of the client's, and ours to the server."""

    client: socket.socket
    server: socket.socket
    silent: bool = False
    ended: Event = field(default_factory=Event)
    last_parsed: bytes = b""

    def relay(self) -> None:
        """Pass on what the server says, until it ends the session."""
        with suppress(OSError):
            while data := self.server.recv(65_536):
                if not self.silent:
                    self.client.sendall(data)
        self.ended.set()
        with suppress(OSError):
            self.client.shutdown(socket.SHUT_RDWR)

    def hang_up(self) -> None:
        """Say no more to the server, which does what it was told before it ends the session."""
        with suppress(OSError):
            self.server.shutdown(socket.SHUT_WR)
        assert self.ended.wait(PATIENCE_SECONDS), "the server does not end the session"

    def sever(self) -> None:
        """Break off for the client, with the session gone by the time that it can notice."""
        self.silent = True
        self.hang_up()


@dataclass(eq=False)
class Proxy:
    """Listens at `url`. Knows of the protocol where a message ends, and what runs a statement.

    `happened` says of each cut whether it was before or after a statement, and how that began.
    `on_stall` is called when it stalls.
    """

    url: str
    _address: str | tuple[str, int]
    _listener: socket.socket
    happened: list[str] = field(default_factory=list)
    on_stall: Callable[[], None] = lambda: None
    stalled: bool = False
    _go_on: Event = field(default_factory=Event)
    _cut: Cut | None = None
    _links: list[Link] = field(default_factory=list)
    _threads: list[Thread] = field(default_factory=list)
    _lock: Lock = field(default_factory=Lock)

    def cut(self, cut: Cut | None) -> None:
        """Break off at a statement to come, once; None takes it back."""
        with self._lock:
            self._cut = cut

    def go_on(self) -> None:
        """Go on after a stall, and do not stall again unless told to."""
        with self._lock:
            if self._cut is not None and self._cut.stall:
                self._cut = None
        self.stalled = False
        self._go_on.set()

    def sever(self) -> None:
        """Break off every connection there is, one that stalls included."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.sever()
        self.go_on()

    def die(self) -> None:
        """Break off everything, and take no connection any more."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.sever()
        for thread in self._threads:
            thread.join(PATIENCE_SECONDS)

    def serve(self) -> None:
        """Take connections until the proxy dies."""
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                link = Link(client, self._connect())
                with self._lock:
                    self._links.append(link)
                self._start(link.relay)
                self._start(lambda link=link: self._listen(link))

    def _start(self, work: object) -> None:
        thread = Thread(target=work, name="proxy")  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _connect(self) -> socket.socket:
        if isinstance(self._address, tuple):
            return socket.create_connection(self._address)
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._address)
        return server

    def _listen(self, link: Link) -> None:
        """Pass on what the client says, message by message, until it goes or is to be cut off."""
        with suppress(OSError):
            self._pass_on(link)
        link.hang_up()
        with self._lock:
            self._links.remove(link)
        link.client.close()
        link.server.close()

    def _pass_on(self, link: Link) -> None:
        unread, head = bytearray(), 0  # the first message of all has no letter at its head
        while data := link.client.recv(65_536):
            unread += data
            ready = bytearray()
            while message := _first_message(unread, head):
                head = 1
                cut = self._cut_at(link, message)
                if cut is not None and cut.stall:
                    self._stall()
                    cut = None
                if cut is None or cut.after:
                    ready += message
                if cut is not None:
                    link.silent = True
                    link.server.sendall(ready)
                    link.sever()
                    when = "after" if cut.after else "before"
                    self.happened.append(f"{when} {_first_word(message, link.last_parsed)}")
                    return
            link.server.sendall(ready)

    def _stall(self) -> None:
        self._go_on.clear()
        self.stalled = True
        self.on_stall()
        self._go_on.wait()

    def _cut_at(self, link: Link, message: bytes) -> Cut | None:
        """Give the cut that is due at this message, which is then no longer to come."""
        kind = message[:1]
        if kind == PARSE:
            link.last_parsed = message
        with self._lock:
            cut = self._cut
            text = message if kind == QUERY else link.last_parsed
            if cut is None or kind not in {EXECUTE, QUERY} or cut.text not in text:
                return None
            cut.nth -= 1
            if cut.nth > 0:
                return None
            self._cut = None
            return cut


def _first_message(unread: bytearray, head: int) -> bytes:
    """Take the first message out of what was read, if all of it is there."""
    length = head + int.from_bytes(unread[head : head + 4])
    if len(unread) < head + 4 or len(unread) < length:
        return b""
    message = bytes(unread[:length])
    del unread[:length]
    return message


def _first_word(message: bytes, last_parsed: bytes) -> str:
    """Give how the statement begins that a message runs."""
    text = message[5:] if message[:1] == QUERY else last_parsed[5:].partition(b"\0")[2]
    return text.partition(b"\0")[0].split()[0].decode().lower()


@contextmanager
def opened_proxy(url: str) -> Iterator[Proxy]:
    """Open a way to the server of `url`, over TCP, whatever that server listens on."""
    with psycopg.connect(url) as conn:
        host, port = conn.info.host, conn.info.port
    address = f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)
    listener = socket.create_server(("127.0.0.1", 0))
    own_port = listener.getsockname()[1]
    # What is encrypted could be cut anywhere but at a statement.
    plain = {"sslmode": "disable", "gssencmode": "disable"}
    proxy = Proxy(make_conninfo(url, host="127.0.0.1", port=own_port, **plain), address, listener)
    serving = Thread(target=proxy.serve, name="proxy")
    serving.start()
    try:
        yield proxy
    finally:
        proxy.die()
        serving.join(PATIENCE_SECONDS)
