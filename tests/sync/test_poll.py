"""A look at the newest users: cheap, at once, and never a reason to delete."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from threading import Event

import psycopg
import pytest

from tests.support.service_world import LIVE, ServiceWorld, opened_service_world
from tests.support.sweep_world import Nobody, sign_up
from tests.support.users_apis import every_server
from tests.support.waiting import until
from worker.clock import Clock
from worker.errors import Misconfigured, Stopped
from worker.sandbox.api import Reply, Request
from worker.service.health import Vitals
from worker.service.leader import Leader
from worker.service.metrics import Metrics
from worker.service.ownership import bind_project
from worker.service.telemetry import Figures
from worker.settings.settings import Settings
from worker.store import Store
from worker.store.sweeps import Checkpoint
from worker.sync.cache import Memory
from worker.sync.fetcher import Source
from worker.sync.page_size import PageSize
from worker.sync.poll import Poll
from worker.sync.state import Findings, begin
from worker.sync.sweep import Report, Sweep
from worker.wiring import open_store, opened_database, opened_source, rules

SIZE = 5
PAGE_SIZE = 10
MISSING = "select count(*) from users_sync_worker.deletion"


@dataclass(frozen=True)
class Desk:
    """What a poll and a sweep need, with the lease in hand."""

    world: ServiceWorld
    settings: Settings
    source: Source
    store: Store
    memory: Memory

    def poll(self, *, cold: bool = False) -> Findings:
        return Poll(self.source, self.store, self.memory, SIZE, cold).run()

    def sweep(self) -> Report:
        return Sweep(
            self.source, self.store, self.memory, rules(self.settings), lambda _: None
        ).run()

    def limits(self) -> list[int]:
        """Give how many users were asked for, page by page, and forget that they were."""
        asked = [int(request.query["limit"]) for request in self.world.lists()]
        self.world.api.requests.clear()
        return asked

    def live(self) -> set[str]:
        return {row[0] for row in self.world.query(LIVE)}


@pytest.fixture
def desk(database_url: str, connection: psycopg.Connection, users_api: str) -> Iterator[Desk]:
    clock, stop = Clock(), Event()
    with ExitStack() as opened:
        world = opened.enter_context(opened_service_world(database_url, connection, users_api))
        settings = world.settings(page_size=PAGE_SIZE)
        database = opened.enter_context(opened_database(settings, database_url, clock, stop))
        store = open_store(settings, database)
        source = opened.enter_context(opened_source(settings, clock, stop, store.lease, Nobody()))
        assert store.lease.acquire()
        bind_project(store, source)
        world.api.requests.clear()
        memory = Memory()
        memory.load(store)
        yield Desk(world, settings, source, store, memory)


def test_new_users_have_their_rows_at_once(desk: Desk) -> None:
    desk.world.project.populate(20)
    desk.sweep()
    desk.limits()
    created = {desk.world.project.create() for _ in range(3)}
    findings = desk.poll()
    assert (findings.counts["inserted"], desk.limits()) == (3, [SIZE])
    assert desk.live() >= created


def test_changes_among_the_newest_are_seen(desk: Desk) -> None:
    ids = desk.world.project.populate(20)
    desk.sweep()
    desk.world.project.edit(ids[-1], display_name="Renamed")
    desk.world.project.edit(ids[0], display_name="Too old")
    assert desk.poll().counts["updated"] == 1
    names = desk.world.query("select id from neon_auth.users_sync where name = 'Renamed'")
    assert names == [(ids[-1],)]


def test_unchanged_poll_costs_one_request_and_no_statement(desk: Desk) -> None:
    desk.world.project.populate(20)
    desk.sweep()
    desk.poll()
    desk.limits()
    desk.store.database.close()
    findings = desk.poll()
    assert (findings.changed_something, findings.wrote, desk.limits()) == (False, False, [SIZE])
    assert desk.world.connections() == 0


def test_project_without_users_is_polled_for_nothing(desk: Desk) -> None:
    assert not desk.poll().wrote


def test_poll_never_deletes_nor_suspects(desk: Desk) -> None:
    ids = desk.world.project.populate(20)
    desk.sweep()
    for user_id in ids[-4:]:
        desk.world.project.delete(user_id)
    assert not desk.poll().wrote
    assert desk.live() == set(ids)
    assert desk.world.query(MISSING) == [(0,)]


@every_server
def test_page_full_of_strangers_is_gone_on_from_until_somebody_is_known(desk: Desk) -> None:
    ids = desk.world.project.populate(30)
    desk.sweep()
    desk.limits()
    ids += [desk.world.project.create() for _ in range(40)]
    assert desk.poll().counts["inserted"] == 40
    limits = desk.limits()
    assert (limits[0], set(limits[1:])) == (SIZE, {PAGE_SIZE})
    assert len(limits) in range(5, 7)
    assert desk.live() == set(ids)


@every_server
def test_a_burst_of_5000_sign_ups_between_two_polls_is_in_the_table_at_once(desk: Desk) -> None:
    desk.source.page_size = PageSize(1_000)
    ids = desk.world.project.populate(100)
    desk.sweep()
    desk.limits()
    ids += [desk.world.project.create() for _ in range(5_000)]
    assert desk.poll().counts["inserted"] == 5_000
    assert desk.live() == set(ids)
    assert len(desk.limits()) == 7
    assert desk.poll().wrote is False


@every_server
@pytest.mark.parametrize("lost", ["the cursor", "the last user", "both", "the whole page"])
def test_a_poll_that_goes_on_skips_nobody_when_users_go_in_between(desk: Desk, lost: str) -> None:
    desk.world.project.populate(30)
    desk.sweep()
    new = [desk.world.project.create() for _ in range(40)]
    gone: list[str] = []

    def lose(request: Request) -> None:
        cursor = request.query.get("cursor")
        if cursor and not gone and request.query["desc"] == "true":
            newest_first = desk.world.project.ids()[::-1]
            at = newest_first.index(cursor)
            places = {
                "the cursor": slice(at, at + 1),
                "the last user": slice(at + 1, at + 2),
                "both": slice(at, at + 2),
                "the whole page": slice(at + 2),
            }
            gone.extend(newest_first[places[lost]])
            for user_id in gone:
                desk.world.project.delete(user_id)

    desk.world.api.on_request(lose)
    desk.poll()
    desk.poll()
    assert gone
    assert desk.live() >= set(new) - set(gone)


def test_behind_ten_thousand_strangers_the_sweep_takes_over(desk: Desk) -> None:
    desk.source.page_size = PageSize(1_000)
    desk.world.project.populate(12_000)
    assert desk.poll().counts["inserted"] in range(9_000, 11_001)
    assert max(desk.limits()) == 1_000
    assert desk.poll().changed_something is False


@pytest.mark.parametrize("poll_page_size", [1_001, 30_000])
def test_no_poll_asks_for_more_than_the_server_takes(desk: Desk, poll_page_size: int) -> None:
    ids = desk.world.project.populate(1_500)
    desk.sweep()
    desk.limits()
    assert (
        Poll(desk.source, desk.store, desk.memory, poll_page_size, cold=False).run().wrote is False
    )
    Poll(desk.source, desk.store, desk.memory, poll_page_size, cold=False).run()
    assert desk.limits() == [poll_page_size, 1_000, 1_000]
    assert desk.live() == set(ids)


def test_a_list_that_is_lost_again_and_again_ends_the_poll(desk: Desk) -> None:
    desk.world.project.populate(30)
    desk.sweep()
    desk.limits()
    for _ in range(40):
        desk.world.project.create()

    def lie(request: Request) -> None:
        if request.query.get("cursor"):
            request.query["cursor"] = "00000000-0000-4000-8000-ffffffffffff"

    desk.world.api.on_request(lie)
    assert desk.poll().counts["inserted"] == SIZE
    assert len(desk.limits()) < 12
    assert desk.live() >= set(desk.world.project.ids()[-SIZE:])


def test_cold_poll_reads_one_page_only(desk: Desk) -> None:
    ids = desk.world.project.populate(30)
    assert desk.poll(cold=True).counts["inserted"] == SIZE
    assert desk.limits() == [SIZE]
    assert desk.live() == set(ids[-SIZE:])


def test_user_that_only_moved_keeps_one_place(desk: Desk) -> None:
    ids = desk.world.project.populate(20)
    anonymous = desk.world.project.create(is_anonymous=True)
    desk.sweep()
    desk.world.project.upgrade(anonymous)
    assert desk.poll().counts["updated"] == 1
    assert len(desk.memory.mirror) == len(ids) + 1


def test_unreadable_record_among_the_newest_is_put_aside_once(desk: Desk) -> None:
    desk.world.project.populate(20)
    desk.sweep()
    odd = "00000000-0000-4000-8000-00000000000a"
    raw = f'{{"id":"{odd}","signed_up_at_millis":"soon"}}'
    desk.world.project.put_raw(odd, 4_000_000_000_000, raw.encode())
    assert [desk.poll().wrote, desk.poll().wrote] == [True, False]


class Beside:
    """Holds back the answer to the next page of a sweep, which is made before `release`."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self.reached, self._go_on = Event(), Event()
        self._threads = ThreadPoolExecutor(1)
        desk.world.api.on_request(self._hold)

    def _hold(self, request: Request) -> Reply | None:
        if request.query.get("desc") == "false" and not self.reached.is_set():
            # Made now, as of now, and sent later: what happens meanwhile is not in it.
            reply = self._desk.world.api.answer(request)
            self.reached.set()
            self._go_on.wait(10)
            return reply
        return None

    def sweep(self, act: Callable[[], object]) -> Report:
        """Sweep, and call `act` while the answer to the first page is on its way."""
        swept = self._threads.submit(self._desk.sweep)
        assert self.reached.wait(10)
        act()
        self._go_on.set()
        report = swept.result(20)
        self._threads.shutdown()
        return report


