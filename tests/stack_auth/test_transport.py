"""What the HTTP edge makes of a connection that is slow, broken, stopped or led through a proxy."""

import gzip
import shutil
import socket
import ssl
import subprocess
from pathlib import Path
from threading import Event

import httpcore
import httpx
import pytest

from tests.support.faulty_server import Behaviour, FaultyServer, hang, send, serving, trickle
from worker.clock import Clock
from worker.errors import Misconfigured, Stopped, Transient
from worker.model import Page
from worker.net import is_loopback
from worker.stack_auth.client import Access, StackApi
from worker.stack_auth.transport import (
    LONGEST_WAIT_SECONDS,
    Backend,
    choose_proxy,
    request_deadline,
)

BODY = b'{"items":[],"is_paginated":true,"pagination":{"next_cursor":null}}'
HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
WHOLE = HEAD + b"content-length: %d\r\n\r\n%s" % (len(BODY), BODY)
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n%x\r\n%s" % (len(BODY), BODY)


def fetch(
    url: str, *, stop: Event | None = None, seconds: float = 60, proxy: str | None = None
) -> Page:
    access = Access(url, "p1", "ssk_very_secret", timeout_seconds=seconds)
    proxies = {"all": proxy} if proxy else {}
    with StackApi(access, clock=Clock(), stop=stop or Event(), proxies=proxies) as api:
        return api.fetch_page(None, 100)


def unused_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as closed_at_once:
        return f"http://127.0.0.1:{closed_at_once.getsockname()[1]}"


# The connection breaks


def test_healthy_connection_brings_the_page() -> None:
    with serving(send(WHOLE)) as server:
        assert len(fetch(server.url).users) == 0
    assert server.requests[0].startswith(b"GET /api/v1/users?limit=100&")


def packed(body: bytes, length: int) -> bytes:
    head = HEAD + b"content-encoding: gzip\r\ncontent-length: %d\r\n\r\n" % length
    return head + body


MEMBERS = gzip.compress(BODY[:20]) + gzip.compress(BODY[20:])


def test_packed_answer_of_a_known_length_is_read() -> None:
    with serving(send(packed(MEMBERS, len(MEMBERS)))) as server:
        assert len(fetch(server.url).users) == 0


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        HEAD,
        WHOLE[:-1],
        CHUNKED[:-9],
        CHUNKED,  # but without the last, empty chunk
        WHOLE.replace(b"content-length: %d" % len(BODY), b"content-length: %d" % (len(BODY) + 1)),
        packed(MEMBERS, len(MEMBERS) + 1),
        packed(MEMBERS[:-1], len(MEMBERS) - 1),
        b"SSH-2.0-OpenSSH_9.2 ada@example.com\r\n",
        b"\x00\xff" * 100,
    ],
    ids=[
        "nothing",
        "head",
        "mid-body",
        "mid-chunk",
        "last-chunk",
        "shorter-than-said",
        "packed-shorter-than-said",
        "packed-cut-off",
        "not-http",
        "noise",
    ],
)
def test_broken_answer_passes(answer: bytes) -> None:
    with serving(send(answer)) as server, pytest.raises(Transient) as caught:
        fetch(server.url)
    assert caught.value.too_much
    assert "broke off" in str(caught.value)
    assert "ada@" not in str(caught.value)


def test_refused_connection_passes_and_blames_no_page_size() -> None:
    with pytest.raises(Transient, match="could not be reached") as caught:
        fetch(unused_url())
    assert not caught.value.too_much


def test_connection_that_the_server_closed_is_not_used_again() -> None:
    with serving(send(WHOLE)) as server:
        access = Access(server.url, "p1", "ssk_very_secret")
        with StackApi(access, clock=Clock(), stop=Event(), proxies={}) as api:
            api.fetch_page(None, 100)
            assert server.hung_up.acquire(timeout=5)
            api.fetch_page(None, 100)
    assert len(server.requests) == 2


# The time-out is total. Each of these answers does arrive, some seconds after it.


