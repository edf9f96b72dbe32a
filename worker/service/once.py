"""One sweep with everything it needs: connections, the lease, the check of whose table it is."""

import math
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event
from uuid import uuid4

import httpx
import structlog

from worker.clock import Clock
from worker.errors import (
    DatabaseUnavailable,
    LeaseLost,
    Misconfigured,
    SourceUnavailable,
    Stopped,
    UsersSyncError,
)
from worker.retry import Retry, Watch
from worker.settings.settings import Settings
from worker.stack_auth.client import Access, StackApi
from worker.store import Store
from worker.store.connection import LONGEST_SECONDS
from worker.store.database import Database
from worker.store.invalidations import Touched
from worker.store.lease import Claim, Lease
from worker.store.migrate import prepare
from worker.store.quarantine import Quarantine
from worker.store.suspects import Deletions
from worker.store.sweeps import Progress
from worker.store.table import Table
from worker.sync.cache import Memory
from worker.sync.deletions import Rules
from worker.sync.fetcher import Renewed, Source
from worker.sync.guard import Guard
from worker.sync.page_size import PageSize
from worker.sync.state import Findings
from worker.sync.sweep import Report, Sweep

log = structlog.stdlib.get_logger(__name__)

# How often a worker without the lease looks whether it has come free.
LOOK_SECONDS = 0.5

# Enough ids to tell another project's table from one whose users have left.
SAMPLE_IDS = 20


def sweep_once(
    settings: Settings,
    url: str,
    stop: Event,
    on_page: Callable[[Findings], None],
    transport: httpx.BaseTransport | None = None,
) -> Report:
    """Sweep the configured target once, with the database at `url`; `transport` is for tests.

    Raises whatever a sweep raises, LeaseLost if another worker is at work, and Misconfigured for
    a table that is not ours to write.
    """
    clock = Clock()
    with opened_database(settings, url, clock, stop) as database:
        store = open_store(settings, database)
        with opened_source(settings, clock, stop, store.lease, transport=transport) as source:
            take_lease(store.lease, settings.require_stack().project_id, stop)
            try:
                bind_project(store, source)
                memory = Memory()
                memory.load(store)
                resume_minutes = settings.schedule.resume_minutes
                return Sweep(source, store, memory, rules(settings), on_page, resume_minutes).run()
            finally:
                # Whatever took all the retries there are is not tried for as long again.
                stop.set()
                give_back(store.lease)


@contextmanager
def opened_database(
    settings: Settings, url: str, clock: Clock, stop: Event, watch: Watch | None = None
) -> Iterator[Database]:
    """Open the database lazily, and close it in the end; with a watch, never give up."""
    minutes = math.inf if watch else settings.database.retry_minutes
    retry = Retry("the database", minutes, stop, DatabaseUnavailable, watch)
    # Nothing is worth waiting for longer than the lease lasts, unless it reads the whole table.
    database = Database(url, clock, retry, settings.database.lease_seconds)
    try:
        yield database
    finally:
        database.close()


def open_store(settings: Settings, database: Database) -> Store:
    """Create what is missing in the database, and describe the target."""
    stack, target = settings.require_stack(), settings.database.schema_name
    shape = prepare(database, target)
    return Store(
        database=database,
        lease=Lease(
            database,
            Claim(
                target=target,
                project=stack.project_id,
                holder=f"{socket.gethostname()}:{os.getpid()}:{uuid4().hex[:8]}",
                seconds=settings.database.lease_seconds,
                quiet=settings.database.quiet,
                sweep_seconds=settings.schedule.sweep_seconds,
                sweep_share=settings.schedule.sweep_share,
                project_setting=stack.names.project_id,
            ),
        ),
        table=Table(
            target,
            shape,
            tuple(settings.stack.ignored_fields),
            settings.deletions.grace_seconds,
            proof_seconds=settings.database.lease_seconds,
        ),
        deletions=Deletions(target),
        quarantine=Quarantine(target),
        progress=Progress(target, asked_of(settings)),
        touched=Touched(target),
    )


