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

from worker.sandbox.project import Entry, Project
from worker.sandbox.replies import (
    Refused,
    Reply,
    bad_gateway_html,
    cut_off,
    html_ok,
    json_reply,
    method_not_allowed,
    server_error,
    too_many_requests,
    unknown_path,
    user_not_found,
)
from worker.sandbox.requests import Request, check_access, check_user_id, fields, listing, read
from worker.wsgi import WsgiServer

__all__ = [
    "FakeStackApi",
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

USERS = re.compile("/api/v1/users(?:/([^/]+))?")
# The real server overflows the bind parameters of a statement somewhat above this.
LARGEST_PAGE = 32_000


class FakeStackApi:
    """The users API of one project. Safe to be called from many threads.

    `requests` holds everything that was asked for, in order. `knows_include_anonymous=False` makes
    it an older server, which refuses that parameter.
    """

    def __init__(self, project: Project, *, knows_include_anonymous: bool = True) -> None:
        self.project = project
        self.requests: list[Request] = []
        self._knows_include_anonymous = knows_include_anonymous
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

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        request = read(environ)
        self.requests.append(request)
        reply = self._fault(request) or self._answer(request)
        start_response(reply.status, reply.headers)
        return [reply.body]

    def _fault(self, request: Request) -> Reply | None:
        reply = self._hook(request) if self._hook else None
        if reply is None and self._failures:
            return self._failures.popleft()
        return reply

    def _answer(self, request: Request) -> Reply:
        path = USERS.fullmatch(request.path)
        if path is None:
            return unknown_path(request.url)
        try:
            check_access(request, self.project)
            return self._of_user(request, path[1]) if path[1] else self._of_list(request)
        except Refused as refused:
            return refused.reply

    def _of_list(self, request: Request) -> Reply:
        match request.method:
            case "GET":
                return self._list(request)
            case "POST":
                user_id = self.project.create(**fields(request))
                return self._user(user_id, status=201)
            case _:
                return method_not_allowed()

    def _list(self, request: Request) -> Reply:
        asked = listing(request, knows_include_anonymous=self._knows_include_anonymous)
        entries, next_cursor = self.project.page(asked)
        if asked.limit is not None and len(entries) > LARGEST_PAGE:
            return server_error()
        order = self._key_order() if entries else 0
        return json_reply(200, self._page(entries, next_cursor, order))

    @staticmethod
    def _page(entries: list[Entry], next_cursor: str | None, order: int) -> bytes:
        """Write a page; an empty one always in the same bytes, whatever made it empty."""
        items = b'"items":[' + b",".join([entry.bodies[order] for entry in entries]) + b"]"
        cursor = orjson.dumps(next_cursor)
        rest = b'"is_paginated":true,"pagination":{"next_cursor":' + cursor + b"}"
        return b"{" + (rest + b"," + items if order else items + b"," + rest) + b"}"

    def _of_user(self, request: Request, spelling: str) -> Reply:
        check_user_id(request, spelling)
        entry = self.project.find(spelling)
        if entry is None:
            return user_not_found()
        user_id = entry.key[1]
        match request.method:
            case "GET":
                return self._user(user_id)
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
        return self._user(user_id)

    def _delete(self, user_id: str) -> Reply:
        try:
            self.project.delete(user_id)
        except KeyError:
            return user_not_found()
        return json_reply(200, b'{"success":true}')

    def _user(self, user_id: str, status: int = 200) -> Reply:
        entry = self.project.find(user_id)
        if entry is None:
            return user_not_found()
        return json_reply(status, entry.bodies[self._key_order()])

    def _key_order(self) -> int:
        """Take the two orders of keys in turn: nobody should get used to one of them."""
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
