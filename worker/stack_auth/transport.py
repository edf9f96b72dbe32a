"""The network under the API client: one time-out for a whole request, an early end, proxies."""

import ssl
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import wait
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from threading import Event
from typing import Any

import httpcore
import httpx

from worker.errors import Misconfigured, Stopped
from worker.net import close_when_opened, is_loopback, run_abandonable
from worker.stack_auth.tls import tls_context

# Nothing wakes a thread that waits for a socket, so it looks at the stop this often.
LONGEST_WAIT_SECONDS = 0.5

# httpcore asks for less, and what each read costs is more than what it copies.
READ_BYTES = 256 * 1024

# The server closes connections that were idle for 5 s; a request sent right then would be lost.
KEEPALIVE_SECONDS = 4.0

# A worker of one project asks for a few things at a time.
MOST_CONNECTIONS = 10

_limits: ContextVar[tuple[float, Event]] = ContextVar("limits")


@contextmanager
def request_deadline(seconds: float, stop: Event) -> Iterator[None]:
    """Bound everything that this thread does on a Network inside the block.

    httpx bounds each read alone: a server that sends a byte now and then holds a request for ever.
    Past the time a wait raises httpx.TimeoutException, and Stopped soon after `stop` is set.
    """
    token = _limits.set((time.monotonic() + seconds, stop))
    try:
        yield
    finally:
        _limits.reset(token)


def _time_left(late: type[httpcore.TimeoutException]) -> float:
    ends_at, stop = _limits.get()
    if stop.is_set():
        raise Stopped("asked to stop")
    left = ends_at - time.monotonic()
    if left <= 0:
        raise late("the time for the whole request is over")
    return left


def _next_wait(late: type[httpcore.TimeoutException]) -> float:
    return min(_time_left(late), LONGEST_WAIT_SECONDS)


class Network(httpx.HTTPTransport):
    """httpx's transport on connections that obey `within`.

    httpx has no way to hand a network backend to its pool, so the pool is made here, through
    httpcore's public interface. `_pool` is the one private name of httpx that this relies on.
    """

    def __init__(
        self, url: httpx.URL, proxy: httpx.Proxy | None, connections: int = MOST_CONNECTIONS
    ) -> None:
        # Without TLS, none of what it takes from the environment is looked at.
        schemes = {url.scheme, proxy.url.scheme if proxy else ""}
        tls = tls_context() if "https" in schemes else None
        self._pool = httpcore.ConnectionPool(
            ssl_context=tls,
            proxy=_core_proxy(proxy, tls) if proxy else None,
            max_connections=connections,
            keepalive_expiry=KEEPALIVE_SECONDS,
            network_backend=Backend(httpcore.SyncBackend()),
        )


def _core_proxy(proxy: httpx.Proxy, tls: ssl.SSLContext | None) -> httpcore.Proxy:
    own_tls = tls if proxy.url.scheme == "https" else None
    return httpcore.Proxy(str(proxy.url), auth=proxy.raw_auth, ssl_context=own_tls)


def choose_proxy(url: httpx.URL, proxies: Mapping[str, str]) -> httpx.Proxy | None:
    """Find the proxy for `url` in what `urllib.request.getproxies` returns.

    A loopback address never goes through one: the proxy would ask its own machine. Raises
    Misconfigured for a proxy that is no HTTP proxy.
    """
    address = proxies.get(url.scheme) or proxies.get("all")
    # A name below localhost is this machine, though it is not trusted with the key in the clear.
    is_local = is_loopback(url.host) or url.host.endswith(".localhost")
    if not address or is_local or _is_exempt(url, proxies.get("no", "")):
        return None
    try:
        proxy = httpx.Proxy(address if "://" in address else f"http://{address}")
    except (ValueError, httpx.InvalidURL):
        raise _no_proxy(url) from None  # its words quote the address, which may hold a password
    if proxy.url.scheme not in {"http", "https"} or not proxy.url.host:
        raise _no_proxy(url)
    return proxy


def _no_proxy(url: httpx.URL) -> Misconfigured:
    return Misconfigured(
        f"the proxy for {url.host} is no http:// or https:// address: correct"
        f" {url.scheme.upper()}_PROXY or ALL_PROXY, or name the host in NO_PROXY"
    )


def _is_exempt(url: httpx.URL, no_proxy: str) -> bool:
    """Read NO_PROXY as curl does: a name stands for its subdomains, too, with or without a dot."""
    entries = [entry.strip().lower() for entry in no_proxy.split(",") if entry.strip()]
    return any(
        entry in {"*", url.host, url.netloc.decode()}
        or f".{url.host}".endswith("." + entry.lstrip("*."))
        for entry in entries
    )


class Backend(httpcore.NetworkBackend):
    """Opens connections whose every step takes no longer than the request has left.

    The time-outs that httpcore hands down, one per read, are ignored.
    """

    def __init__(self, inner: httpcore.NetworkBackend) -> None:
        self._inner = inner

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ARG002 - the whole request's counts
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        left = _time_left(httpcore.ConnectTimeout)
        return _open(
            lambda: self._inner.connect_tcp(host, port, left, local_address, socket_options)
        )


class _Stream(httpcore.NetworkStream):
    def __init__(self, inner: httpcore.NetworkStream) -> None:
        self._inner = inner

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:  # noqa: ARG002
        while True:
            seconds = _next_wait(httpcore.ReadTimeout)
            with suppress(httpcore.ReadTimeout):
                return self._inner.read(max(max_bytes, READ_BYTES), seconds)

    def write(self, buffer: bytes, timeout: float | None = None) -> None:  # noqa: ARG002
        # Not in slices: it isn't known how much went out before a time-out. Requests are small.
        self._inner.write(buffer, _time_left(httpcore.WriteTimeout))

    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ARG002
    ) -> httpcore.NetworkStream:
        left = _time_left(httpcore.ConnectTimeout)
        return _open(lambda: self._inner.start_tls(ssl_context, server_hostname, left))

    def close(self) -> None:
        self._inner.close()

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


def _open(connect: Callable[[], httpcore.NetworkStream]) -> _Stream:
    """Wait for `connect` in a thread of its own, and leave it behind if it takes too long.

    Looking up a name has no time-out at all, and neither that nor connecting can be interrupted.
    """
    opening = run_abandonable(connect)
    try:
        while not wait([opening], _next_wait(httpcore.ConnectTimeout)).done:
            pass
    except BaseException:
        close_when_opened(opening)
        raise
    return _Stream(opening.result())
