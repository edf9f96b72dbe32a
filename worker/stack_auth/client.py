"""The HTTP edge: asks the users API once, and says what its answer means."""

import re
import ssl
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from threading import Event
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote
from urllib.request import getproxies

import httpx

from worker import installed_version
from worker.clock import Clock
from worker.errors import Misconfigured, OrderRefused, Stopped, Transient, UsersSyncError
from worker.model import Page, Single
from worker.settings.names import USUAL_NAMES, Names
from worker.stack_auth.body import read_body
from worker.stack_auth.careful_reader import BrokenBody, parse_page, parse_user
from worker.stack_auth.page_reader import read_page, read_unordered, read_user
from worker.stack_auth.responses import (
    PASSING_STATUSES,
    Answer,
    error_for,
    error_for_new_user,
    proves_absence,
    refuses_order,
)
from worker.stack_auth.transport import Network, choose_proxy, request_deadline

Answered = TypeVar("Answered", Page, Single)

_HEADER_VALUE = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True)
class Access:
    """Whom to ask, as whom, and for what; `names` are for errors."""

    api_url: str
    project_id: str
    secret_server_key: str = field(repr=False)
    timeout_seconds: float = 60
    include_anonymous: bool = True
    ignored_fields: tuple[str, ...] = ("last_active_at_millis",)
    names: Names = USUAL_NAMES


class StackApi:
    """Asks one Stack Auth project for its users, one attempt a call; a few threads may share it.

    Every call raises Transient, Misconfigured or Stopped. No error's text holds the key, or
    anything that an answer says about a user. `proxies` is in the form of
    `urllib.request.getproxies`, which is the default; `transport` replaces the network.
    """

    def __init__(
        self,
        access: Access,
        *,
        clock: Clock,
        stop: Event,
        transport: httpx.BaseTransport | None = None,
        proxies: Mapping[str, str] | None = None,
    ) -> None:
        url = _read_url(access)
        proxy = choose_proxy(url, getproxies() if proxies is None else proxies)
        # Told how each request ended, its HTTP status, `timeout` or `error`; and its seconds.
        self.on_answer: Callable[[str, float], None] = lambda _status, _seconds: None
        self._access = access
        self._host = url.netloc.decode()  # without a password, should the URL have one
        self._way = self._host + _through(proxy, url)
        self._clock = clock
        self._stop = stop
        self._client = httpx.Client(
            base_url=f"{str(url).rstrip('/')}/api/v1",
            headers=_headers(access),
            timeout=access.timeout_seconds,
            transport=transport or Network(url, proxy),
            trust_env=False,  # the proxy is chosen above, and ~/.netrc is no business of ours
        )

    def fetch_page(self, cursor: str | None, limit: int, *, newest_first: bool = False) -> Page:
        """Ask for up to `limit` users, behind the one whose id is `cursor` or beginning with it."""
        query = {"limit": str(limit), "order_by": "signed_up_at"}
        query["desc"] = "true" if newest_first else "false"
        if cursor is not None:
            query["cursor"] = cursor
        if self._access.include_anonymous:
            query["include_anonymous"] = "true"
        answer = self._ask("/users", query)
        self._check(answer)
        page = read_page(answer.body, answer.observed_at, self._access.ignored_fields)
        return page or self._read(answer, parse_page)

    def fetch_active(self, limit: int) -> Page:
        """Ask for the users who were active last, without anonymous ones: an index serves that.

        Raises OrderRefused from a server that does not know this order.
        """
        query = {
            "limit": str(limit),
            "order_by": "last_active_at",
            "desc": "true",
            "include_restricted": "true",
        }
        answer = self._ask("/users", query)
        if refuses_order(answer):
            raise OrderRefused(f"{self._host} does not list users by their activity")
        self._check(answer)
        page = read_unordered(answer.body, answer.observed_at, self._access.ignored_fields)
        return page or self._read(answer, parse_page)

    def fetch_user(self, user_id: str) -> Single:
        """Ask for one user. Nothing but the API's own USER_NOT_FOUND proves that there is none."""
        answer = self._ask(f"/users/{quote(user_id, safe='')}", {})
        if proves_absence(answer):
            return Single(None, answer.observed_at)
        self._check(answer)
        ignored = self._access.ignored_fields
        single = read_user(answer.body, answer.observed_at, ignored)
        single = single or self._read(answer, parse_user)
        # What a proxy mixed up would count for a user who may be gone, or not have changed.
        if single.found is not None and single.found.id not in {None, user_id}:
            raise Transient(f"{self._host} answered with another user than the one asked for")
        return single

    def create_user(self, fields: Mapping[str, Any]) -> str:
        """Create a user; returns the id. A repeated call would create another one."""
        try:
            return self._create(fields)
        except Transient as error:
            if error.unsent:
                raise
            unknown = "it is not known whether the user was created: look for the email address"
            raise Transient(f"{error}; {unknown}") from error

    def _create(self, fields: Mapping[str, Any]) -> str:
        answer = self._ask("/users", {}, body=fields)
        if 400 <= answer.status < 500 and answer.is_from_api:  # noqa: PLR2004 - as RFC 9110 has it
            raise error_for_new_user(answer, self._host, self._access.names)
        self._check(answer)
        single = self._read(answer, parse_user)
        if single.found is None or single.found.id is None:
            raise Transient(f"{self._host} created a user without telling the id")
        return single.found.id

    def close(self) -> None:
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _ask(
        self, path: str, query: dict[str, str], body: Mapping[str, Any] | None = None
    ) -> Answer:
        """Send one request: GET, or POST with a body. Raises Transient, Misconfigured, Stopped."""
        if self._stop.is_set():
            raise Stopped("asked to stop")
        observed_at, began = self._clock.now(), time.monotonic()
        try:
            with (
                request_deadline(self._access.timeout_seconds, self._stop),
                self._client.stream(
                    "GET" if body is None else "POST", path, params=query, json=body
                ) as answer,
            ):
                text = read_body(answer, self._host)
        except httpx.RequestError as error:
            ended = "timeout" if isinstance(error, httpx.TimeoutException) else "error"
            self.on_answer(ended, time.monotonic() - began)
            # A protocol error quotes the bytes it stumbled over.
            cause = None if isinstance(error, httpx.ProtocolError) else error
            raise self._unanswered(error) from cause
        self.on_answer(str(answer.status_code), time.monotonic() - began)
        return Answer(answer.status_code, answer.headers, text, observed_at)

    def _read(
        self,
        answer: Answer,
        parse: Callable[[bytes | bytearray, datetime, Collection[str]], Answered],
    ) -> Answered:
        try:
            return parse(answer.body, answer.observed_at, self._access.ignored_fields)
        except BrokenBody as error:
            raise Transient(f"{self._host} answered brokenly: {error}", too_much=True) from error

    def _check(self, answer: Answer) -> None:
        """Raise what it means if there is nothing to read."""
        if not 200 <= answer.status < 300:  # noqa: PLR2004 - as RFC 9110 has it
            raise error_for(answer, self._host, self._access.names)
        if answer.is_html:
            raise Transient(f"{self._host} answered HTML; is a proxy in front of the API?")

    def _unanswered(self, error: httpx.RequestError) -> UsersSyncError:
        """Say what it means that there is no answer, or no end of it."""
        seconds = f"{self._access.timeout_seconds:g} s (stack.timeout_seconds)"
        match error:
            case httpx.ConnectTimeout() | httpx.PoolTimeout():
                return Transient(f"{self._way} took no connection within {seconds}", unsent=True)
            case httpx.TimeoutException():
                return Transient(f"{self._host} did not answer within {seconds}", too_much=True)
            case httpx.ProxyError():
                return _proxy_refused(error, self._host)
            case httpx.ConnectError():
                return _not_connected(error, self._way, self._access.names)
            case _:
                return Transient(f"{self._host} broke off before its answer ended", too_much=True)


