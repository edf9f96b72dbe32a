"""Receives the project's webhooks, and leaves a hint for each user that one names."""

from binascii import Error as NotBase64
from collections.abc import Callable, Sequence
from http import HTTPStatus
from threading import Lock
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import orjson
from standardwebhooks.webhooks import Webhook, WebhookVerificationError

from worker.errors import UsersSyncError
from worker.http_server import waitress_options
from worker.ids import is_user_id
from worker.store.database import Database
from worker.store.hints import Hints

PATH = "/webhooks/stack-auth"
MOST_BODY_BYTES = 256 * 1024

# A sender gives up after 15 s, and tries again when it is told 503.
DATABASE_SECONDS = 5.0

# Each request waits for the database for some milliseconds.
WAITRESS = waitress_options(threads=8, most_body_bytes=MOST_BODY_BYTES)

# The standard's names, and those that Svix sends.
_HEADERS = {
    "webhook-id": ("HTTP_WEBHOOK_ID", "HTTP_SVIX_ID"),
    "webhook-timestamp": ("HTTP_WEBHOOK_TIMESTAMP", "HTTP_SVIX_TIMESTAMP"),
    "webhook-signature": ("HTTP_WEBHOOK_SIGNATURE", "HTTP_SVIX_SIGNATURE"),
}


class _Batch:
    """User ids that are written together; `error` is why they were not."""

    def __init__(self) -> None:
        self.ids: set[str] = set()
        self.done = False
        self.error: Exception | None = None


class HintWriter:
    """Leaves hints for many threads; those that come while one is written go together.

    It has a connection of its own to the same database, so that no webhook waits for a sweep's
    transaction.
    """

    def __init__(self, database: Database, hints: Hints, *, quiet: bool = False) -> None:
        self._database = database
        self._hints = hints
        self._quiet = quiet
        self._batch = _Batch()
        self._joining = Lock()
        self._writing = Lock()

    def leave(self, user_id: str) -> None:
        """Store a hint. Raises DatabaseUnavailable, Misconfigured or Stopped."""
        with self._joining:
            batch = self._batch
            batch.ids.add(user_id)
        # The first of a batch to come through writes for all; the others find it done.
        with self._writing:
            if not batch.done:
                with self._joining:
                    self._batch = _Batch()
                self._write(batch)
        if batch.error is not None:
            raise batch.error

    def _write(self, batch: _Batch) -> None:
        batch.done = True
        try:
            self._database.call(lambda conn: self._hints.leave(conn, batch.ids), DATABASE_SECONDS)
        except Exception as error:  # noqa: BLE001  each of those who wait raises it
            batch.error = error
        finally:
            if self._quiet:
                self._database.close()


def make_app(
    secrets: Sequence[str],
    leave: Callable[[str], None],
    count: Callable[[str], None] = lambda _status: None,
) -> WSGIApplication:
    """Return the WSGI app; `leave` stores a hint, `count` is given the status of each answer."""
    verifiers = [Webhook(secret) for secret in secrets]

    def receives(environ: WSGIEnvironment) -> HTTPStatus:
        if environ["PATH_INFO"] != PATH:
            return HTTPStatus.NOT_FOUND
        return receive(environ, verifiers, leave)

    return answering_alone(receives, count)


def answering_alone(
    receives: Callable[[WSGIEnvironment], HTTPStatus], count: Callable[[str], None]
) -> WSGIApplication:
    """Return a WSGI app that answers with a status alone, which is counted."""

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> list[bytes]:
        status = receives(environ)
        count(str(status.value))
        # Not a word about why: it would help only who forges.
        allow = [("Allow", "POST")] if status is HTTPStatus.METHOD_NOT_ALLOWED else []
        start_response(f"{status.value} {status.phrase}", [("Content-Length", "0"), *allow])
        return []

    return app


def receive(
    environ: WSGIEnvironment, verifiers: Sequence[Webhook], leave: Callable[[str], None]
) -> HTTPStatus:
    """Verify a webhook, and leave the hint that it is; returns what to answer."""
    if environ["REQUEST_METHOD"] != "POST":
        return HTTPStatus.METHOD_NOT_ALLOWED
    body = environ["wsgi.input"].read()
    headers = {
        name: next((environ[each] for each in names if each in environ), "")
        for name, names in _HEADERS.items()
    }
    if not any(_is_signed(verifier, body, headers) for verifier in verifiers):
        return HTTPStatus.BAD_REQUEST
    try:
        event = orjson.loads(body)
    except orjson.JSONDecodeError:
        return HTTPStatus.BAD_REQUEST
    user_id = _named_user(event)
    try:
        if user_id is not None:
            leave(user_id)
    except UsersSyncError:
        return HTTPStatus.SERVICE_UNAVAILABLE
    return HTTPStatus.NO_CONTENT


def _is_signed(verifier: Webhook, body: bytes, headers: dict[str, str]) -> bool:
    """Whether one of the signatures is right, and the time-stamp is of these five minutes."""
    try:
        verifier.verify(body, headers, json_parse=False)
    except (WebhookVerificationError, NotBase64, ValueError):
        return False  # a malformed signature raises the others
    return True


def _named_user(event: Any) -> str | None:
    """Give the user that an event is about; None for teams and all else."""
    match event:
        case {"type": str(kind), "data": {"id": str(user_id)}} if kind.startswith("user."):
            return user_id.lower() if is_user_id(user_id.lower()) else None
        case _:
            return None
