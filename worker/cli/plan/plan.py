"""Says what a sweep would do: a real one, over a store that asks instead of writing."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

import httpx

from worker.cli.context import impatient, opened_at_once
from worker.cli.plan.change import Change
from worker.cli.plan.recorder import PlanRecorder
from worker.clock import Clock
from worker.service.ownership import another_project, bind_project
from worker.settings.settings import Settings
from worker.store import Store
from worker.store.connection import Connection
from worker.store.database import Database
from worker.store.dry_run import (
    DryRunLease,
    DryRunQuarantine,
    DryRunSuspects,
    DryRunSweeps,
    DryRunTable,
    own_tables_exist,
)
from worker.store.hints import Hints
from worker.store.invalidations import Invalidations
from worker.store.lease import LeaseRequest
from worker.store.migrate import missing_migrations
from worker.store.table_shape import Shape, detect_shape
from worker.sync.cache import Cache
from worker.sync.sweep import Sweep
from worker.wiring import asked_of, deletion_policy, opened_fetcher, snapshots


@dataclass(frozen=True, slots=True)
class Plan:
    """What a sweep would come to: its outcome, and its counts as it would log them.

    `difference` says whether table and project differ in anything but hidden users.
    """

    outcome: str
    counts: dict[str, int]
    difference: bool


def plan(
    settings: Settings,
    url: str,
    stop: Event,
    tell: Callable[[Change], None],
    transport: httpx.BaseTransport | None = None,
) -> Plan:
    """Read everything, write nothing, and tell what a sweep would do, page by page.

    It begins at the start of the list, and needs no right but to read; what is missing in the
    database is taken as empty. Raises whatever a sweep raises, but for the lease's sake.
    """
    settings = impatient(settings)
    clock = Clock()
    recorder = PlanRecorder(tell, tuple(settings.stack.ignored_fields))
    with opened_at_once(settings, url, clock, stop) as database:
        store = _open_store(settings, database, recorder)
        with opened_fetcher(settings, clock, stop, store.lease, transport=transport) as fetcher:
            bind_project(store, fetcher)
            cache = Cache()
            cache.load(store)
            held = {i for i, suspect in cache.suspects.items() if suspect.state == "held"}
            policy = deletion_policy(settings)
            report = Sweep(fetcher, store, cache, policy, recorder.turn_page, kind="plan").run()
    recorder.close(deletions_enabled=policy.enabled, held_before=held)
    return Plan(report.outcome, report.figures, recorder.different)


def _open_store(settings: Settings, database: Database, recorder: PlanRecorder) -> Store:
    """Describe the target as it is. Raises Misconfigured for one of another shape or project."""
    stack, target = settings.require_stack(), settings.database.schema_name
    shape, exists = database.call(lambda conn: _look(conn, target))
    request = LeaseRequest(
        target,
        stack.project_id,
        holder="",
        seconds=settings.database.lease_seconds,
        names=settings.names,
    )
    lease = DryRunLease(database, request)
    project = lease.look_up()
    if project not in {None, stack.project_id}:
        raise another_project(lease, project)
    quarantine = DryRunQuarantine(target, exists, recorder)
    recorder.errors = database.call(quarantine.errors)
    return Store(
        database=database,
        lease=lease,
        table=DryRunTable(
            schema=target,
            shape=shape or Shape.GENERATED,
            ignored_fields=tuple(settings.stack.ignored_fields),
            grace_seconds=settings.deletions.grace_seconds,
            exists=shape is not None,
            preview=recorder,
        ),
        suspects=DryRunSuspects(target, exists, recorder),
        quarantine=quarantine,
        sweeps=DryRunSweeps(target, asked_of(settings), exists),
        invalidations=Invalidations(target),
        hints=Hints(target),
        snapshots=snapshots(settings),
    )


def _look(conn: Connection, target: str) -> tuple[Shape | None, bool]:
    missing_migrations(conn)  # of a newer version no sweep would do what this one plans
    return detect_shape(conn, target), own_tables_exist(conn)