def test_user_inserted_by_a_poll_is_not_suspected_by_an_older_page(desk: Desk) -> None:
    ids = set(desk.world.project.populate(8))
    desk.sweep()
    desk.limits()

    def sign_up() -> None:
        ids.add(desk.world.project.create())
        assert desk.poll().counts["inserted"] == 1

    report = Beside(desk).sweep(sign_up)
    assert (report.candidates, report.counts["hidden"], report.counts["deleted"]) == (0, 0, 0)
    assert not [r for r in desk.world.api.requests if r.path != "/api/v1/users"]
    assert desk.live() == ids


def test_older_page_does_not_overwrite_what_a_poll_saw(desk: Desk) -> None:
    ids = desk.world.project.populate(8)
    desk.sweep()

    def rename() -> None:
        desk.world.project.edit(ids[-1], display_name="Renamed")
        assert desk.poll().counts["updated"] == 1

    report = Beside(desk).sweep(rename)
    assert report.changed_something is False
    names = desk.world.query("select id from neon_auth.users_sync where name = 'Renamed'")
    assert names == [(ids[-1],)]


def test_nothing_is_remembered_once_no_answer_is_under_way(desk: Desk) -> None:
    desk.world.project.populate(8)
    Beside(desk).sweep(desk.poll)
    desk.poll()
    assert desk.memory.remembered == 0


