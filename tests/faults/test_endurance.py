"""Sweep after sweep, poll after poll: nothing grows that should not, nothing is written in vain."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import pytest

from tests.faults.watched import Watched, stopped_cleanly, watched
from tests.support.processes import PATIENCE_SECONDS, Running
from tests.support.waiting import until
from worker.sync.fetcher import THREADS

pytestmark = pytest.mark.beside_api

USERS = 300
EDITS, DELETIONS = 3, 1
# What a Python process takes and gives back by chance.
SLACK_MB = 12

SWEEPS = "select coalesce(max(number), 0) from users_sync_worker.sweep"
CONNECTIONS = """
select count(*) from pg_stat_activity
where datname = current_database() and application_name = 'users-sync'
"""
WRITTEN = """
select n_tup_ins, n_tup_upd, n_tup_del, pg_relation_size(relid)
from pg_stat_user_tables where schemaname = 'neon_auth' and relname = 'users_sync'
"""
OWN_ROWS = """
select (select count(*) from users_sync_worker.checkpoint),
       (select count(*) from users_sync_worker.lease),
       (select count(*) from users_sync_worker.touched),
       (select count(*) from users_sync_worker.deletion),
       (select count(*) from users_sync_worker.quarantine)
"""


@dataclass(frozen=True)
class Held:
    """What a process holds on to: resident memory in MB, and how many of each."""

    memory: float
    descriptors: int
    threads: int
    connections: int


@pytest.fixture
def world(database_url: str, tmp_path: Path, users_api: str) -> Iterator[Watched]:
    options = {"USERS_SYNC_DELETIONS__MAX_COUNT": "1000000", "USERS_SYNC_STACK__PAGE_SIZE": "100"}
    eager = {
        "USERS_SYNC_SCHEDULE__SWEEP_SECONDS": "0.01",
        "USERS_SYNC_SCHEDULE__POLL_SECONDS": "0.02",
    }
    with watched(database_url, tmp_path, users_api, **options, **eager) as world:
        world.project.populate(USERS)
        yield world


def held(world: Watched, running: Running) -> Held:
    process = Path(f"/proc/{running.process.pid}")
    status = dict(
        line.split(":", 1) for line in (process / "status").read_text("utf-8").splitlines()
    )
    return Held(
        memory=int(status["VmRSS"].split()[0]) / 1024,
        descriptors=len(list((process / "fd").iterdir())),
        threads=int(status["Threads"]),
        connections=world.site.rows(CONNECTIONS)[0][0],
    )


def sweeps(world: Watched) -> int:
    return int(world.site.rows(SWEEPS)[0][0])


def sweep_until(world: Watched, count: int, meanwhile: Callable[[], object]) -> None:
    """Wait for that many sweeps; fails if one of them takes far too long."""
    done, seen_at = sweeps(world), time.monotonic()
    while done < count:
        meanwhile()
        now_done = sweeps(world)
        if now_done > done:
            done, seen_at = now_done, time.monotonic()
        if time.monotonic() > seen_at + PATIENCE_SECONDS:
            pytest.fail(f"no sweep ended after the {done}th")
        world.api.requests.clear()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="there is no /proc here")
@pytest.mark.fault(
    "sweeps and polls without a pause while users come, change and go",
    held="memory, descriptors, threads and connections stay; each change is written once",
    quick=30,
    thorough=2_000,
)
def test_nothing_grows_while_users_come_and_go(world: Watched, tries: int) -> None:
    dice, rounds = Random(1), 0

    def change() -> None:
        nonlocal rounds
        rounds += 1
        world.change(dice, EDITS, DELETIONS)

    running = world.shell.start("run")
    until("the first sweep ended", world.is_right)
    sweep_until(world, tries // 3, change)
    before = held(world, running)
    sweep_until(world, tries, change)
    after = held(world, running)
    world.catches_up()
    stopped_cleanly(running)

    assert after.memory <= before.memory + SLACK_MB
    assert after.descriptors <= before.descriptors + 2
    # Threads that ask for proofs begin when there are so many to ask for.
    assert after.threads <= before.threads + THREADS
    assert after.connections <= before.connections
    # A sweep that was stopped leaves where it was.
    [(checkpoints, *others)] = world.site.rows(OWN_ROWS)
    assert (checkpoints <= 1, others) == (True, [1, 0, 0, 0])
    [(inserted, updated, removed, _)] = world.site.rows(WRITTEN)
    # Some are gone before anybody saw them.
    assert inserted <= USERS + rounds
    assert updated <= rounds * (EDITS + DELETIONS)
    assert removed == 0


@pytest.mark.fault(
    "sweeps and polls without a pause while nothing changes",
    held="no row is written, and the table keeps its size to the byte",
    quick=30,
    thorough=2_000,
)
def test_nothing_is_written_while_nothing_changes(world: Watched, tries: int) -> None:
    running = world.shell.start("run")
    until("the first sweep ended", world.is_right)
    versions = world.site.rows("select id, xmin::text, ctid::text from neon_auth.users_sync")
    sweep_until(world, tries, lambda: None)
    stopped_cleanly(running)

    now = world.site.rows("select id, xmin::text, ctid::text from neon_auth.users_sync")
    assert sorted(now) == sorted(versions)
    [(inserted, updated, removed, _)] = world.site.rows(WRITTEN)
    assert (inserted, updated, removed) == (USERS, 0, 0)