@pytest.mark.parametrize(
    "behave",
    [trickle(WHOLE), trickle(WHOLE, fast=len(WHOLE) - 60), trickle(CHUNKED + b"\r\n0\r\n\r\n")],
    ids=["head", "body", "chunks"],
)
def test_trickling_answer_is_left_in_time(behave: Behaviour) -> None:
    with serving(behave) as server, pytest.raises(Transient, match=r"within 0\.3 s") as caught:
        fetch(server.url, seconds=0.3)
    assert caught.value.too_much


def test_trickling_proxy_is_left_in_time() -> None:
    with serving(trickle(WHOLE)) as proxy, pytest.raises(Transient, match=r"within 0\.3 s"):
        fetch("http://stack.invalid", seconds=0.3, proxy=proxy.url)


def test_handshake_that_never_comes_is_left_in_time() -> None:
    with serving(hang()) as server, pytest.raises(Transient, match="took no connection"):
        fetch(server.url.replace("http:", "https:"), seconds=0.1)


# A stop ends a request in flight


def test_stop_ends_a_request_that_hangs() -> None:
    stop = Event()
    with serving(hang(then=stop.set)) as server, pytest.raises(Stopped):
        fetch(server.url, stop=stop)


def test_stop_ends_an_answer_that_trickles() -> None:
    stop = Event()

    def behave(connection: socket.socket, server: FaultyServer) -> None:
        stop.set()
        trickle(WHOLE)(connection, server)

    with serving(behave) as server, pytest.raises(Stopped):
        fetch(server.url, stop=stop)


class SlowNetwork(httpcore.NetworkBackend):
    """Says when it is asked to connect, and connects only once the test allows it."""

    def __init__(self, asked: Event) -> None:
        self.asked = asked
        self.allowed = Event()
        self.stream = ClosingStream()

    def connect_tcp(self, *_: object, **__: object) -> httpcore.NetworkStream:
        self.asked.set()
        self.allowed.wait(5)
        return self.stream


class ClosingStream(httpcore.NetworkStream):
    def __init__(self) -> None:
        self.closed = Event()

    def close(self) -> None:
        self.closed.set()


def test_stop_ends_connecting_and_leaves_nothing_open() -> None:
    stop = Event()
    network = SlowNetwork(asked=stop)
    with request_deadline(60, stop), pytest.raises(Stopped):
        Backend(network).connect_tcp("stack.invalid", 443)
    network.allowed.set()
    assert network.stream.closed.wait(5)


