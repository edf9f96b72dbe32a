"""What may be answered instead of the truth, and what others may write into the table."""

from collections.abc import Callable

import httpx

from worker.sandbox.api import (
    Reply,
    bad_gateway_html,
    cut_off,
    html_ok,
    server_error,
    too_many_requests,
)
from worker.sandbox.replies import json_reply, unknown_path, user_not_found

EMPTY_LIST = b'{"items":[],"is_paginated":true,"pagination":{"next_cursor":null}}'

Failure = Callable[[httpx.Request], httpx.Response | httpx.TransportError]


def _replies(reply: Reply) -> Failure:
    status = int(reply.status[:3])
    return lambda _: httpx.Response(status, headers=reply.headers, content=reply.body)


def _without_code() -> Reply:
    """Give a 404 whose body alone says what would be a proof."""
    body = user_not_found().body
    return Reply("404 Not Found", [("x-stack-known-error", "OTHER")], body)


FAILURES: dict[str, Failure] = {
    "500": _replies(server_error()),
    "502 HTML": _replies(bad_gateway_html()),
    "200 HTML": _replies(html_ok()),
    "429": _replies(too_many_requests(0)),
    "cut off": _replies(cut_off()),
    "empty list": _replies(json_reply(200, EMPTY_LIST)),
    "wrong 404": _replies(unknown_path("/api/v1/users")),
    "unproven 404": _replies(_without_code()),
    "broken JSON": _replies(json_reply(200, b'{"items":[{"id":"\xff')),
    "broken off": lambda request: httpx.RemoteProtocolError("broken off", request=request),
    "time-out": lambda request: httpx.ReadTimeout("too late", request=request),
    "no connection": lambda request: httpx.ConnectError("refused", request=request),
}

BY_HAND = {
    "update": """
update neon_auth.users_sync
set raw_json = raw_json || '{"display_name": "By hand"}', updated_at = faketime.clock_timestamp()
where id = %s
returning id""",
    "insert": """
insert into neon_auth.users_sync (raw_json) values (jsonb_build_object('id', %s::text,
    'display_name', 'By hand', 'primary_email', null, 'signed_up_at_millis', 1600000000001))
on conflict do nothing
returning id""",
    "delete": """
update neon_auth.users_sync set deleted_at = faketime.clock_timestamp()
where id = %s and deleted_at is null
returning id""",
}
HELD = "select from users_sync_worker.deletion where state = 'held'"
APPROVE = """
update users_sync_worker.deletion set state = 'approved' where state = 'held' returning user_id
"""
