"""Whom the database refuses costs nobody else anything, and is stored once the cause is gone."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event

import httpx
import pytest
from structlog.testing import capture_logs

from tests.support.sweep_world import Nobody, World, delete_all, nothing, settings, sign_up
from tests.support.waiting import until
from worker.clock import Clock
from worker.errors import Misconfigured
from worker.service.ownership import bind_project
from worker.store import Store
from worker.sync.cache import Cache
from worker.sync.fetcher import Fetcher
from worker.sync.poll import Poll
from worker.sync.refusals import FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS, Refusals
from worker.sync.sweep import Report, Sweep
from worker.wiring import deletion_policy, open_store, opened_database, opened_fetcher

CHECK = "alter table {users_sync} add constraint polite check (email is not null)"
NO_CHECK = "alter table {users_sync} drop constraint polite"

TRIGGER = """
create function public.guard() returns trigger language plpgsql as
$$ begin WORK; return new; end $$;
create trigger guard before insert or update on {users_sync}
for each row execute function public.guard()
"""
NO_TRIGGER = "drop function public.guard() cascade"

OTHERS = """
select from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()
"""

# What may be wrong with the code of a trigger itself.
BROKEN = {
    "22012": "perform 1 / 0",
    "22P02": "perform 'x'::int",
    "42P01": "insert into no_such_table values (1)",
    "42601": "execute 'nonsense'",
    "3F000": "create table no_such_schema.t ()",
    "55000": "perform lastval()",
    "0A000": "raise exception using errcode = '0A000'",
    "XX000": "raise exception using errcode = 'XX000'",
    "08001": "raise exception using errcode = '08001'",
    "P0001": "raise exception 'no'",
}


@dataclass
class Warm:
    """A worker that goes on and on, on a clock that can be turned on."""

    world: World
    fetcher: Fetcher
    store: Store
    cache: Cache
    clock: Clock
    later: list[float]

    def sweep(self, kind: str = "sweep") -> Report:
        chosen = deletion_policy(settings(self.world.project))
        return Sweep(self.fetcher, self.store, self.cache, chosen, nothing, kind=kind).run()

    def poll(self) -> int:
        """Poll, and give how often that wrote."""
        before = self.writes()
        Poll(self.fetcher, self.store, self.cache, size=5, cold=False).run()
        return self.writes() - before

    def writes(self) -> int:
        return int(self.world.query("select writes from users_sync_worker.lease")[0][0])

    def times(self) -> set[int]:
        """Give how often the database was asked for those in quarantine."""
        return {
            row[0] for row in self.world.query("select times from users_sync_worker.quarantine")
        }

    def wait(self, seconds: float) -> None:
        self.later[0] += seconds


@pytest.fixture
def warm(world: World) -> Iterator[Warm]:
    """Return a worker whose table takes nobody without an email, and who has swept once."""
    later = [1000.0]
    stop, clock = Event(), Clock(lambda: later[0])
    ids = sign_up(world.project, *range(12))
    delete_all(world.project, ids[3:5])
    chosen = settings(world.project)
    with ExitStack() as opened:
        database = opened.enter_context(opened_database(chosen, world.url, clock, stop))
        store = open_store(chosen, database)
        world.query(CHECK)
        sign_up(world.project, 3, 4, 20, primary_email=None)
        transport = httpx.WSGITransport(world.api)
        fetcher = opened.enter_context(
            opened_fetcher(chosen, clock, stop, store.lease, Nobody(), transport=transport)
        )
        assert store.lease.acquire()
        bind_project(store, fetcher)
        cache = Cache()
        cache.load(store)
        yield Warm(world, fetcher, store, cache, clock, later)


def told(logs: Sequence[Mapping[str, object]]) -> int:
    return sum(each["event"] == "record.quarantined" for each in logs)


@pytest.mark.parametrize("state", BROKEN)
def test_sweep_that_stores_nobody_because_all_are_refused_is_not_complete(
    world: World, state: str
) -> None:
    world.sweep()
    world.query(TRIGGER.replace("WORK", BROKEN[state]))
    sign_up(world.project, *range(6))

    for _ in range(2):
        with pytest.raises(Misconfigured, match=f"no user could be stored.*{state}"):
            world.sweep()
        assert (world.live(), world.sweeps()[-1][1]) == (set(), "failed")
    world.query(NO_TRIGGER)
    assert world.sweep().outcome == "complete"
    assert (world.wanted(), {}) == (world.rows(), world.quarantined())


@pytest.mark.parametrize("state", BROKEN)
def test_trigger_that_fails_for_one_user_costs_nobody_else_anything(
    world: World, state: str
) -> None:
    world.sweep()
    work = f"if new.raw_json->>'display_name' = 'User 3' then {BROKEN[state]}; end if"
    world.query(TRIGGER.replace("WORK", work))
    ids = sign_up(world.project, *range(6))

    report = world.sweep()

    assert (report.outcome, world.live()) == ("complete", set(ids) - {ids[3]})
    assert {ids[3]: f"refused by the database: {state}"} == world.quarantined()
    world.query(NO_TRIGGER)
    world.sweep()
    assert (world.wanted(), {}) == (world.rows(), world.quarantined())


@pytest.mark.parametrize(
    ("cause", "cure"),
    [
        ("create index odd on {users_sync} ((1 / (length(name) - 6)))", "drop index neon_auth.odd"),
        ("alter table {users_sync} add constraint odd check (1 / (length(name) - 6) < 9)",
         "alter table {users_sync} drop constraint odd"),
        (("alter table {users_sync} add column odd int generated always as"
         " (1 / (length(raw_json->>'display_name') - 6)) stored"),
         "alter table {users_sync} drop column odd"),
    ],
)  # fmt: skip
def test_error_of_class_22_outside_the_record_is_tried_again(
    world: World, cause: str, cure: str
) -> None:
    world.sweep()
    world.query(cause)
    sign_up(world.project, *range(6))

    assert world.sweep().counts["quarantined"] == 6
    sign_up(world.project, 12)
    assert world.sweep().outcome == "complete"
    world.query(cure)
    world.sweep()
    assert (world.wanted(), {}) == (world.rows(), world.quarantined())


def test_only_user_may_be_odd(world: World) -> None:
    """Without neighbours as well: the record is to blame, and the sweep is complete."""
    world.sweep()
    world.query("create index long on {users_sync} (name)")
    name = "".join(chr(0x4E00 + number * 7919 % 20_000) for number in range(9000))
    [user_id] = sign_up(world.project, 1, display_name=name)
    for _ in range(2):
        report = world.sweep()
        assert (report.outcome, report.counts["quarantined"]) == ("complete", 1)
    assert world.quarantined() == {user_id: "refused by the database: 54000"}


@pytest.mark.parametrize("state", ["42601", "55000", "P0001", "XX000"])
def test_user_whom_a_trigger_keeps_from_being_marked_deleted_keeps_nobody_else(
    world: World, state: str
) -> None:
    ids = sign_up(world.project, *range(9))
    world.sweep()
    kept = "new.deleted_at is not null and new.raw_json->>'display_name' in ('User 2', 'User 3')"
    world.query(TRIGGER.replace("WORK", f"if {kept} then {BROKEN[state]}; end if"))
    delete_all(world.project, ids[1:6])

    report = world.sweep()

    assert (report.outcome, report.counts["deleted"], report.candidates) == ("complete", 3, 2)
    assert world.deleted() == {ids[1], ids[4], ids[5]}
    world.query(NO_TRIGGER)
    assert world.sweep().counts["deleted"] == 2


def test_sweep_whose_deletions_are_all_refused_is_incomplete(world: World) -> None:
    ids = sign_up(world.project, *range(9))
    world.sweep()
    world.query(TRIGGER.replace("WORK", "if new.deleted_at is not null then perform 1 / 0; end if"))
    delete_all(world.project, ids[1:6])

    with pytest.raises(Misconfigured, match=r"none of 5 users.*22012"):
        world.sweep()

    assert (world.deleted(), world.sweeps()[-1][1]) == (set(), "incomplete")
    assert world.suspects() == set(ids[1:6])
    world.query(NO_TRIGGER)
    assert world.sweep().counts["deleted"] == 5


def test_polls_try_a_refused_user_once_and_never_again(warm: Warm) -> None:
    warm.sweep()
    [user_id] = sign_up(warm.world.project, 30, primary_email=None)
    with capture_logs() as logs:
        writes = [warm.poll() for _ in range(4)]
    assert (writes[1:], told(logs)) == ([0, 0, 0], 1)
    warm.store.database.close()
    Poll(warm.fetcher, warm.store, warm.cache, size=5, cold=False).run()
    until("nobody is connected", lambda: not warm.world.query(OTHERS))
    warm.world.project.edit(user_id, display_name="Another")
    assert warm.poll() > 0


def test_refused_users_among_the_newest_keep_no_poll_from_the_others(warm: Warm) -> None:
    sign_up(warm.world.project, *range(30, 60), primary_email=None)
    warm.sweep()
    warm.world.api.requests.clear()
    [new] = sign_up(warm.world.project, 61)
    assert warm.poll() == 1
    assert (new in warm.world.live(), len(warm.world.cursors())) == (True, 1)


def test_sweeps_try_refused_users_together_and_ever_more_rarely(warm: Warm) -> None:
    with capture_logs() as logs:
        assert warm.sweep().counts["quarantined"] == 3
        seen = []
        for seconds in (0, 0, FIRST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS, FIRST_PAUSE_SECONDS):
            warm.wait(seconds)
            before = warm.writes()
            report = warm.sweep()
            seen.append((warm.times(), report.counts["quarantined"], warm.writes() - before))
    assert [each[:2] for each in seen] == [({2}, 3), ({2}, 3), ({3}, 3), ({3}, 3), ({4}, 3)]
    assert told(logs) == 3


def test_refused_users_are_stored_when_the_cause_is_gone(warm: Warm) -> None:
    for _ in range(3):
        warm.sweep()
        warm.wait(FIRST_PAUSE_SECONDS)
    warm.world.query(NO_CHECK)
    warm.wait(LONGEST_PAUSE_SECONDS)
    report = warm.sweep()
    assert (report.counts["inserted"], report.counts["quarantined"]) == (3, 0)
    assert (warm.world.wanted(), {}) == (warm.world.rows(), warm.world.quarantined())
    assert warm.sweep().counts["quarantined"] == 0


def test_who_is_stored_by_a_poll_is_not_tried_again_and_leaves_quarantine(warm: Warm) -> None:
    warm.sweep()
    warm.world.project.edit(max(warm.world.project.users()), primary_email="now@example.com")
    assert warm.poll() > 0
    assert len(warm.world.quarantined()) == 3
    assert warm.sweep().counts["quarantined"] == 2
    assert len(warm.world.quarantined()) == 2


def test_pause_grows_to_an_hour_and_ends_when_one_of_them_is_stored() -> None:
    refusals, now, pauses = Refusals(), 0.0, []
    refusals.note("a", "23514", now)
    assert refusals.is_due("a", now)
    for _ in range(9):
        refusals.note("a", "23514", now)
        began = now
        while not refusals.is_due("a", now):
            now += FIRST_PAUSE_SECONDS
        pauses.append(now - began)
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]
    refusals.note("a", "23514", now)
    refusals.hasten()
    assert refusals.is_due("a", now)
    refusals.forget(["a"])
    assert not refusals.is_due("a", now)