def test_connecting_is_left_in_time_and_leaves_nothing_open() -> None:
    network = SlowNetwork(asked=Event())
    with request_deadline(0.05, Event()), pytest.raises(httpcore.ConnectTimeout):
        Backend(network).connect_tcp("stack.invalid", 443)
    network.allowed.set()
    assert network.stream.closed.wait(5)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a certificate for 127.0.0.1 that nobody trusts, its key in the same file."""
    openssl = shutil.which("openssl")
    if openssl is None:
        pytest.skip("no openssl here to make a certificate with")
    file = tmp_path_factory.mktemp("tls") / "certificate.pem"
    form = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=test"
    names = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", "-", "-out", "-"]
    made = subprocess.run([openssl, *form.split(), *names], check=True, capture_output=True)
    file.write_bytes(made.stdout)
    return file


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


def test_untrusted_certificate_is_for_a_person(tls: ssl.SSLContext) -> None:
    with (
        serving(send(WHOLE), tls) as server,
        pytest.raises(
            Misconfigured, match=r"not trusted \(self.signed certificate\).*SSL_CERT_FILE"
        ),
    ):
        fetch(server.url)


def test_own_authority_can_be_named(
    tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with serving(send(WHOLE), tls) as server:
        assert len(fetch(server.url).users) == 0


def test_trickle_through_tls_is_left_in_time(
    tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    with (
        serving(trickle(WHOLE), tls) as server,
        pytest.raises(Transient, match=r"did not answer within 2 s"),
    ):
        fetch(server.url, seconds=2)


def test_slow_answer_through_tls_outlives_a_slice(
    tls: ssl.SSLContext, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))

    def behave(connection: socket.socket, server: FaultyServer) -> None:
        server.over.wait(LONGEST_WAIT_SECONDS * 1.2)
        connection.sendall(WHOLE)

    with serving(behave, tls) as server:
        assert len(fetch(server.url).users) == 0


# Proxies


def test_proxy_of_the_environment_is_used() -> None:
    with serving(send(WHOLE)) as proxy:
        fetch("http://stack.invalid", proxy=proxy.url.replace("http://", "http://ada:pw@"))
    request = proxy.requests[0].lower()
    assert request.startswith(b"get http://stack.invalid/api/v1/users?limit=100&")
    assert b"proxy-authorization: basic " in request


def test_tls_goes_through_a_tunnel() -> None:
    refusal = b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n"
    with serving(send(refusal)) as proxy, pytest.raises(Misconfigured, match="HTTPS_PROXY"):
        fetch("https://stack.invalid", proxy=proxy.url)
    assert proxy.requests[0].startswith(b"CONNECT stack.invalid:443 ")
    assert b"ssk_" not in proxy.requests[0]


@pytest.mark.parametrize("url", ["http://stack.invalid", "https://stack.invalid"])
def test_dead_proxy_is_named(url: str) -> None:
    proxy = unused_url()
    with pytest.raises(Transient) as caught:
        fetch(url, proxy=proxy.replace("http://", "http://ada:pw@"))
    address = proxy.removeprefix("http://")
    variables = f"{url.partition(':')[0].upper()}_PROXY or ALL_PROXY"
    expected = f"stack.invalid, through the proxy {address} of {variables}, could not be reached: "
    assert str(caught.value).startswith(expected)
    assert "pw" not in str(caught.value)


def test_silent_proxy_is_named() -> None:
    with serving(trickle(b"")) as proxy, pytest.raises(Transient) as caught:
        fetch("https://stack.invalid", seconds=0.3, proxy=proxy.url.replace("http:", "https:"))
    assert "through the proxy 127.0.0.1:" in str(caught.value)


def test_loopback_never_uses_a_proxy() -> None:
    with serving(send(WHOLE)) as server, serving(send(b"")) as proxy:
        fetch(server.url, proxy=proxy.url)
    assert proxy.requests == []


@pytest.mark.parametrize(
    ("url", "proxies", "chosen"),
    [
        ("https://h.example.com", {}, None),
        ("https://h.example.com", {"http": "http://p:1"}, None),
        ("https://h.example.com", {"https": "http://p:1"}, "http://p:1"),
        ("https://h.example.com", {"https": "p:1"}, "http://p:1"),
        ("https://h.example.com", {"all": "https://p:1"}, "https://p:1"),
        ("https://h.example.com", {"all": "http://p:1", "no": "other.com, "}, "http://p:1"),
        ("https://h.example.com", {"all": "http://p:1", "no": "ample.com"}, "http://p:1"),
        ("https://h.example.com", {"all": "http://p:1", "no": "a.com, Example.com"}, None),
        ("https://h.example.com", {"all": "http://p:1", "no": ".example.com"}, None),
        ("https://h.example.com", {"all": "http://p:1", "no": "*.example.com"}, None),
        ("https://h.example.com", {"all": "http://p:1", "no": "*"}, None),
        ("https://h:8443", {"all": "http://p:1", "no": "h:8443"}, None),
        ("http://127.9.9.9:1", {"all": "http://p:1"}, None),
        ("http://[::1]:1", {"all": "http://p:1"}, None),
        ("http://localhost", {"all": "http://p:1"}, None),
        ("http://stack.localhost", {"all": "http://p:1"}, None),
    ],
)
def test_proxy_is_chosen_by_the_usual_variables(
    url: str, proxies: dict[str, str], chosen: str | None
) -> None:
    proxy = choose_proxy(httpx.URL(url), proxies)
    assert (str(proxy.url) if proxy else None) == chosen


@pytest.mark.parametrize(
    "address", ["socks5://u:pw@p:1", "ftp://u:pw@p", "http://", "http://u:pw@p:x"]
)
def test_proxy_of_another_kind_is_refused_and_not_quoted(address: str) -> None:
    with pytest.raises(Misconfigured, match="HTTPS_PROXY") as caught:
        choose_proxy(httpx.URL("https://h.example.com"), {"all": address})
    assert "pw" not in str(caught.value)


def test_public_addresses_are_no_loopback() -> None:
    hosts = ["10.0.0.1", "localhost.example.com", "example.com", "::2"]
    assert [host for host in hosts if is_loopback(host)] == []
