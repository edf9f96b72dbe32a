"""A fake Stack Auth users API: a WSGI app that answers as the real one does, hazards included."""

import re
import socket
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import orjson

from worker.http_server import WsgiServer
from worker.sandbox.kinds import APRIL, TODAY, Kind
from worker.sandbox.project import Asked, Entry, Project
from worker.sandbox.replies import (
    Refused,
    Reply,
    as_sent,
    bad_gateway_html,
    cut_off,
    email_is_taken,
    html_ok,
    json_reply,
    method_not_allowed,
    moved_permanently,
    schema_error,
    server_error,
    too_many_requests,
    too_many_unlimited,
    unknown_path,
    user_not_found,
)
from worker.sandbox.requests import Request, check_access, check_user_id, fields, listing, read

__all__ = [
    "APRIL",
    "TODAY",
    "FakeStackApi",
    "Kind",
    "Project",
    "Reply",
    "Request",
    "bad_gateway_html",
    "cut_off",
    "html_ok",
    "serve",
    "server_error",
    "too_many_requests",
]

Hook = Callable[[Request], Reply | None]

SLASHES = re.compile("//+")
USERS = re.compile("/api/v1/users(?:/([^/]+))?")
# The real server overflows the bind parameters of a statement somewhat above this.
LARGEST_PAGE = 32_000