def shared_transport(access: Access, connections: int) -> httpx.BaseTransport:
    """Make the network for all projects of one API; so many requests may be under way at once.

    Raises Misconfigured.
    """
    url = _read_url(access)
    return Network(url, choose_proxy(url, getproxies()), connections)


def _read_url(access: Access) -> httpx.URL:
    try:
        url = httpx.URL(access.api_url)
        url.host.encode("idna")  # as the look-up of the name will
    except (httpx.InvalidURL, UnicodeError):
        url = httpx.URL()
    if url.scheme not in {"http", "https"} or not url.host or not 0 < (url.port or 1) < 2**16:
        raise Misconfigured(
            f"{access.names.api_url} is not an address: write it like https://api.stack-auth.com"
        )
    return url


def _headers(access: Access) -> dict[str, str]:
    # Anything else would be refused by httpx, in words that quote it.
    for name, value in (
        (access.names.project_id, access.project_id),
        (access.names.secret_server_key, access.secret_server_key),
    ):
        if not _HEADER_VALUE.fullmatch(value):
            raise Misconfigured(f"{name} is empty or holds a space, a line break or the like")
    return {
        "accept": "application/json",
        "accept-encoding": "gzip",  # no other is unpacked
        "user-agent": f"users-sync/{installed_version()}",
        "x-stack-access-type": "server",
        "x-stack-project-id": access.project_id,
        "x-stack-secret-server-key": access.secret_server_key,
    }


def _through(proxy: httpx.Proxy | None, url: httpx.URL) -> str:
    """Name the proxy, which is what cannot be reached if the API cannot: without its password."""
    if proxy is None:
        return ""
    variables = f"{url.scheme.upper()}_PROXY or ALL_PROXY"
    return f", through the proxy {proxy.url.netloc.decode()} of {variables},"


def _not_connected(error: httpx.ConnectError, way: str, names: Names) -> UsersSyncError:
    # The cause is httpcore's own error, which takes that of ssl along as its argument.
    cause = error.__cause__.args[0] if error.__cause__ and error.__cause__.args else None
    if isinstance(cause, ssl.SSLCertVerificationError):
        return Misconfigured(
            f"the certificate of {way} is not trusted ({cause.verify_message}): correct"
            f" {names.api_url}, or let SSL_CERT_FILE name the file of your own authority"
        )
    return Transient(f"{way} could not be reached: {error}", unsent=True)


def _proxy_refused(error: httpx.ProxyError, host: str) -> UsersSyncError:
    """Judge what a proxy said instead of opening a tunnel: its status begins httpcore's words."""
    status = str(error)[:3]
    said = f"the proxy in HTTPS_PROXY or ALL_PROXY opens no way to {host} (status {status})"
    if status.startswith("4") and status not in map(str, PASSING_STATUSES):
        return Misconfigured(f"{said}: correct the address, with its password if it needs one")
    return Transient(said, unsent=True)