@contextmanager
def opened_source(  # noqa: PLR0913  each of the last two is for one caller
    settings: Settings,
    clock: Clock,
    stop: Event,
    lease: Renewed,
    watch: Watch | None = None,
    *,
    transport: httpx.BaseTransport | None = None,
) -> Iterator[Source]:
    """Open the users API; in the end whatever is still being asked is given up.

    With a watch, it is never given up for an outage.
    """
    minutes = math.inf if watch else settings.stack.retry_minutes
    retry = Retry("Stack Auth", minutes, stop, SourceUnavailable, watch)
    with StackApi(access(settings), clock=clock, stop=stop, transport=transport) as api:
        if watch is not None:
            api.on_answer = watch.answered
        page_size = PageSize(settings.stack.page_size)
        source = Source(api, retry, page_size=page_size, lease=lease)
        try:
            yield source
        finally:
            stop.set()
            source.close()


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


def asked_of(settings: Settings) -> str:
    """Say what is asked of which API: a checkpoint is worth nothing for other questions."""
    stack = settings.stack
    return f"{stack.api_url} {stack.project_id} include_anonymous={stack.include_anonymous}"


def rules(settings: Settings) -> Rules:
    """Say what may be deleted."""
    deletions = settings.deletions
    return Rules(
        guard=Guard(deletions.max_count, deletions.max_fraction),
        enabled=deletions.enabled,
        grace_seconds=deletions.grace_seconds,
        audit_hours=settings.schedule.audit_hours,
    )


def take_lease(lease: Lease, project: str, stop: Event) -> None:
    """Wait for the lease for as long as its holder may be dead.

    Raises LeaseLost as soon as the holder shows that it is alive, and Misconfigured if the target
    belongs to another project.
    """
    first = None
    while not lease.acquire():
        sight = lease.look()
        if sight is None:
            continue
        if sight.project not in {None, project}:
            raise another_project(lease, sight.project)
        if first is None:
            first = sight
            log.info("lease.awaited", holder=sight.holder, seconds=round(sight.remaining, 1))
        if (sight.epoch, sight.expires_at) != (first.epoch, first.expires_at) and sight.remaining:
            raise LeaseLost(f"another worker is at work on {lease.target} ({sight.holder})")
        if stop.wait(min(LOOK_SECONDS, max(sight.remaining, 0.05))):
            raise Stopped("asked to stop")
    log.info("lease.acquired", target=lease.target)


def another_project(lease: Lease, project: str | None) -> Misconfigured:
    """Say that the target is bound to a project that is not the configured one."""
    return Misconfigured(
        f"{lease.target}.users_sync holds the users of another Stack Auth project ({project}); set"
        f" {lease.project_setting} to it, or database.schema to a schema of this project's own"
    )


def bind_project(store: Store, source: Source) -> None:
    """Bind a target to the project before the first write, unless it is plainly another's.

    Raises Misconfigured if the table has live users and the project knows none of a sample. An
    empty table is no reason not to ask: a mistyped project would be bound for good.
    """
    if store.lease.bound:
        return
    ids = store.database.call(
        lambda conn: store.table.sample_ids(conn, SAMPLE_IDS), LONGEST_SECONDS
    )
    answers = [source.ask_user(user_id) for user_id in ids or [str(uuid4())]]
    found = any(source.await_answer(answer).found is not None for answer in answers)
    if ids and not found:
        raise Misconfigured(
            f"{store.table.schema}.users_sync has live users, but the Stack Auth project knows"
            f" none of {len(ids)} that were asked for: it is another project's table; set"
            f" {store.lease.project_setting} or database.schema"
        )
    store.lease.bind()


def give_back(lease: Lease) -> None:
    """Give the lease back if that is possible; else it runs out by itself."""
    try:
        lease.release()
    except UsersSyncError as error:
        log.warning("lease.kept", error=str(error))