class FakeStackApi:
    """The users API of one project. Safe to be called from many threads.

    `requests` holds everything that was asked for, in order. `kind` is the kind of server it
    answers as; it may be set between two requests, as a hosted server is replaced.
    """

    def __init__(self, project: Project, kind: Kind = TODAY) -> None:
        self.project = project
        self.kind = kind
        self.requests: list[Request] = []
        self._replica: Project | None = None
        self._hook: Hook | None = None
        self._failures: deque[Reply] = deque()
        self._answers = count()

    def on_request(self, hook: Hook | None) -> None:
        """Have `hook` called before each request is answered; None takes it away.

        It may change the project, wait, or return an answer to be sent in place of the true one.
        """
        self._hook = hook

    def fail_next(self, *replies: Reply) -> None:
        """Answer the next requests with these, one each, unless the hook answers them."""
        self._failures.extend(replies)

    def lag(self) -> None:
        """Read from a replica that stands still from now on; writes go to the project."""
        self._replica = self.project.snapshot()

    def catch_up(self) -> None:
        """Read from the project again."""
        self._replica = None

    @property
    def shown(self) -> Project:
        """The project as it is read: of now, or of the moment from which reads lag."""
        return self.project if self._replica is None else self._replica

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        request = read(environ)
        self.requests.append(request)
        reply = self._fault(request) or self.answer(request)
        start_response(reply.status, reply.headers)
        return [reply.body]

    def _fault(self, request: Request) -> Reply | None:
        reply = self._hook(request) if self._hook else None
        if reply is None and self._failures:
            return self._failures.popleft()
        return reply

    def answer(self, request: Request) -> Reply:
        """Give the true answer to a request, as this kind of server sends it."""
        kind = self.kind
        reply = self._reply(request, kind)
        accepted = "gzip" in request.headers.get("accept-encoding", "")
        return as_sent(
            reply,
            known_error_headers=kind.known_error_headers,
            gzipped=kind.gzip and accepted,
        )

    def _reply(self, request: Request, kind: Kind) -> Reply:
        path = SLASHES.sub("/", request.path).removesuffix("/") if kind.redirects else request.path
        if path not in {request.path, ""}:
            return moved_permanently(path)
        of_users = USERS.fullmatch(path)
        if of_users is None:
            return unknown_path(request.url)
        try:
            check_access(request, self.project, kind)
            user_id = of_users[1]
            return self._of_user(request, user_id) if user_id else self._of_list(request, kind)
        except Refused as refused:
            return refused.reply

    def _of_list(self, request: Request, kind: Kind) -> Reply:
        match request.method:
            case "GET":
                return self._list(request, kind)
            case "POST":
                return self._create(fields(request))
            case _:
                return method_not_allowed()

    def _create(self, asked: dict[str, Any]) -> Reply:
        if asked.pop("password", None) is not None:
            asked["has_password"] = True
        email = asked.get("primary_email")
        if email is not None and "@" not in str(email):
            raise Refused(
                schema_error("POST", "/api/v1/users", "body.primary_email must be a valid email")
            )
        if asked.get("primary_email_auth_enabled") and self.project.signs_in_with(email):
            return email_is_taken(str(email))
        return self._user(self.project, self.project.create(**asked), status=201)

    def _list(self, request: Request, kind: Kind) -> Reply:
        asked = listing(request, kind)
        entries, following = self.shown.page(asked)
        most = kind.most_unlimited
        if asked.limit is None and most is not None and len(entries) > most:
            return too_many_unlimited(most)
        if asked.limit is not None and len(entries) > LARGEST_PAGE:
            return server_error()
        order = self._key_order() if entries else 0
        return json_reply(200, self._page(asked, entries, following, order))

    @staticmethod
    def _page(asked: Asked, entries: list[Entry], following: str | None, order: int) -> bytes:
        """Write a page; an empty one always in the same bytes, whatever made it empty."""
        next_cursor = following if asked.inclusive or following is None else entries[-1].key[1]
        items = b'"items":[' + b",".join([entry.bodies[order] for entry in entries]) + b"]"
        cursor = orjson.dumps(next_cursor)
        rest = b'"is_paginated":true,"pagination":{"next_cursor":' + cursor + b"}"
        return b"{" + (rest + b"," + items if order else items + b"," + rest) + b"}"

    def _of_user(self, request: Request, spelling: str) -> Reply:
        check_user_id(request, spelling)
        project = self.shown if request.method == "GET" else self.project
        entry = project.find(spelling)
        if entry is None:
            return user_not_found()
        user_id = entry.key[1]
        match request.method:
            case "GET":
                return self._user(self.shown, user_id)
            case "PATCH":
                return self._edit(user_id, fields(request))
            case "DELETE":
                return self._delete(user_id)
            case _:
                return method_not_allowed()

    def _edit(self, user_id: str, asked: dict[str, Any]) -> Reply:
        """Set fields of a user; two of them have consequences, as on the real server."""
        signs_up = asked.pop("is_anonymous", None) is False
        restricted = asked.pop("restricted_by_admin", None)
        try:
            if signs_up and self.project.is_anonymous(user_id):
                self.project.upgrade(user_id)
            if restricted is not None:
                (self.project.restrict if restricted else self.project.unrestrict)(user_id)
            self.project.edit(user_id, **asked)
        except KeyError:
            return user_not_found()
        return self._user(self.project, user_id)

    def _delete(self, user_id: str) -> Reply:
        try:
            self.project.delete(user_id)
        except KeyError:
            return user_not_found()
        return json_reply(200, b'{"success":true}')

    def _user(self, project: Project, user_id: str, status: int = 200) -> Reply:
        entry = project.find(user_id)
        if entry is None:
            return user_not_found()
        return json_reply(status, entry.bodies[self._key_order()])

    def _key_order(self) -> int:
        """Take the two orders of keys in turn: no client should get used to one of them."""
        return next(self._answers) % 2


# As long as the real server keeps an idle connection, before it closes it under the client.
KEEP_ALIVE_SECONDS = 5
# Pages stay in memory: a full temporary directory should not fail a test.
WAITRESS = {
    "threads": 8,
    "channel_timeout": KEEP_ALIVE_SECONDS,
    "cleanup_interval": 1,
    "outbuf_overflow": 2**30,
}


@contextmanager
def serve(app: WSGIApplication, port: int = 0) -> Iterator[str]:
    """Serve a WSGI app on a loopback port (0: a free one), and yield its base URL.

    Connections are kept alive, for which waitress needs a Content-Length where the real server
    sends chunks. Raises OSError if the port is taken.
    """
    listening = socket.create_server(("127.0.0.1", port))
    base_url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    with WsgiServer(app, listening, "fake-stack-api", WAITRESS):
        yield base_url
