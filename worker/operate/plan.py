"""Says what a sweep would do: a real one, over a store that asks instead of writing."""

from collections.abc import Callable
from dataclasses import dataclass
from threading import Event

import httpx

from worker.clock import Clock
from worker.memory import Memory
from worker.once import another_project, asked_of, bind_project, opened_source
from worker.once import rules as rules_of
from worker.operate.change import Change
from worker.operate.journal import Journal
from worker.operate.patience import impatient, opened_at_once
from worker.settings import Settings
from worker.store import Store
from worker.store.database import Connection, Database
from worker.store.lease import Claim
from worker.store.schema import missing_migrations
from worker.store.shape import Shape, detect_shape
from worker.store.touched import Touched
from worker.store.unwritten import (
    UnwrittenDeletions,
    UnwrittenLease,
    UnwrittenProgress,
    UnwrittenQuarantine,
    UnwrittenTable,
    own_tables_exist,
)
from worker.sweep import Sweep


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
    journal = Journal(tell, tuple(settings.stack.ignored_fields))
    with opened_at_once(settings, url, clock, stop) as database:
        store = _open_store(settings, database, journal)
        with opened_source(settings, clock, stop, store.lease, transport=transport) as source:
            bind_project(store, source)
            memory = Memory()
            memory.load(store)
            held = {i for i, suspect in memory.suspects.items() if suspect.state == "held"}
            rules = rules_of(settings)
            report = Sweep(source, store, memory, rules, journal.turn_page, kind="plan").run()
    journal.close(deletions_enabled=rules.enabled, held_before=held)
    return Plan(report.outcome, report.figures, journal.different)


def _open_store(settings: Settings, database: Database, journal: Journal) -> Store:
    """Describe the target as it is. Raises Misconfigured for one of another shape or project."""
    stack, target = settings.require_stack(), settings.database.schema_name
    shape, exists = database.call(lambda conn: _look(conn, target))
    claim = Claim(
        target,
        stack.project_id,
        holder="",
        seconds=settings.database.lease_seconds,
        project_setting=stack.names.project_id,
    )
    lease = UnwrittenLease(database, claim)
    project = lease.look_up()
    if project not in {None, stack.project_id}:
        raise another_project(lease, project)
    quarantine = UnwrittenQuarantine(target, exists, journal)
    journal.errors = database.call(quarantine.errors)
    return Store(
        database=database,
        lease=lease,
        table=UnwrittenTable(
            schema=target,
            shape=shape or Shape.GENERATED,
            ignored_fields=tuple(settings.stack.ignored_fields),
            grace_seconds=settings.deletions.grace_seconds,
            exists=shape is not None,
            told=journal,
        ),
        deletions=UnwrittenDeletions(target, exists, journal),
        quarantine=quarantine,
        progress=UnwrittenProgress(target, asked_of(settings), exists),
        touched=Touched(target),
    )


def _look(conn: Connection, target: str) -> tuple[Shape | None, bool]:
    missing_migrations(conn)  # of a newer version no sweep would do what this one plans
    return detect_shape(conn, target), own_tables_exist(conn)
