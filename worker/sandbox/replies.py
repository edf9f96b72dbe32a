"""The answers of the fake API that are not users: known errors, and ready-made faults."""

import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from uuid import uuid4

JSON_TYPE = "application/json; charset=utf-8"
TEXT_TYPE = "text/plain; charset=utf-8"
NO_STORE = ("cache-control", "no-store, max-age=0")

ABOUT_AUTHENTICATION = (
    "For more information, see the docs on REST API authentication: "
    "https://docs.stack-auth.com/rest-api/overview#authentication"
)


@dataclass(frozen=True, slots=True)
class Reply:
    """One answer, whole; given to the fake, it is sent in place of the true one."""

    status: str
    headers: list[tuple[str, str]]
    body: bytes


class Refused(Exception):
    """A request that gets no users; `reply` says why, in the words of the real server."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.status)
        self.reply = reply


def json_reply(status: int, body: bytes, *headers: tuple[str, str]) -> Reply:
    named = [NO_STORE, ("content-type", JSON_TYPE), *headers, _request_id()]
    return Reply(_line(status), named, body)


KNOWN_ERROR = "x-stack-known-error"


def known_error(status: int, code: str, error: str, details: Any = None) -> Reply:
    """Write an error the way the server does: indented, and named in a header as well."""
    shown = {"code": code} | ({"details": details} if details is not None else {})
    body = json.dumps(shown | {"error": error}, indent=2, ensure_ascii=False).encode()
    return json_reply(status, body, (KNOWN_ERROR, code))


def schema_error(method: str, path: str, *problems: str) -> Reply:
    lines = [f"Request validation failed on {method} {path}:", *problems]
    message = "\n  - ".join(lines)
    return known_error(400, "SCHEMA_ERROR", message, {"message": message})


def user_not_found() -> Reply:
    return known_error(404, "USER_NOT_FOUND", "User not found.")


def unknown_path(url: str) -> Reply:
    text = (
        "404 — this page does not exist in Stack Auth's API.\n\n"
        "Please see the API documentation at https://docs.stack-auth.com, or visit the Stack Auth "
        f"dashboard at https://app.stack-auth.com.\n\nURL: {url}"
    )
    headers = [NO_STORE, ("content-type", TEXT_TYPE), _request_id()]
    return Reply(_line(404), headers, text.encode())


def too_many_unlimited(most: int) -> Reply:
    """Refuse to list more users than this without a limit; in no form of a known error."""
    text = f"More than {most} users match: use the limit and cursor parameters to page."
    return Reply(_line(400), [("content-type", TEXT_TYPE), _request_id()], text.encode())


def moved_permanently(path: str) -> Reply:
    """Redirect to the spelling of a path that the server knows."""
    return Reply(_line(308), [("location", path), ("refresh", f"0;url={path}")], path.encode())


def email_is_taken(email: str) -> Reply:
    return known_error(
        409,
        "USER_EMAIL_ALREADY_EXISTS",
        f'A user with email "{email}" already exists.',
        {"email": email, "would_work_if_email_was_verified": False},
    )


def method_not_allowed() -> Reply:
    return Reply(_line(405), [NO_STORE], b"")


def server_error() -> Reply:
    """The server's own trouble, as when its database is down: no JSON, no known error."""
    request_id = _request_id()
    text = (
        "Something went wrong. Please make sure the data you entered is correct.\n\n"
        f"Request ID: {request_id[1]}"
    )
    return Reply(_line(500), [("content-type", TEXT_TYPE), request_id], text.encode())


def too_many_requests(retry_after: float | str | None = None) -> Reply:
    """Ask for patience; the real server says only on some answers for how long."""
    header = [] if retry_after is None else [("retry-after", str(retry_after))]
    return json_reply(429, b'{"message":"Rate limit exceeded"}', *header)


def bad_gateway_html() -> Reply:
    """What a proxy says when the server behind it is gone."""
    return _html(502, b"<html><body><h1>502 Bad Gateway</h1></body></html>\n")


def html_ok() -> Reply:
    """A page for people with status 200: a maintenance notice, or the wrong address."""
    return _html(200, b"<!doctype html><html><body>Back in a minute.</body></html>\n")


def cut_off(whole: bytes = b'{"items":[],"is_paginated":true,"pagination":{}}') -> Reply:
    """Send the first half of a body as if it were all of it."""
    return json_reply(200, whole[: len(whole) // 2])


def as_sent(reply: Reply, *, known_error_headers: Sequence[str], gzipped: bool) -> Reply:
    """Name a known error in these headers, and pack the body."""
    code = dict(reply.headers).get(KNOWN_ERROR)
    headers = [header for header in reply.headers if header[0] != KNOWN_ERROR]
    headers += [(name, code) for name in known_error_headers if code is not None]
    body = reply.body
    if gzipped and body:
        body = gzip.compress(body, compresslevel=1)
        headers += [("content-encoding", "gzip"), ("vary", "Accept-Encoding")]
    return Reply(reply.status, headers, body)


def _html(status: int, body: bytes) -> Reply:
    return Reply(_line(status), [("content-type", "text/html; charset=utf-8")], body)


def _line(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}"


def _request_id() -> tuple[str, str]:
    return "x-stack-request-id", uuid4().hex[:16]
