"""Clients of the endpoints that are slow, many, or speak no HTTP."""

import resource
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http import HTTPStatus

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.faults.test_hostile_answers import repeated
from tests.support.waiting import until
from tests.support.worker_samples import Ticks, sample_vitals
from worker.http_server import HttpServer
from worker.service.endpoints import WAITRESS, web_server
from worker.service.metrics import Metrics

LOOPBACK = "127.0.0.1"
LIMIT = int(WAITRESS["connection_limit"])
HEADER_LIMIT = int(WAITRESS["max_request_header_size"])
# As patient as Docker and Kubernetes are with a health check.
HEALTH_SECONDS = 3


@pytest.fixture(scope="module")
def many_files() -> Iterator[None]:
    """Let this process hold both ends of all connections; most users may open 1,024 files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * (LIMIT + 100) + 200
    if soft == resource.RLIM_INFINITY or soft >= needed:
        yield
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        pytest.skip(f"no more than {hard} files may be open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture(scope="module")
def server(many_files: None) -> Iterator[HttpServer]:
    health = sample_vitals(Ticks())
    with web_server(LOOPBACK, 0, health, Metrics(health.read)) as server:
        yield server


def is_healthy(server: HttpServer) -> bool:
    url = f"http://{LOOPBACK}:{server.port}/healthz"
    with suppress(httpx.TransportError):
        answer = httpx.get(url, timeout=HEALTH_SECONDS, trust_env=False)
        return answer.status_code == HTTPStatus.OK
    return False


def connect(server: HttpServer) -> socket.socket:
    return socket.create_connection((LOOPBACK, server.port), timeout=HEALTH_SECONDS)


def connections(server: HttpServer) -> int:
    return len(server._server.polling.active_channels)  # noqa: SLF001  what it holds open


@pytest.mark.fault(
    "200 clients that never finish their request", held="a health check is answered in time"
)
@pytest.mark.parametrize("begun", [b"", b"GET / HTTP/1.1\r\nHost: a\r\nX-A: "], ids=len)
def test_slow_clients_keep_no_health_check_waiting(server: HttpServer, begun: bytes) -> None:
    with ExitStack() as slow:
        for client in [slow.enter_context(connect(server)) for _ in range(200)]:
            client.sendall(begun)
        until("they are let in", lambda: connections(server) >= 200)
        assert is_healthy(server)
    until("they are gone", lambda: connections(server) == 0)


@pytest.mark.fault(
    "more clients than there is room for",
    held="no more than the limit are let in, and a health check is answered when they go",
)
def test_connections_are_bounded(server: HttpServer) -> None:
    with ExitStack() as many:
        for _ in range(LIMIT + 100):
            many.enter_context(connect(server))
        # The socket that listens counts, too, and what wakes the thread.
        until("it is full", lambda: connections(server) >= LIMIT - 2)
        assert connections(server) <= LIMIT
    until("they are gone", lambda: is_healthy(server))


def is_hung_up_on(client: socket.socket) -> bool:
    with suppress(ConnectionError):
        while client.recv(65_536):
            pass
    return True


@pytest.mark.fault(
    "a request whose line, headers or body never end",
    held="it is refused, and hung up on, after some kilobytes",
)
@pytest.mark.parametrize(
    ("begin", "part"),
    [
        (b"GET /", b"a"),
        (b"GET / HTTP/1.1\r\nX: ", b"a"),
        (b"GET / HTTP/1.1\r\n", b"X: a\r\n"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n1;", b"a"),
        (b"POST / HTTP/1.1\r\nContent-Length: 999999999\r\n\r\n", b"a"),
    ],
    ids=["line", "header", "headers", "chunks", "extension", "body"],
)
def test_request_without_end_is_left(server: HttpServer, begin: bytes, part: bytes) -> None:
    with connect(server) as client:
        sent = 0
        with suppress(ConnectionError):
            client.sendall(begin)
            # What fits into the buffers of the sockets is taken without being read.
            while sent < 2**25:
                client.sendall(part * (HEADER_LIMIT // len(part)))
                sent += HEADER_LIMIT
        assert sent < 2**25
        assert is_hung_up_on(client)
    assert is_healthy(server)


paths = st.sampled_from(["/", "/healthz", "/metrics", "//", "/../etc/passwd", "/%00", "*", "http:"])
methods = st.sampled_from(["GET", "HEAD", "POST", "TRACE", "CONNECT", "get", "\0", "G" * 900])
header_lines = st.sampled_from(
    [
        "Host: a",
        "Host: a\r\nHost: b",
        "Content-Length: 5",
        "Content-Length: -1",
        "Content-Length: " + "9" * 40,
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: gzip, chunked",
        "Expect: 100-continue",
        "Connection: upgrade\r\nUpgrade: h2c",
        "X : a",
        " X: a",
        "X: \x00",
        "X\nGET /x HTTP/1.1",
    ]
)
requests = st.builds(
    lambda method, path, version, lines, body: (
        "\r\n".join([f"{method} {path} {version}", *lines, "", ""]).encode() + body
    ),
    methods,
    paths,
    st.sampled_from(["HTTP/1.1", "HTTP/1.0", "HTTP/0.9", "HTTP/2.0", "", "HTTP/1.1 x"]),
    st.lists(header_lines, max_size=3),
    st.binary(max_size=40),
)


@pytest.mark.fault(
    "requests that are no HTTP, or odd HTTP, many in one connection",
    held="each is answered, refused or hung up on; nothing but GET and HEAD finds anything",
    quick=40,
    thorough=3_000,
)
def test_odd_requests_harm_nobody(server: HttpServer, tries: int) -> None:
    @repeated(tries)
    @given(st.lists(requests | st.binary(max_size=60), min_size=1, max_size=3))
    def attempt(said: list[bytes]) -> None:
        began = time.monotonic()
        request = b"".join(said)
        first = answer_to(server, request)
        assert time.monotonic() - began < 2 * HEALTH_SECONDS
        if first.startswith(b"HTTP/1.1 200"):
            assert request.lstrip().upper().startswith((b"GET ", b"HEAD "))

    attempt()
    assert is_healthy(server)


def answer_to(server: HttpServer, said: bytes) -> bytes:
    """Say all of it and no more, and give what is answered."""
    with connect(server) as client, suppress(ConnectionError):
        client.sendall(said)
        with suppress(OSError):  # as it may have hung up on us
            client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65_536), b""))
    return b""
