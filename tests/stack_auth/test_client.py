"""What the HTTP edge asks, and what it makes of one answer."""

import json
from collections.abc import Iterator
from contextlib import closing
from datetime import timedelta
from threading import Event
from typing import Any

import httpx
import pytest
import respx

from tests.support.places import SAMPLES
from worker.clock import Clock
from worker.errors import LimitRefused, Misconfigured, Stopped, Transient, UsersSyncError
from worker.model import Single, User
from worker.stack_auth.body import MAX_BODY_BYTES
from worker.stack_auth.client import Access, StackApi

URL = "https://stack.example.com"
KEY = "ssk_very_secret"
ID = "637a92dd-1790-4469-81a9-9c88e077a18f"
RECORD = {"id": ID, "signed_up_at_millis": 1795220657790, "primary_email": "ada@example.com"}
PAGE = {"items": [RECORD], "is_paginated": True, "pagination": {"next_cursor": None}}


class Seconds:
    """A monotonic clock that moves by one second a look."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def router() -> respx.MockRouter:
    return respx.MockRouter(base_url=f"{URL}/api/v1", assert_all_called=False)


@pytest.fixture
def api(router: respx.MockRouter) -> Iterator[StackApi]:
    with open_api(router) as api:
        yield api


def open_api(router: respx.MockRouter, **access: Any) -> StackApi:
    transport = httpx.MockTransport(router.handler)
    whom = Access(**{"api_url": URL, "project_id": "p1", "secret_server_key": KEY} | access)
    return StackApi(whom, clock=Clock(Seconds()), stop=Event(), transport=transport)


def sample(name: str) -> httpx.Response:
    head, _, body = (SAMPLES / name).read_bytes().decode().partition("\n\n")
    status, *lines = head.splitlines()
    headers = dict(line.split(": ", 1) for line in lines if not line.startswith("transfer-"))
    return httpx.Response(int(status.split()[1]), headers=headers, content=body.encode())


def known_error(status: int, code: str, text: str = "ada@example.com") -> httpx.Response:
    headers = {"x-stack-known-error": code}
    return httpx.Response(status, headers=headers, json={"code": code, "error": text})


def page_error(router: respx.MockRouter, api: StackApi, answer: httpx.Response) -> UsersSyncError:
    """Ask for a page, and return the error after a look that it is discreet."""
    router.get("/users").mock(return_value=answer)
    with pytest.raises(UsersSyncError) as caught:
        api.fetch_page(None, 100)
    assert KEY not in str(caught.value)
    assert "ada@" not in str(caught.value)
    assert "\n" not in str(caught.value)
    return caught.value


def user_error(router: respx.MockRouter, api: StackApi, answer: httpx.Response) -> UsersSyncError:
    router.get(f"/users/{ID}").mock(return_value=answer)
    with pytest.raises(UsersSyncError) as caught:
        api.fetch_user(ID)
    return caught.value


# What is asked, and what a good answer becomes


def test_page_is_asked_for_as_a_server(router: respx.MockRouter, api: StackApi) -> None:
    router.get("/users").respond(json=PAGE)
    api.fetch_page(ID, 200)
    request = router.calls.last.request
    assert dict(request.url.params) == {
        "limit": "200",
        "order_by": "signed_up_at",
        "desc": "false",
        "cursor": ID,
        "include_anonymous": "true",
    }
    assert request.headers["x-stack-access-type"] == "server"
    assert request.headers["x-stack-project-id"] == "p1"
    assert request.headers["x-stack-secret-server-key"] == KEY
    assert request.headers["user-agent"].startswith("users-sync/")


def test_newest_page_is_asked_for_without_cursor(router: respx.MockRouter, api: StackApi) -> None:
    router.get("/users").respond(json=PAGE)
    api.fetch_page(None, 2, newest_first=True)
    params = router.calls.last.request.url.params
    assert params["desc"] == "true"
    assert "cursor" not in params


def test_older_server_is_not_asked_for_anonymous_users(router: respx.MockRouter) -> None:
    router.get("/users").respond(json=PAGE)
    with open_api(router, include_anonymous=False, api_url=f"{URL}/") as api:
        api.fetch_page(None, 2)
    assert "include_anonymous" not in router.calls.last.request.url.params


def test_page_is_observed_when_it_is_asked_for(router: respx.MockRouter) -> None:
    seconds = Seconds()
    clock = Clock(seconds)
    asked_at = []

    def answer(_: httpx.Request) -> httpx.Response:
        asked_at.append(clock.now())
        return httpx.Response(200, json=PAGE)

    access = Access(URL, "p1", KEY)
    transport = httpx.MockTransport(answer)
    with StackApi(access, clock=clock, stop=Event(), transport=transport) as api:
        page = api.fetch_page(None, 2)
    assert timedelta() < asked_at[0] - page.observed_at <= timedelta(seconds=1)
    assert page.users[0].record == RECORD


def test_empty_project_has_an_empty_page(router: respx.MockRouter, api: StackApi) -> None:
    router.get("/users").respond(json=PAGE | {"items": []})
    page = api.fetch_page(None, 100)
    assert (len(page.users), page.next_cursor) == (0, None)


def test_ignored_fields_do_not_count(router: respx.MockRouter) -> None:
    router.get(f"/users/{ID}").mock(
        side_effect=[httpx.Response(200, json=RECORD | {"seen": seen}) for seen in (1, 2)]
    )
    with open_api(router, ignored_fields=("seen",)) as api:
        first, second = api.fetch_user(ID).found, api.fetch_user(ID).found
    assert isinstance(first, User)
    assert isinstance(second, User)
    assert first.fingerprint == second.fingerprint


def test_real_user_is_found(router: respx.MockRouter, api: StackApi) -> None:
    found_id = "daf71220-49a5-4505-81c9-a6f373e2ef55"
    router.get(f"/users/{found_id}").mock(return_value=sample("user-rich.http"))
    found = api.fetch_user(found_id).found
    assert isinstance(found, User)
    assert found.key == (1795221821770, found_id)


def test_odd_id_stays_one_part_of_the_path(router: respx.MockRouter, api: StackApi) -> None:
    router.get(url__startswith=URL).mock(return_value=known_error(400, "SCHEMA_ERROR"))
    with pytest.raises(Misconfigured):
        api.fetch_user("a/../b?c")
    assert router.calls.last.request.url.raw_path == b"/api/v1/users/a%2F..%2Fb%3Fc"


def test_answer_about_another_user_is_none_about_this_one(
    router: respx.MockRouter, api: StackApi
) -> None:
    another = RECORD | {"id": "daf71220-49a5-4505-81c9-a6f373e2ef55"}
    error = user_error(router, api, httpx.Response(200, json=another))
    assert isinstance(error, Transient)
    assert "another user" in str(error)


# The only proof of deletion


def test_the_apis_own_404_proves_that_a_user_is_gone(
    router: respx.MockRouter, api: StackApi
) -> None:
    router.get(f"/users/{ID}").mock(return_value=sample("get-deleted-user.http"))
    answer = api.fetch_user(ID)
    assert answer == Single(None, answer.observed_at)


@pytest.mark.parametrize("names", [["stack"], ["hexclave"], ["stack", "hexclave"]])
def test_proof_may_stand_in_either_header(
    router: respx.MockRouter, api: StackApi, names: list[str]
) -> None:
    headers = {f"x-{name}-known-error": "USER_NOT_FOUND" for name in names}
    router.get(f"/users/{ID}").respond(404, headers=headers, json={"code": "USER_NOT_FOUND"})
    assert api.fetch_user(ID).found is None


@pytest.mark.parametrize("headers", [{}, {"x-stack-request-id": "1358asfn431jwmjt"}])
def test_proof_needs_the_header_of_the_api(
    router: respx.MockRouter, api: StackApi, headers: dict[str, str]
) -> None:
    answer = httpx.Response(404, headers=headers, json={"code": "USER_NOT_FOUND"})
    error = user_error(router, api, answer)
    assert isinstance(error, Transient)
    assert "without its header x-stack-known-error, which proves nothing" in str(error)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (sample("error-unknown-path.http"), Misconfigured),
        (httpx.Response(404), Misconfigured),
        (httpx.Response(404, html="<h1>Not Found</h1>"), Misconfigured),
        (httpx.Response(404, json={"message": "no route"}), Misconfigured),
        (httpx.Response(404, json=["USER_NOT_FOUND"]), Misconfigured),
        (httpx.Response(404, json={"code": ["USER_NOT_FOUND"]}), Misconfigured),
        (httpx.Response(404, content=b"[" * 100_000), Misconfigured),
        (known_error(404, "TEAM_NOT_FOUND"), Misconfigured),
        (known_error(400, "USER_NOT_FOUND"), Transient),
        (httpx.Response(404, headers={"x-stack-known-error": "USER_NOT_FOUND"}), Transient),
        (
            httpx.Response(
                404,
                headers={"x-stack-known-error": "TEAM_NOT_FOUND"},
                json={"code": "USER_NOT_FOUND"},
            ),
            Transient,
        ),
        *(
            (
                httpx.Response(
                    404,
                    headers={"x-stack-known-error": one, "x-hexclave-known-error": other},
                    json={"code": "USER_NOT_FOUND"},
                ),
                Transient,
            )
            for one, other in [
                ("USER_NOT_FOUND", "TEAM_NOT_FOUND"),
                ("TEAM_NOT_FOUND", "USER_NOT_FOUND"),
                ("USER_NOT_FOUND", ""),
            ]
        ),
        (httpx.Response(404, headers={"x-hexclave-known-error": "USER_NOT_FOUND"}), Transient),
        (httpx.Response(200, json={"code": "USER_NOT_FOUND"}), Transient),
        (httpx.Response(200, json=PAGE), Transient),
        (httpx.Response(500, json={"code": "USER_NOT_FOUND"}), Transient),
        (httpx.Response(410), Misconfigured),
    ],
)
def test_nothing_else_proves_it(
    router: respx.MockRouter, api: StackApi, answer: httpx.Response, kind: type[Exception]
) -> None:
    assert type(user_error(router, api, answer)) is kind


# What a person must do


@pytest.mark.parametrize(
    ("answer", "hints"),
    [
        (sample("error-wrong-key.http"), ["STACK_SECRET_SERVER_KEY", "STACK_PROJECT_ID"]),
        (sample("error-no-key.http"), ["STACK_SECRET_SERVER_KEY", "STACK_API_URL"]),
        (sample("error-client-access.http"), ["x-stack-", "STACK_API_URL"]),
        (sample("error-unknown-project.http"), ["STACK_PROJECT_ID", "STACK_API_URL"]),
        (sample("error-no-headers.http"), ["x-stack-", "STACK_API_URL"]),
        (sample("error-unknown-path.http"), ["STACK_API_URL", "/api/v1"]),
        (sample("list-malformed-cursor.http"), ["parameter cursor"]),
        (sample("list-unknown-parameter.http"), ["parameter frobnicate"]),
        (
            known_error(400, "SCHEMA_ERROR", "query contains unknown properties: a, order_by"),
            ["parameter a, order_by"],
        ),
        (
            known_error(
                400, "SCHEMA_ERROR", "query contains unknown properties: include_anonymous"
            ),
            ["stack.include_anonymous = false", "USERS_SYNC_STACK__INCLUDE_ANONYMOUS"],
        ),
        (known_error(400, "SCHEMA_ERROR"), ["a parameter", "STACK_API_URL"]),
        (known_error(403, "SOMETHING_NEW"), ["403 SOMETHING_NEW", "STACK_API_URL"]),
        (known_error(403, "ada@example.com"), ["403", "STACK_API_URL"]),
        (
            httpx.Response(400, headers={"x-hexclave-known-error": "CURRENT_PROJECT_NOT_FOUND"}),
            ["400 CURRENT_PROJECT_NOT_FOUND", "STACK_PROJECT_ID"],
        ),
        (httpx.Response(401), ["401", "STACK_SECRET_SERVER_KEY"]),
        (httpx.Response(403, html="<p>ada@example.com</p>"), ["403"]),
        (httpx.Response(407), ["407"]),
        (httpx.Response(413), ["413"]),
        (httpx.Response(414), ["414"]),
    ],
)
def test_configuration_errors_say_the_fix(
    router: respx.MockRouter, api: StackApi, answer: httpx.Response, hints: list[str]
) -> None:
    error = page_error(router, api, answer)
    assert type(error) is Misconfigured
    assert [hint for hint in hints if hint not in str(error)] == []


def test_answer_without_headers_of_the_api_may_be_a_proxys(
    router: respx.MockRouter, api: StackApi
) -> None:
    error = page_error(router, api, httpx.Response(403, headers={"server": "a proxy"}))
    assert "a proxy may have sent it" in str(error)


@pytest.mark.parametrize(
    "header", ["x-stack-request-id", "X-Hexclave-Request-Id", "x-hexclave-known-error"]
)
def test_answer_with_a_header_of_the_api_is_its_own(
    router: respx.MockRouter, api: StackApi, header: str
) -> None:
    error = page_error(router, api, httpx.Response(403, headers={header: "SOMETHING_NEW"}))
    assert "a proxy may have sent it" not in str(error)


@pytest.mark.parametrize(
    ("message", "largest"),
    [
        ("query.limit must be less than or equal to 1000", 1_000),
        ("query.limit must be at most 500", 500),
        ("query.limit must be at most 1,000", 1_000),
        ("query.limit is too large", None),
        ("query.cursor must be a valid UUID\n  - query.limit is over 250", 250),
    ],
)
def test_limit_that_the_server_does_not_take_says_how_much_it_takes(
    router: respx.MockRouter, api: StackApi, message: str, largest: int | None
) -> None:
    details = {"message": f"Request validation failed on GET /api/v1/users:\n  - {message}"}
    answer = httpx.Response(400, json={"code": "SCHEMA_ERROR", "error": "x", "details": details})
    error = page_error(router, api, answer)
    assert isinstance(error, LimitRefused)
    assert error.largest == largest


def test_answer_of_todays_server_to_1001_users_names_its_cap(
    router: respx.MockRouter, api: StackApi
) -> None:
    error = page_error(router, api, sample("today-list-limit-1001.http"))
    assert isinstance(error, LimitRefused)
    assert error.largest == 1_000


def test_limit_in_another_error_is_no_cap(router: respx.MockRouter, api: StackApi) -> None:
    answer = known_error(400, "SOMETHING_ELSE", "query.limit must be less than or equal to 5")
    assert type(page_error(router, api, answer)) is Misconfigured


@pytest.mark.parametrize(
    ("status", "location", "said"),
    [
        (301, f"{URL}/login?token=t0k", "to https://stack.example.com,"),
        (307, "https://u:pass@other.example.com/ada@example.com", "to https://other.example.com,"),
        (308, "/login?token=t0k", "to the same host,"),
        (308, "/login?token=t0k", "without a double or trailing slash"),
        (301, "https://other.example.com:8443/t0k", "to https://other.example.com:8443,"),
        (302, "", "to the same host,"),
        (300, "http://other:t0k", "to an unreadable address,"),
        (304, None, "to the same host,"),
    ],
)
def test_redirect_is_not_followed(
    router: respx.MockRouter, api: StackApi, status: int, location: str | None, said: str
) -> None:
    headers = {} if location is None else {"location": location}
    error = page_error(router, api, httpx.Response(status, headers=headers))
    assert type(error) is Misconfigured
    assert len(router.calls) == 1
    assert said in str(error)
    assert "t0k" not in str(error)
    assert "pass@" not in str(error)


@pytest.mark.parametrize(
    "api_url",
    [
        "",
        "stack.example.com",
        "ftp://h",
        "https://",
        "http://[::1",
        "http://a..b",
        "http://h:99999",
    ],
)
def test_unusable_address_is_refused(router: respx.MockRouter, api_url: str) -> None:
    with pytest.raises(Misconfigured, match="STACK_API_URL"):
        open_api(router, api_url=api_url)


@pytest.mark.parametrize("key", ["", "ssk_a\n", "ssk_é", "ssk a"])
def test_unusable_key_is_refused_and_not_quoted(router: respx.MockRouter, key: str) -> None:
    with pytest.raises(Misconfigured, match="STACK_SECRET_SERVER_KEY") as caught:
        open_api(router, secret_server_key=key)
    assert not key or key not in str(caught.value)


def test_key_shows_in_no_repr(api: StackApi) -> None:
    assert KEY not in repr(Access(URL, "p1", KEY))
    assert KEY not in repr(api)


def test_password_in_the_address_is_not_said(router: respx.MockRouter) -> None:
    router.get("/users").respond(503)
    with (
        open_api(router, api_url="https://user:pass@stack.example.com") as api,
        pytest.raises(Transient) as caught,
    ):
        api.fetch_page(None, 2)
    assert str(caught.value) == "stack.example.com answered 503"


# What passes by itself


@pytest.mark.parametrize("status", [500, 502, 503, 504, 520])
def test_servers_own_trouble_passes(router: respx.MockRouter, api: StackApi, status: int) -> None:
    error = page_error(router, api, httpx.Response(status, html="<p>ada@example.com</p>"))
    assert isinstance(error, Transient)
    assert (error.too_much, error.retry_after) == (True, None)
    assert str(error) == f"stack.example.com answered {status}"


def test_database_down_passes(router: respx.MockRouter, api: StackApi) -> None:
    error = page_error(router, api, sample("error-source-database-down.http"))
    assert isinstance(error, Transient)


@pytest.mark.parametrize("status", [408, 425, 429])
def test_busy_server_passes(router: respx.MockRouter, api: StackApi, status: int) -> None:
    error = page_error(router, api, httpx.Response(status, json={"message": "slow down"}))
    assert isinstance(error, Transient)
    assert (error.too_much, error.retry_after) == (False, None)


DATE = {"date": "Sat, 21 Nov 2026 00:43:42 GMT"}


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": " 0.25 "}, 0.25),
        ({"retry-after": "0"}, 0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "9" * 400}, None),
        ({"retry-after": "Sat, 21 Nov 99999999999999999999 00:44:12 GMT"}, None),
        ({"retry-after": "Sat, 21 Nov 2026 00:44:12 +99999999999999"}, None),
        ({"retry-after": "Sat, 21 Nov 2026 00:44:12 GMT"} | DATE, 30),
        ({"retry-after": "Sat, 21 Nov 2026 00:44:12 -0000"} | DATE, 30),
        ({"retry-after": "Sat, 21 Nov 2026 00:43:12 GMT"} | DATE, None),
        ({"retry-after": "Fri, 21 Nov 2025 00:43:12 GMT", "date": "?"}, None),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_read(
    router: respx.MockRouter,
    api: StackApi,
    status: int,
    headers: dict[str, str],
    seconds: float | None,
) -> None:
    error = page_error(router, api, httpx.Response(status, headers=headers))
    assert isinstance(error, Transient)
    assert error.retry_after == seconds


@pytest.mark.parametrize(
    "answer",
    [
        httpx.Response(200, html="<html>Sign in to the guest network, ada@example.com</html>"),
        httpx.Response(200, text="\n<!doctype html>"),
        httpx.Response(200, headers={"content-type": "Text/HTML;charset=utf-8"}, json=PAGE),
        httpx.Response(200, headers={"content-type": "application/xhtml+xml "}, json=PAGE),
        httpx.Response(200, headers={"content-type": "application/json"}, text="<p>"),
    ],
)
def test_html_is_taken_for_a_proxy(
    router: respx.MockRouter, api: StackApi, answer: httpx.Response
) -> None:
    error = page_error(router, api, answer)
    assert isinstance(error, Transient)
    assert str(error) == "stack.example.com answered HTML; is a proxy in front of the API?"


@pytest.mark.parametrize(
    "media_type",
    [
        "application/vnd.htmlish+json",
        "application/json; profile=text/html",
        "application/json;charset=utf-8",
        "text/html5",
        "",
    ],
)
def test_other_content_types_are_read(
    router: respx.MockRouter, api: StackApi, media_type: str
) -> None:
    router.get("/users").respond(json=PAGE, headers={"content-type": media_type})
    assert api.fetch_page(None, 2).users[0].record == RECORD


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{}",
        b"[]",
        json.dumps(PAGE).encode()[:-20],
        b'{"items":[{"primary_email":"ada@example.com',
        json.dumps(RECORD).encode(),
    ],
)
def test_broken_body_passes_with_a_smaller_page(
    router: respx.MockRouter, api: StackApi, body: bytes
) -> None:
    error = page_error(router, api, httpx.Response(200, content=body))
    assert isinstance(error, Transient)
    assert error.too_much


def test_body_that_does_not_unpack_passes(router: respx.MockRouter, api: StackApi) -> None:
    packed = httpx.ByteStream(b"not gzip")
    answer = httpx.Response(200, headers={"content-encoding": "gzip"}, stream=packed)
    assert isinstance(page_error(router, api, answer), Transient)


class Endless(httpx.SyncByteStream):
    def __init__(self) -> None:
        self.sent = 0
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.sent += 2**20
            yield b" " * 2**20

    def close(self) -> None:
        self.closed = True


def test_endless_body_is_not_read_on() -> None:
    body = Endless()
    transport = httpx.MockTransport(lambda _: httpx.Response(200, stream=body))
    access = Access(URL, "p1", KEY)
    with (
        StackApi(access, clock=Clock(), stop=Event(), transport=transport) as api,
        pytest.raises(Transient, match="64 MiB") as caught,
    ):
        api.fetch_page(None, 2)
    assert caught.value.too_much
    assert body.sent == MAX_BODY_BYTES + 2**20
    assert body.closed


@pytest.mark.parametrize(
    ("fault", "blames"),
    [
        (httpx.ConnectTimeout("t"), "network"),
        (httpx.PoolTimeout("t"), "network"),
        (httpx.ReadTimeout("t"), "page size"),
        (httpx.WriteTimeout("t"), "page size"),
        (httpx.ConnectError("[Errno -2] Name or service not known"), "network"),
        (httpx.ProxyError("502 Bad Gateway"), "network"),
        (httpx.ProxyError("nonsense"), "network"),
        (httpx.ReadError("reset"), "page size"),
        (httpx.RemoteProtocolError("ada@example.com"), "page size"),
    ],
)
def test_faults_of_the_network_pass(
    router: respx.MockRouter, api: StackApi, fault: httpx.RequestError, blames: str
) -> None:
    router.get("/users").mock(side_effect=fault)
    with pytest.raises(Transient) as caught:
        api.fetch_page(None, 2)
    assert caught.value.too_much == (blames == "page size")
    assert "ada@" not in str(caught.value)


def creation_error(
    router: respx.MockRouter, api: StackApi, outcome: httpx.Response | Exception
) -> str:
    """Try to create a user; returns what is said of it."""
    router.post("/users").mock(side_effect=[outcome])
    with pytest.raises(Transient) as caught:
        api.create_user({"primary_email": "ada@example.com"})
    assert router.calls.call_count == 1
    assert "ada@" not in str(caught.value)
    return str(caught.value)


UNKNOWN = "it is not known whether the user was created: look for the email address"


@pytest.mark.parametrize(
    "outcome",
    [
        httpx.ReadTimeout("t"),
        httpx.WriteTimeout("t"),
        httpx.ReadError("reset"),
        httpx.WriteError("reset"),
        httpx.RemoteProtocolError("cut off"),
        httpx.Response(408),
        httpx.Response(425),
        httpx.Response(500),
        httpx.Response(502, html="<p>Bad Gateway</p>"),
        httpx.Response(200, html="<p>Welcome</p>"),
        httpx.Response(200, headers={"content-encoding": "br"}, stream=httpx.ByteStream(b"{}")),
        httpx.Response(201, content=b'{"id":'),
        httpx.Response(201, json={"signed_up_at_millis": 1}),
    ],
    ids=repr,
)
def test_user_that_may_have_been_created_is_told_as_such(
    router: respx.MockRouter, api: StackApi, outcome: httpx.Response | Exception
) -> None:
    assert creation_error(router, api, outcome).endswith(UNKNOWN)


@pytest.mark.parametrize(
    "outcome",
    [
        httpx.ConnectTimeout("t"),
        httpx.PoolTimeout("t"),
        httpx.ConnectError("[Errno -2] Name or service not known"),
        httpx.ProxyError("502 Bad Gateway"),
        httpx.Response(429),
        known_error(429, "RATE_LIMITED"),
    ],
    ids=repr,
)
def test_user_that_cannot_have_been_created_is_not_looked_for(
    router: respx.MockRouter, api: StackApi, outcome: httpx.Response | Exception
) -> None:
    assert "created" not in creation_error(router, api, outcome)


@pytest.mark.parametrize("said", ["407 Proxy Authentication Required", "403 Forbidden"])
def test_proxy_that_refuses_is_for_a_person(
    router: respx.MockRouter, api: StackApi, said: str
) -> None:
    router.get("/users").mock(side_effect=httpx.ProxyError(said))
    with pytest.raises(Misconfigured, match="HTTPS_PROXY"):
        api.fetch_page(None, 2)


def test_nothing_is_asked_after_a_stop(router: respx.MockRouter) -> None:
    route = router.get("/users").respond(json=PAGE)
    stop = Event()
    stop.set()
    transport = httpx.MockTransport(router.handler)
    access = Access(URL, "p1", KEY)
    with (
        closing(StackApi(access, clock=Clock(), stop=stop, transport=transport)) as api,
        pytest.raises(Stopped),
    ):
        api.fetch_page(None, 2)
    assert not route.called