def test_broken_off_sweep_leaves_nothing_to_remember_for(desk: Desk) -> None:
    desk.world.project.populate(30)
    beside = Beside(desk)

    def outdate() -> None:
        desk.poll()
        desk.source.stop.set()

    with pytest.raises(Stopped):
        beside.sweep(outdate)
    assert desk.memory.remembered == 0


def test_poll_does_not_queue_behind_the_proofs_of_a_sweep(desk: Desk) -> None:
    ids = desk.world.project.populate(30)
    desk.sweep()
    for user_id in ids[:20]:
        desk.world.project.delete(user_id)
    go_on, asked = Event(), Event()

    def hold_proofs(request: Request) -> None:
        if request.path != "/api/v1/users":
            asked.set()
            go_on.wait(10)

    desk.world.api.on_request(hold_proofs)
    with ThreadPoolExecutor(1) as threads:
        swept = threads.submit(desk.sweep)
        until("proofs are asked for", asked.is_set)
        desk.world.project.create()
        assert desk.poll().counts["inserted"] == 1
        assert not swept.done()
        go_on.set()
        assert swept.result(20).counts["deleted"] == 20


# Manners


def test_poll_that_took_the_server_long_waits_in_proportion(desk: Desk) -> None:
    """At most a fifth of the time; the least pause is 0.02 s."""
    sign_up(desk.world.project, *range(30))
    vitals = Vitals(target="neon_auth", api_host="localhost", sweep_seconds=60)
    figures = Figures(vitals, Metrics(vitals.snapshot), desk.memory, desk.store.database.clock)
    leader = Leader(desk.settings, desk.source, desk.store, desk.memory, figures)
    leader.sweep()

    def work(_: Request) -> None:
        Event().wait(0.1)

    desk.world.api.on_request(work)
    assert leader.poll() >= 4 * 0.1


# Suspicions that an interrupted sweep leaves

INTERRUPTED = """
create function public.interrupt() returns trigger language plpgsql as $$
begin
    if new.outcome is not null then raise exception using errcode = '42501'; end if;
    return new;
end $$;
create trigger interrupt before insert or update on users_sync_worker.sweep
for each row execute function public.interrupt()
"""
MARK_DELETED = """
update neon_auth.users_sync set deleted_at = clock_timestamp() - interval '1 s' where id = %s
"""
SUSPECT = """
insert into users_sync_worker.deletion
values ('neon_auth', %s, 'candidate', 1, 1, clock_timestamp() - interval '2 s')
"""


def test_user_whom_an_interrupted_sweep_deleted_is_suspected_no_more(desk: Desk) -> None:
    one, *_ = sign_up(desk.world.project, *range(4))
    desk.sweep()
    desk.world.project.delete(one)
    desk.world.query(INTERRUPTED)
    with pytest.raises(Misconfigured):
        desk.sweep()
    assert one not in desk.live()
    assert desk.world.query(MISSING) == [(0,)]
    sign_up(desk.world.project, 0)
    desk.poll()
    assert one in desk.live()
    assert desk.world.query(MISSING) == [(0,)]


def test_user_whose_row_another_writer_deleted_is_suspected_no_more_once_restored(
    desk: Desk,
) -> None:
    one, *others = sign_up(desk.world.project, *range(4))
    desk.sweep()
    desk.world.query(SUSPECT, one)
    desk.world.query(MARK_DELETED, one)
    desk.memory.load(desk.store)
    now = desk.store.database.clock.now()
    begin(desk.store, desk.memory, "sweep", Checkpoint(1, (0, one), {}, now), now)
    desk.poll()
    assert desk.live() == {one, *others}
    assert desk.world.query(MISSING) == [(0,)]
