"""A raw socket server for answers that trickle, break off or never come."""

import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from ssl import SSLContext
from threading import Event, Semaphore, Thread


@dataclass(frozen=True)
class FaultyServer:
    """Where it listens, what it was asked, how often it hung up, and whether the test is over."""

    url: str
    requests: list[bytes] = field(default_factory=list)
    hung_up: Semaphore = field(default_factory=lambda: Semaphore(0))
    over: Event = field(default_factory=Event)


Behaviour = Callable[[socket.socket, FaultyServer], object]


@contextmanager
def serving(behave: Behaviour, tls: SSLContext | None = None) -> Iterator[FaultyServer]:
    """Read one request from each connection, hand the connection to `behave`, close it."""
    scheme = "https" if tls else "http"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = FaultyServer(f"{scheme}://127.0.0.1:{listener.getsockname()[1]}")
        thread = Thread(target=_accept, args=(listener, behave, tls, server))
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            thread.join()


def _accept(
    listener: socket.socket, behave: Behaviour, tls: SSLContext | None, server: FaultyServer
) -> None:
    listener.settimeout(0.05)  # no other way to end a waiting accept works on every system
    while not server.over.is_set():
        with suppress(OSError), listener.accept()[0] as plain:
            plain.settimeout(5)
            with tls.wrap_socket(plain, server_side=True) if tls else plain as connection:
                server.requests.append(_read_request(connection))
                behave(connection, server)
            server.hung_up.release()


def _read_request(connection: socket.socket) -> bytes:
    request = b""
    while not request.endswith(b"\r\n\r\n") and (part := connection.recv(65536)):
        request += part
    return request


def send(answer: bytes) -> Behaviour:
    """Send these bytes and hang up."""
    return lambda connection, _: connection.sendall(answer)


def trickle(answer: bytes, fast: int = 0) -> Behaviour:
    """Send the first `fast` bytes at once and then one every 50 ms, for 5 s; then all the rest.

    The answer does arrive in the end, so that a time-out per read would let it pass.
    """

    def behave(connection: socket.socket, server: FaultyServer) -> None:
        slow_end = min(len(answer), fast + 100)
        connection.sendall(answer[:fast])
        for place in range(fast, slow_end):
            server.over.wait(0.05)
            connection.sendall(answer[place : place + 1])
        connection.sendall(answer[slow_end:])

    return behave


def hang(then: Callable[[], None] = lambda: None) -> Behaviour:
    """Call `then` while the client waits for its answer, and answer nothing for 5 s."""

    def behave(_: socket.socket, server: FaultyServer) -> None:
        server.over.wait(0.05)  # by now it waits; if it should not yet, the test is just weaker
        then()
        server.over.wait(5)

    return behave
