"""Sweep after sweep by one process, as the long-running worker makes them."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random
from threading import Event
from typing import Any

import httpx
import pytest

from tests.support.sweep_world import Nobody, World, delete_all, nothing, settings, sign_up
from tests.support.waiting import until
from worker.clock import Clock
from worker.service.ownership import bind_project
from worker.store import Store
from worker.store.suspects import Suspects
from worker.sync.cache import Cache
from worker.sync.fetcher import Fetcher
from worker.sync.sweep import Report, Sweep
from worker.wiring import deletion_policy, open_store, opened_database, opened_fetcher

SEAL = "select seal from users_sync_worker.snapshot"
CONNECTIONS = """
select count(*) from pg_stat_activity
where datname = current_database() and application_name = 'users-sync'
"""


@dataclass
class Warm:
    """A worker whose mirror knows everybody, with pages of five."""

    world: World
    fetcher: Fetcher
    store: Store
    cache: Cache

    def sweep(self, *, leaves_row: bool = True, **options: Any) -> Report:
        chosen = deletion_policy(settings(self.world.project, **options))
        return Sweep(
            self.fetcher, self.store, self.cache, chosen, nothing, leaves_row=leaves_row
        ).run()


@pytest.fixture
def warm(quick_world: World) -> Iterator[Warm]:
    world, stop, clock = quick_world, Event(), Clock()
    sign_up(world.project, *range(40))
    chosen = settings(world.project)
    with ExitStack() as opened:
        database = opened.enter_context(opened_database(chosen, world.url, clock, stop))
        store = open_store(chosen, database)
        transport = httpx.WSGITransport(world.api)
        fetcher = opened.enter_context(
            opened_fetcher(chosen, clock, stop, store.lease, Nobody(), transport=transport)
        )
        assert store.lease.acquire()
        bind_project(store, fetcher)
        cache = Cache()
        cache.load(store)
        warm = Warm(world, fetcher, store, cache)
        assert warm.sweep().counts["inserted"] == 40
        yield warm


def test_sweep_in_which_nothing_changed_asks_the_database_nothing(warm: Warm) -> None:
    warm.sweep()
    before = warm.world.versions()
    warm.store.database.close()
    until("no connection is left", lambda: warm.world.query(CONNECTIONS) == [(0,)])
    for _ in range(2):
        report = warm.sweep(leaves_row=False)
        assert (report.counts["users"], report.unchanged) == (40, 40)
    assert warm.world.query(CONNECTIONS) == [(0,)]
    assert warm.world.versions() == before


def test_sweep_writes_whom_it_finds_changed_and_no_other(warm: Warm) -> None:
    changed, *_, deleted = sorted(warm.world.project.ids())[3:]
    warm.world.project.edit(changed, display_name="Changed")
    warm.world.project.delete(deleted)
    warm.world.project.touch(sorted(warm.world.project.ids())[9])  # no change
    before = warm.world.versions()
    report = warm.sweep()
    assert (report.counts["updated"], report.counts["deleted"]) == (1, 1)
    assert {row[0] for row in warm.world.versions() ^ before} == {changed, deleted}
    assert warm.world.rows() == warm.world.wanted()


def test_mirror_that_was_loaded_again_is_saved_only_after_a_sweep(warm: Warm) -> None:
    warm.cache.save(warm.store)
    [before] = warm.world.query(SEAL)
    warm.cache.load(warm.store)
    warm.store.lease.commit([], 1)
    warm.cache.save(warm.store)
    assert warm.world.query(SEAL) == [before]
    warm.world.project.edit(min(warm.world.project.ids()), display_name="Changed")
    warm.sweep()
    warm.cache.save(warm.store)
    assert warm.world.query(SEAL) != [before]


@pytest.mark.parametrize("seed", range(8))
def test_after_any_day_a_warm_sweep_makes_table_and_project_equal(warm: Warm, seed: int) -> None:
    chance, project = Random(seed), warm.world.project
    for day in range(4):
        ids = sorted(project.ids())
        for user_id in chance.sample(ids, 6):
            match chance.randrange(5):
                case 0:
                    project.delete(user_id)
                case 1:
                    project.edit(user_id, display_name=f"Name {day}", client_metadata={"d": day})
                case 2:
                    project.edit(
                        user_id, signed_up_at_millis=1_600_000_000_000 + chance.randrange(40)
                    )
                case 3:
                    project.touch(user_id)
                case _:
                    project.edit(user_id, server_metadata={f"new {day}": "a\0b"})
        sign_up(project, 100 + 2 * day, 101 + 2 * day)
        warm.sweep()
        warm.sweep()
        assert {i: row[1:] for i, row in warm.world.rows().items()} == {
            i: row[1:] for i, row in warm.world.wanted().items()
        }
        assert warm.world.live() == set(project.ids())


def test_approval_reaches_a_worker_that_is_at_work(warm: Warm) -> None:
    gone = warm.world.project.ids()[:12]
    delete_all(warm.world.project, gone)
    held = warm.sweep(max_count=10)
    assert (held.outcome, held.counts["held"], warm.world.deleted()) == ("held", 12, set())
    assert warm.sweep(max_count=10).outcome == "held"

    assert warm.store.database.call(lambda conn: Suspects("neon_auth").approve(conn, held.sweep))
    report = warm.sweep(max_count=10)

    assert (report.outcome, report.counts["approved"]) == ("complete", 12)
    assert warm.world.deleted() == set(gone)
