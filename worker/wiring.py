"""Builds the database, the store and the API client from the settings."""

import json
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from threading import Event
from uuid import uuid4

import httpx

from worker.clock import Clock
from worker.errors import (
    DatabaseUnavailable,
    SourceUnavailable,
)
from worker.retry import Retry, Watch
from worker.settings.settings import Settings
from worker.stack_auth.client import Access, StackApi
from worker.stack_auth.fingerprint import FINGERPRINT_VERSION
from worker.store import Store
from worker.store.database import Database
from worker.store.hints import Hints
from worker.store.invalidations import Invalidations
from worker.store.lease import Lease, LeaseRequest
from worker.store.migrate import prepare
from worker.store.quarantine import Quarantine
from worker.store.snapshots import Snapshots
from worker.store.suspects import Suspects
from worker.store.sweeps import Sweeps
from worker.store.table import Table
from worker.sync.fetcher import Fetcher, Renewed
from worker.sync.guard import DeletionPolicy, Guard
from worker.sync.page_size import PageSize


@contextmanager
def opened_database(
    settings: Settings, url: str, clock: Clock, stop: Event, watch: Watch | None = None
) -> Iterator[Database]:
    """Open the database lazily, and close it in the end; with a watch, never give up."""
    minutes = math.inf if watch else settings.database.retry_minutes
    retry = Retry("the database", minutes, stop, DatabaseUnavailable, watch)
    # Nothing is worth waiting for longer than the lease lasts, unless it reads the whole table.
    seconds = settings.database.lease_seconds
    database = Database(url, clock, retry, seconds, names=settings.names)
    try:
        yield database
    finally:
        database.close()


def open_store(settings: Settings, database: Database, holder: str | None = None) -> Store:
    """Create what is missing in the database, and describe the target.

    `holder` is the name under which to hold the lease; no two that are at work may have the same.
    """
    stack, target = settings.require_stack(), settings.database.schema_name
    shape = prepare(database, target)
    return Store(
        database=database,
        lease=Lease(
            database,
            LeaseRequest(
                target=target,
                project=stack.project_id,
                holder=holder or f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}",
                seconds=settings.database.lease_seconds,
                quiet=settings.database.quiet,
                sweep_seconds=settings.schedule.sweep_seconds,
                sweep_share=settings.schedule.sweep_share,
                names=settings.names,
            ),
        ),
        table=Table(
            target,
            shape,
            tuple(settings.stack.ignored_fields),
            settings.deletions.grace_seconds,
            proof_seconds=settings.database.lease_seconds,
        ),
        suspects=Suspects(target),
        quarantine=Quarantine(target),
        sweeps=Sweeps(target, asked_of(settings)),
        invalidations=Invalidations(target),
        hints=Hints(target),
        snapshots=snapshots(settings),
    )


@contextmanager
def opened_fetcher(  # noqa: PLR0913  each of the last two is for one caller
    settings: Settings,
    clock: Clock,
    stop: Event,
    lease: Renewed,
    watch: Watch | None = None,
    *,
    transport: httpx.BaseTransport | None = None,
) -> Iterator[Fetcher]:
    """Open the users API; in the end whatever is still being asked is given up.

    With a watch, it is never given up for an outage.
    """
    minutes = math.inf if watch else settings.stack.retry_minutes
    retry = Retry("Stack Auth", minutes, stop, SourceUnavailable, watch)
    with StackApi(access(settings), clock=clock, stop=stop, transport=transport) as api:
        if watch is not None:
            api.on_answer = watch.answered
        page_size = PageSize(settings.stack.page_size)
        fetcher = Fetcher(api, retry, page_size=page_size, lease=lease)
        try:
            yield fetcher
        finally:
            stop.set()
            fetcher.close()


def access(settings: Settings) -> Access:
    """Say whom to ask, as whom, and for what."""
    stack = settings.require_stack()
    return Access(
        api_url=stack.api_url,
        project_id=stack.project_id,
        secret_server_key=stack.secret_server_key.get_secret_value(),
        timeout_seconds=settings.stack.timeout_seconds,
        include_anonymous=settings.stack.include_anonymous,
        ignored_fields=tuple(settings.stack.ignored_fields),
        names=stack.names,
    )


def snapshots(settings: Settings) -> Snapshots:
    """Say where the mirror is saved, for what comparison, and with which secret."""
    stack = settings.require_stack()
    compared = [stack.project_id, sorted(settings.stack.ignored_fields), FINGERPRINT_VERSION]
    return Snapshots(
        settings.database.schema_name,
        made_for=json.dumps([*compared, sys.byteorder]),
        key=blake2b(stack.secret_server_key.get_secret_value().encode()).digest(),
    )


def asked_of(settings: Settings) -> str:
    """Say what is asked of which API: a checkpoint is worth nothing for other questions."""
    stack = settings.stack
    return f"{stack.api_url} {stack.project_id} include_anonymous={stack.include_anonymous}"


def deletion_policy(settings: Settings) -> DeletionPolicy:
    """Say what may be deleted."""
    deletions = settings.deletions
    return DeletionPolicy(
        guard=Guard(deletions.max_count, deletions.max_fraction),
        enabled=deletions.enabled,
        grace_seconds=deletions.grace_seconds,
        audit_hours=settings.schedule.audit_hours,
    )
