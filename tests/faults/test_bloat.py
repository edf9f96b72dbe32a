"""What sweep after sweep leaves in the database and in the worker's own memory."""

from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

from tests.faults.watched import Watched, stopped_cleanly, watched
from tests.support.service_world import ServiceWorld, Worker, opened_service_world
from tests.support.waiting import until
from worker.service.health import KEPT_SWEEPS

USERS = 200
EDITS, DELETIONS = 3, 1
EAGER = {
    "USERS_SYNC_SCHEDULE__SWEEP_SECONDS": "0.01",
    "USERS_SYNC_SCHEDULE__POLL_SECONDS": "0.02",
    "USERS_SYNC_STACK__PAGE_SIZE": "100",
    "USERS_SYNC_DELETIONS__MAX_COUNT": "1000000",
}

# Nobody comes to tidy up.
NO_VACUUM = "alter table {} set (autovacuum_enabled = off)"
USERS_SYNC = "neon_auth.users_sync"
NAMES = ("sweep", "lease", "checkpoint", "deletion", "migration", "snapshot", "snapshot_chunk")
SWEEP, LEASE, CHECKPOINT, DELETION, MIGRATION, SNAPSHOT, SNAPSHOT_CHUNK = (
    f"users_sync_worker.{name}" for name in NAMES
)
# Of one row or few, again and again: Postgres makes room for the new ones within a page or two.
ONE_ROW = (LEASE, CHECKPOINT, DELETION)
MOST_PAGES_OF_ONE_ROW = 12
FEWEST_SWEEPS_A_PAGE = 30

SWEEPS = "select coalesce(max(number), 0) from users_sync_worker.sweep"
WRITTEN = """
select schemaname || '.' || relname, n_tup_ins, n_tup_upd, n_tup_del
from pg_stat_user_tables where n_tup_ins + n_tup_upd + n_tup_del > 0
"""
SIZE = "select pg_relation_size('{}') / 8192, pg_indexes_size('{}') / 8192"
# With what Postgres puts before each row, and the pointer to it.
ROWS_A_PAGE = "select 8192 / (avg(pg_column_size(u.*)) + 28) from neon_auth.users_sync u"


@pytest.fixture
def world(database_url: str, tmp_path: Path, users_api: str) -> Iterator[Watched]:
    with watched(database_url, tmp_path, users_api, **EAGER) as world:
        for table in (USERS_SYNC, SWEEP, *ONE_ROW):
            world.site.execute(NO_VACUUM.format(table))
        world.project.populate(USERS)
        yield world


def look(world: Watched, query: str) -> int:
    return int(world.site.rows(query)[0][0])


def size(world: Watched, table: str) -> tuple[int, int]:
    """Give how many pages a table has, and its indexes."""
    [(pages, of_indexes)] = world.site.rows(SIZE.format(table, table))
    return pages, of_indexes


def written(world: Watched) -> dict[str, tuple[int, ...]]:
    """Give how many rows were inserted, updated and deleted, where there were any."""
    return {row[0]: row[1:] for row in world.site.rows(WRITTEN)}


@pytest.mark.fault(
    "sweeps without a pause while nothing changes, and no vacuum",
    held="a sweep writes its own row and the lease's; the tables and their indexes keep their size",
    quick=20,
    thorough=1_000,
)
def test_unchanged_sweep_costs_its_own_row_and_no_more(world: Watched, tries: int) -> None:
    running = world.shell.start("run")
    until("the first sweep ended", lambda: look(world, SWEEPS) >= 1)
    before = size(world, USERS_SYNC)
    for done in range(20, tries + 1, 20):
        until("more sweeps ended", lambda: look(world, SWEEPS) >= done)  # noqa: B023  at once
        world.api.requests.clear()
    stopped_cleanly(running)

    swept, rows = look(world, SWEEPS), written(world)
    assert rows[USERS_SYNC] == (USERS, 0, 0)
    assert rows[SWEEP] == (swept, 0, 0)
    # The first sweep moves the checkpoint and drops it, and so does one that is stopped.
    assert sum(rows[CHECKPOINT]) <= 6
    # The fence once a sweep, and the renewals each second.
    assert rows[LEASE][1] <= 2 * swept + 20
    # Saved once, after the first sweep, and never again.
    assert rows[SNAPSHOT] == rows[SNAPSHOT_CHUNK] == (1, 0, 0)
    own = {SWEEP, CHECKPOINT, LEASE, SNAPSHOT, SNAPSHOT_CHUNK}
    assert rows.keys() - {MIGRATION} == {USERS_SYNC} | own
    assert size(world, USERS_SYNC) == before
    assert size(world, SWEEP)[0] <= 1 + swept // FEWEST_SWEEPS_A_PAGE
    assert max(size(world, table)[0] for table in ONE_ROW) <= MOST_PAGES_OF_ONE_ROW


@pytest.mark.fault(
    "sweeps without a pause while users come, change and go, and no vacuum",
    held="the table takes the room of the versions that were written, one for each change",
    quick=20,
    thorough=600,
)
def test_table_grows_by_what_changed_and_no_more(world: Watched, tries: int) -> None:
    dice = Random(2)
    running = world.shell.start("run")
    until("the first sweep ended", world.is_right)
    for changed in range(tries):
        world.change(dice, EDITS, DELETIONS)
        until("a sweep ended", lambda: look(world, SWEEPS) > changed)  # noqa: B023  at once
        world.api.requests.clear()
    world.catches_up()
    stopped_cleanly(running)

    changes = USERS + tries * (EDITS + DELETIONS + 1)
    inserted, updated, removed = written(world)[USERS_SYNC]
    assert (inserted + updated <= changes, removed) == (True, 0)
    # Postgres leaves room in a page where the next row does not fit.
    rows_a_page = float(world.site.rows(ROWS_A_PAGE)[0][0])
    assert size(world, USERS_SYNC)[0] <= 1.3 * changes / rows_a_page + 2
    assert max(size(world, table)[0] for table in ONE_ROW) <= MOST_PAGES_OF_ONE_ROW


@pytest.fixture
def inner(database_url: str, connection: psycopg.Connection[Any]) -> Iterator[ServiceWorld]:
    with opened_service_world(database_url, connection) as world:
        world.project.populate(USERS)
        yield world


@pytest.mark.fault(
    "polls and sweeps side by side, again and again, while users come, change and go",
    held="the worker remembers its users, and nothing of those that were",
    quick=8,
    thorough=400,
)
def test_worker_remembers_nothing_but_its_users(inner: ServiceWorld, tries: int) -> None:
    dice = Random(3)
    worker = inner.at_work(poll_seconds=0.01, sweep_seconds=0.01, max_count=1_000_000)
    for _ in range(tries):
        swept = newest(worker)
        for user_id in dice.sample(inner.project.ids(), 2):
            inner.project.edit(user_id, display_name=f"Edited {dice.random()}")
        inner.project.delete(dice.choice(inner.project.ids()))
        inner.project.create(display_name="New")
        until("a sweep ended", lambda: newest(worker) != swept)  # noqa: B023  at once
        inner.api.requests.clear()
    until("the table is right", lambda: inner.live() == set(inner.project.ids()))
    cache = worker.service.cache
    until("no suspicion is left", lambda: not cache.suspects)
    worker.stop()

    assert len(cache.mirror) == USERS
    assert (cache.remembered, cache.quarantined) == (0, {})
    assert len(worker.service.health.read().sweeps) <= KEPT_SWEEPS


def newest(worker: Worker) -> int | None:
    """Give the number of the newest sweep that ended."""
    sweeps = worker.service.health.read().sweeps
    return sweeps[0].number if sweeps else None
