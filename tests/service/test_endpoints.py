"""The endpoints, over real sockets."""

import socket
from collections.abc import Iterator

import httpx
import pytest

from tests.support.worker_samples import Ticks, sample_sweep, sample_vitals
from worker.cli.healthcheck import trouble
from worker.errors import Misconfigured
from worker.http_server import HttpServer, WsgiServer
from worker.service.endpoints import make_app, web_server
from worker.service.health import LONGEST_STEP_SECONDS, Health
from worker.service.metrics import Metrics

LOOPBACK = "127.0.0.1"


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def health(ticks: Ticks) -> Health:
    health = sample_vitals(ticks)
    health.enter("working")
    return health


@pytest.fixture
def metrics(health: Health) -> Metrics:
    return Metrics(health.read)


@pytest.fixture
def server(health: Health, metrics: Metrics) -> Iterator[HttpServer]:
    with web_server(LOOPBACK, 0, health, metrics) as server:
        yield server


@pytest.fixture
def client(server: HttpServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"http://{LOOPBACK}:{server.port}", trust_env=False) as client:
        yield client


def say(client: httpx.Client, path: str) -> tuple[int, str]:
    answer = client.get(path)
    return answer.status_code, answer.text


def send(server: HttpServer, request: bytes) -> bytes:
    """Return the first line of what is answered to these bytes."""
    with socket.create_connection((LOOPBACK, server.port), timeout=5) as conn:
        conn.sendall(request)
        return conn.makefile("rb").readline().strip()


def test_health_is_the_main_loop(client: httpx.Client, ticks: Ticks) -> None:
    assert say(client, "/healthz") == (200, "ok\n")
    ticks.seconds = 31
    assert say(client, "/healthz") == (503, "the main loop stands still\n")


def test_worker_that_stands_still_is_not_ready_either(
    client: httpx.Client, health: Health, ticks: Ticks
) -> None:
    health.sweep_finished(sample_sweep())
    ticks.seconds = LONGEST_STEP_SECONDS + 1
    health.beat()
    health.sweep_finished(sample_sweep())
    for path in ("/healthz", "/readyz"):
        assert say(client, path) == (503, "no job has moved for 660 s\n")


def test_readiness_names_each_reason_on_a_line(client: httpx.Client, health: Health) -> None:
    health.set_deletions(held=37, candidates=0, oldest_candidate_since=None)
    reasons = "no sweep was completed yet\n37 deletions are held: users-sync deletions\n"
    assert say(client, "/readyz") == (503, reasons)


def test_worker_that_swept_is_ready(client: httpx.Client, health: Health) -> None:
    health.sweep_finished(sample_sweep())
    assert say(client, "/readyz") == (200, "ready\n")


def test_metrics_are_served_as_prometheus_reads_them(client: httpx.Client) -> None:
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert "\nusers_sync_lease_held 0.0\n" in answer.text


def test_status_page_is_html(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert answer.text.startswith("<!doctype html>")


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics", "/users"])
def test_every_answer_is_locked_down(client: httpx.Client, path: str) -> None:
    headers = client.get(path).headers
    assert headers["content-security-policy"].startswith("default-src 'none'; style-src")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert not {"server", "via"} & set(headers)


@pytest.mark.parametrize("path", ["/users", "/metrics/", "/%2e%2e/etc/passwd"])
def test_other_paths_are_not_found(client: httpx.Client, path: str) -> None:
    assert client.get(path).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_nothing_can_be_written(client: httpx.Client, method: str) -> None:
    answer = client.request(method, "/")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/metrics"])
def test_head_is_get_without_its_body(client: httpx.Client, path: str) -> None:
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert head.headers["content-length"] == get.headers["content-length"]


def test_long_headers_are_refused(server: HttpServer) -> None:
    request = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n"
    assert send(server, request) == b"HTTP/1.0 431 Request Header Fields Too Large"


def test_long_bodies_are_refused_before_they_are_sent(server: HttpServer) -> None:
    request = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2000000\r\n\r\n"
    assert send(server, request) == b"HTTP/1.1 413 Request Entity Too Large"


def test_unfinished_request_keeps_nobody_waiting(server: HttpServer, client: httpx.Client) -> None:
    with socket.create_connection((LOOPBACK, server.port)) as slow:
        slow.sendall(b"GET / HTTP/1.1\r\nHost:")
        assert say(client, "/healthz") == (200, "ok\n")


def test_server_closes_under_open_connections(health: Health, metrics: Metrics) -> None:
    with web_server(LOOPBACK, 0, health, metrics) as server:
        idle = socket.create_connection((LOOPBACK, server.port), timeout=5)
        assert send(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n") == b"HTTP/1.1 200 OK"
    with idle:
        assert idle.recv(1) == b""
    assert trouble(LOOPBACK, server.port)


def test_server_closes_although_something_else_wakes_its_thread_first(
    health: Health, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    listening = socket.create_server((LOOPBACK, 0))
    with WsgiServer(make_app(health, metrics), listening, "web", {}) as server:
        trigger = server.polling.trigger
        pull = trigger._physical_pull  # noqa: SLF001

        def pull_late() -> None:
            pull()
            server.thread.join(timeout=5)
            pull()

        monkeypatch.setattr(trigger, "_physical_pull", pull_late)


def test_port_can_be_had_again_at_once(health: Health, metrics: Metrics) -> None:
    with web_server(LOOPBACK, 0, health, metrics) as first:
        assert trouble(LOOPBACK, first.port) is None
    with web_server(LOOPBACK, first.port, health, metrics) as second:
        assert (second.port, trouble(LOOPBACK, second.port)) == (first.port, None)


def test_taken_port_is_a_setting_to_change(health: Health, metrics: Metrics) -> None:
    with socket.create_server((LOOPBACK, 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Misconfigured) as error, web_server(LOOPBACK, port, health, metrics):
            pytest.fail("two servers on one port")
    assert str(error.value) == (
        f"http.port: port {port} of 127.0.0.1 is taken: set http.port (USERS_SYNC_HTTP__PORT) to"
        " another one, or to 0 to do without health, metrics and status page"
    )


@pytest.mark.parametrize("host", ["192.0.2.1", "a" * 64, "a..b"])
def test_address_of_another_machine_is_a_setting_to_change(
    health: Health, metrics: Metrics, host: str
) -> None:
    with pytest.raises(Misconfigured) as error, web_server(host, 0, health, metrics):
        pytest.fail("it listens on somebody else's address")
    assert str(error.value).startswith(f"http.host: cannot listen on {host}: set http.host")


def test_app_answers_without_a_server(health: Health, metrics: Metrics) -> None:
    transport = httpx.WSGITransport(make_app(health, metrics))
    with httpx.Client(transport=transport, base_url="http://worker") as client:
        assert say(client, "/healthz") == (200, "ok\n")
