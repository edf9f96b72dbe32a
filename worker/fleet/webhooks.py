"""Receives the webhooks of all projects, each at an address that ends with its name."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http import HTTPStatus
from threading import Event, Lock
from wsgiref.types import WSGIApplication, WSGIEnvironment

import structlog
from standardwebhooks.webhooks import Webhook

from worker.clock import Clock
from worker.errors import DatabaseUnavailable, UsersSyncError
from worker.fleet.control import Control
from worker.fleet.projects import NAME, Project, Secrets, resolved, webhook_secrets
from worker.retry import Retry
from worker.service.webhooks import (
    DATABASE_SECONDS,
    PATH,
    HintWriter,
    answering_alone,
    receive,
)
from worker.store.database import Database
from worker.store.hints import Hints

log = structlog.stdlib.get_logger(__name__)

# A project that was changed is looked at again after this time.
REMEMBERED_SECONDS = 10.0
# Made-up names must not fill the memory.
MOST_REMEMBERED = 10_000


@dataclass(frozen=True, slots=True)
class _Receiver:
    """How the webhooks of one project are verified, and where its hints go."""

    verifiers: list[Webhook]
    writer: HintWriter | None
    until: float


@dataclass(slots=True)
class Webhooks:
    """Verifies webhooks, leaves hints in the projects' databases, has the projects visited soon."""

    control: Control
    secrets: Secrets
    stop: Event
    _receivers: dict[str, _Receiver] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    def app(self, count: Callable[[str], None]) -> WSGIApplication:
        """Return the WSGI app; `count` is given the status of each answer."""
        return answering_alone(self._answer, count)

    def _answer(self, environ: WSGIEnvironment) -> HTTPStatus:
        path, _, name = environ["PATH_INFO"].rpartition("/")
        if path != PATH or not NAME.fullmatch(name):
            return HTTPStatus.NOT_FOUND
        try:
            receiver = self._receiver(name)
        except UsersSyncError as error:
            log.warning("webhook.failed", project=name, error=str(error))
            return HTTPStatus.SERVICE_UNAVAILABLE
        writer = receiver.writer
        if writer is None:
            return HTTPStatus.NOT_FOUND

        def leave(user_id: str) -> None:
            writer.leave(user_id)
            self.control.hint(name)

        return receive(environ, receiver.verifiers, leave)

    def _receiver(self, name: str) -> _Receiver:
        with self._lock:
            found = self._receivers.get(name)
            if found is not None and found.until > time.monotonic():
                return found
            if len(self._receivers) >= MOST_REMEMBERED:
                self._receivers.clear()
        project = self.control.project(name)
        made = self._made(project)
        with self._lock:
            self._receivers[name] = made
        return made

    def _made(self, project: Project | None) -> _Receiver:
        until = time.monotonic() + REMEMBERED_SECONDS
        signed_by = [] if project is None else webhook_secrets(project, self.secrets)
        if project is None or not signed_by:
            return _Receiver([], None, until)
        settings = resolved(project, self.secrets)
        retry = Retry("the database", 0, self.stop, DatabaseUnavailable)
        url = settings.require_database().get_secret_value()
        database = Database(url, Clock(), retry, DATABASE_SECONDS, names=settings.names)
        writer = HintWriter(database, Hints(settings.database.schema_name), quiet=True)
        return _Receiver([Webhook(secret) for secret in signed_by], writer, until)
