"""Takes the lease, binds the target to a project, and gives the lease back."""

from threading import Event
from uuid import uuid4

import structlog

from worker.errors import (
    LeaseLost,
    Misconfigured,
    Stopped,
    UsersSyncError,
)
from worker.store import Store
from worker.store.connection import LONGEST_SECONDS
from worker.store.lease import Lease
from worker.sync.cache import Cache
from worker.sync.fetcher import Fetcher

log = structlog.stdlib.get_logger(__name__)

# How often a worker without the lease looks whether it has come free.
LOOK_SECONDS = 0.5

# Enough ids to tell another project's table from one whose users have left.
SAMPLE_IDS = 20


def take_lease(lease: Lease, project: str, stop: Event) -> None:
    """Wait for the lease for as long as its holder may be dead.

    Raises LeaseLost as soon as the holder shows that it is alive, and Misconfigured if the target
    belongs to another project.
    """
    first = None
    while not lease.acquire():
        status = lease.look()
        if status is None:
            continue
        if status.project not in {None, project}:
            raise another_project(lease, status.project)
        if first is None:
            first = status
            log.info("lease.awaited", holder=status.holder, seconds=round(status.remaining, 1))
        # What moved shows life, unless it moved into the past: the lease was given back.
        if (status.epoch, status.expires_at) != (
            first.epoch,
            first.expires_at,
        ) and status.remaining:
            raise LeaseLost(f"another worker is at work on {lease.target} ({status.holder})")
        if stop.wait(min(LOOK_SECONDS, max(status.remaining, 0.05))):
            raise Stopped("asked to stop")
    log.info("lease.acquired", target=lease.target)


def another_project(lease: Lease, project: str | None) -> Misconfigured:
    """Say that the target is bound to a project that is not the configured one."""
    return Misconfigured(
        f"{lease.target}.users_sync holds the users of another Stack Auth project ({project}); set"
        f" {lease.names.project_id} to it, or {lease.names.schema} to a schema of this project's"
        " own"
    )


def bind_project(store: Store, fetcher: Fetcher) -> None:
    """Bind a target to the project before the first write, unless it is plainly another's.

    Raises Misconfigured if the table has live users and the project knows none of a sample, and
    what asking raises.
    """
    if store.lease.bound:
        return
    ids = store.database.call(
        lambda conn: store.table.sample_ids(conn, SAMPLE_IDS), LONGEST_SECONDS
    )
    # For an empty table a made-up user is asked for: a wrong project id or key fails here, before
    # it is bound for good.
    answers = [fetcher.submit_user(user_id) for user_id in ids or [str(uuid4())]]
    found = any(fetcher.await_answer(answer).found is not None for answer in answers)
    if ids and not found:
        raise Misconfigured(
            f"{store.table.schema}.users_sync has live users, but the Stack Auth project knows"
            f" none of {len(ids)} that were asked for: it is another project's table; set"
            f" {store.lease.names.project_id} or {store.lease.names.schema}"
        )
    store.lease.bind()


def give_back(lease: Lease) -> None:
    """Give the lease back if that is possible; else it runs out by itself."""
    try:
        lease.release()
    except UsersSyncError as error:
        log.warning("lease.kept", error=str(error))


def save(cache: Cache, store: Store) -> None:
    """Save what is known of the rows if that is possible; else the next start knows less.

    Whatever keeps it from that, the next write meets it, too.
    """
    try:
        cache.save(store)
    except UsersSyncError as error:
        log.warning("snapshot.skipped", error=str(error))
