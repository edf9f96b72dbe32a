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
from worker.service.health import Health
from worker.service.leader import Leader
from worker.service.metrics import Metrics
from worker.service.ownership import bind_project
from worker.service.telemetry import Telemetry
from worker.settings.settings import Settings
from worker.store import Store
from worker.store.sweeps import Checkpoint
from worker.sync.cache import Cache
from worker.sync.fetcher import Fetcher
from worker.sync.page_size import PageSize
from worker.sync.poll import Poll
from worker.sync.state import SweepState, begin
from worker.sync.sweep import Report, Sweep
from worker.wiring import deletion_policy, open_store, opened_database, opened_fetcher

SIZE = 5
PAGE_SIZE = 10
MISSING = "select count(*) from users_sync_worker.deletion"


@dataclass(frozen=True)
class Session:
    """What a poll and a sweep need, with the lease in hand."""

    world: ServiceWorld
    settings: Settings
    fetcher: Fetcher
    store: Store
    cache: Cache

    def poll(self, *, cold: bool = False) -> SweepState:
        return Poll(self.fetcher, self.store, self.cache, SIZE, cold).run()

    def sweep(self) -> Report:
        return Sweep(
            self.fetcher, self.store, self.cache, deletion_policy(self.settings), lambda _: None
        ).run()

    def limits(self) -> list[int]:
        """Give how many users were asked for, page by page, and forget that they were."""
        asked = [int(request.query["limit"]) for request in self.world.lists()]
        self.world.api.requests.clear()
        return asked

    def live(self) -> set[str]:
        return {row[0] for row in self.world.query(LIVE)}


@pytest.fixture
def session(database_url: str, connection: psycopg.Connection, users_api: str) -> Iterator[Session]:
    clock, stop = Clock(), Event()
    with ExitStack() as opened:
        world = opened.enter_context(opened_service_world(database_url, connection, users_api))
        settings = world.settings(page_size=PAGE_SIZE)
        database = opened.enter_context(opened_database(settings, database_url, clock, stop))
        store = open_store(settings, database)
        fetcher = opened.enter_context(opened_fetcher(settings, clock, stop, store.lease, Nobody()))
        assert store.lease.acquire()
        bind_project(store, fetcher)
        world.api.requests.clear()
        cache = Cache()
        cache.load(store)
        yield Session(world, settings, fetcher, store, cache)


def test_new_users_have_their_rows_at_once(session: Session) -> None:
    session.world.project.populate(20)
    session.sweep()
    session.limits()
    created = {session.world.project.create() for _ in range(3)}
    state = session.poll()
    assert (state.counts["inserted"], session.limits()) == (3, [SIZE])
    assert session.live() >= created


def test_changes_among_the_newest_are_seen(session: Session) -> None:
    ids = session.world.project.populate(20)
    session.sweep()
    session.world.project.edit(ids[-1], display_name="Renamed")
    session.world.project.edit(ids[0], display_name="Too old")
    assert session.poll().counts["updated"] == 1
    names = session.world.query("select id from neon_auth.users_sync where name = 'Renamed'")
    assert names == [(ids[-1],)]


def test_unchanged_poll_costs_one_request_and_no_statement(session: Session) -> None:
    session.world.project.populate(20)
    session.sweep()
    session.poll()
    session.limits()
    session.store.database.close()
    state = session.poll()
    assert (state.changed_something, state.has_written, session.limits()) == (False, False, [SIZE])
    assert session.world.connections() == 0


def test_project_without_users_is_polled_for_nothing(session: Session) -> None:
    assert not session.poll().has_written


def test_poll_never_deletes_nor_suspects(session: Session) -> None:
    ids = session.world.project.populate(20)
    session.sweep()
    for user_id in ids[-4:]:
        session.world.project.delete(user_id)
    assert not session.poll().has_written
    assert session.live() == set(ids)
    assert session.world.query(MISSING) == [(0,)]


@every_server
def test_page_full_of_strangers_is_gone_on_from_until_somebody_is_known(session: Session) -> None:
    ids = session.world.project.populate(30)
    session.sweep()
    session.limits()
    ids += [session.world.project.create() for _ in range(40)]
    assert session.poll().counts["inserted"] == 40
    limits = session.limits()
    assert (limits[0], set(limits[1:])) == (SIZE, {PAGE_SIZE})
    assert len(limits) in range(5, 7)
    assert session.live() == set(ids)


@every_server
def test_a_burst_of_5000_sign_ups_between_two_polls_is_in_the_table_at_once(
    session: Session,
) -> None:
    session.fetcher.page_size = PageSize(1_000)
    ids = session.world.project.populate(100)
    session.sweep()
    session.limits()
    ids += [session.world.project.create() for _ in range(5_000)]
    assert session.poll().counts["inserted"] == 5_000
    assert session.live() == set(ids)
    assert len(session.limits()) == 7
    assert session.poll().has_written is False


@every_server
@pytest.mark.parametrize("lost", ["the cursor", "the last user", "both", "the whole page"])
def test_a_poll_that_goes_on_skips_nobody_when_users_go_in_between(
    session: Session, lost: str
) -> None:
    session.world.project.populate(30)
    session.sweep()
    new = [session.world.project.create() for _ in range(40)]
    gone: list[str] = []

    def lose(request: Request) -> None:
        cursor = request.query.get("cursor")
        if cursor and not gone and request.query["desc"] == "true":
            newest_first = session.world.project.ids()[::-1]
            at = newest_first.index(cursor)
            places = {
                "the cursor": slice(at, at + 1),
                "the last user": slice(at + 1, at + 2),
                "both": slice(at, at + 2),
                "the whole page": slice(at + 2),
            }
            gone.extend(newest_first[places[lost]])
            for user_id in gone:
                session.world.project.delete(user_id)

    session.world.api.on_request(lose)
    session.poll()
    session.poll()
    assert gone
    assert session.live() >= set(new) - set(gone)


def test_behind_ten_thousand_strangers_the_sweep_takes_over(session: Session) -> None:
    session.fetcher.page_size = PageSize(1_000)
    session.world.project.populate(12_000)
    assert session.poll().counts["inserted"] in range(9_000, 11_001)
    assert max(session.limits()) == 1_000
    assert session.poll().changed_something is False


@pytest.mark.parametrize("poll_page_size", [1_001, 30_000])
def test_no_poll_asks_for_more_than_the_server_takes(session: Session, poll_page_size: int) -> None:
    ids = session.world.project.populate(1_500)
    session.sweep()
    session.limits()
    assert (
        Poll(session.fetcher, session.store, session.cache, poll_page_size, cold=False)
        .run()
        .has_written
        is False
    )
    Poll(session.fetcher, session.store, session.cache, poll_page_size, cold=False).run()
    assert session.limits() == [poll_page_size, 1_000, 1_000]
    assert session.live() == set(ids)


def test_a_list_that_is_lost_again_and_again_ends_the_poll(session: Session) -> None:
    session.world.project.populate(30)
    session.sweep()
    session.limits()
    for _ in range(40):
        session.world.project.create()

    def lie(request: Request) -> None:
        if request.query.get("cursor"):
            request.query["cursor"] = "00000000-0000-4000-8000-ffffffffffff"

    session.world.api.on_request(lie)
    assert session.poll().counts["inserted"] == SIZE
    assert len(session.limits()) < 12
    assert session.live() >= set(session.world.project.ids()[-SIZE:])


def test_cold_poll_reads_one_page_only(session: Session) -> None:
    ids = session.world.project.populate(30)
    assert session.poll(cold=True).counts["inserted"] == SIZE
    assert session.limits() == [SIZE]
    assert session.live() == set(ids[-SIZE:])


def test_user_that_only_moved_keeps_one_place(session: Session) -> None:
    ids = session.world.project.populate(20)
    anonymous = session.world.project.create(is_anonymous=True)
    session.sweep()
    session.world.project.upgrade(anonymous)
    assert session.poll().counts["updated"] == 1
    assert len(session.cache.mirror) == len(ids) + 1


def test_unreadable_record_among_the_newest_is_put_aside_once(session: Session) -> None:
    session.world.project.populate(20)
    session.sweep()
    odd = "00000000-0000-4000-8000-00000000000a"
    raw = f'{{"id":"{odd}","signed_up_at_millis":"soon"}}'
    session.world.project.put_raw(odd, 4_000_000_000_000, raw.encode())
    assert [session.poll().has_written, session.poll().has_written] == [True, False]


class UnleasedWrites:
    """Holds back the answer to the next page of a sweep, which is made before `release`."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.reached, self._go_on = Event(), Event()
        self._threads = ThreadPoolExecutor(1)
        session.world.api.on_request(self._hold)

    def _hold(self, request: Request) -> Reply | None:
        if request.query.get("desc") == "false" and not self.reached.is_set():
            # Made now, as of now, and sent later: what happens meanwhile is not in it.
            reply = self._session.world.api.answer(request)
            self.reached.set()
            self._go_on.wait(10)
            return reply
        return None

    def sweep(self, act: Callable[[], object]) -> Report:
        """Sweep, and call `act` while the answer to the first page is on its way."""
        swept = self._threads.submit(self._session.sweep)
        assert self.reached.wait(10)
        act()
        self._go_on.set()
        report = swept.result(20)
        self._threads.shutdown()
        return report


def test_user_inserted_by_a_poll_is_not_suspected_by_an_older_page(session: Session) -> None:
    ids = set(session.world.project.populate(8))
    session.sweep()
    session.limits()

    def sign_up() -> None:
        ids.add(session.world.project.create())
        assert session.poll().counts["inserted"] == 1

    report = UnleasedWrites(session).sweep(sign_up)
    assert (report.candidates, report.counts["hidden"], report.counts["deleted"]) == (0, 0, 0)
    assert not [r for r in session.world.api.requests if r.path != "/api/v1/users"]
    assert session.live() == ids


def test_older_page_does_not_overwrite_what_a_poll_saw(session: Session) -> None:
    ids = session.world.project.populate(8)
    session.sweep()

    def rename() -> None:
        session.world.project.edit(ids[-1], display_name="Renamed")
        assert session.poll().counts["updated"] == 1

    report = UnleasedWrites(session).sweep(rename)
    assert report.changed_something is False
    names = session.world.query("select id from neon_auth.users_sync where name = 'Renamed'")
    assert names == [(ids[-1],)]


def test_nothing_is_remembered_once_no_answer_is_under_way(session: Session) -> None:
    session.world.project.populate(8)
    UnleasedWrites(session).sweep(session.poll)
    session.poll()
    assert session.cache.remembered == 0


def test_broken_off_sweep_leaves_nothing_to_remember_for(session: Session) -> None:
    session.world.project.populate(30)
    beside = UnleasedWrites(session)

    def outdate() -> None:
        session.poll()
        session.fetcher.stop.set()

    with pytest.raises(Stopped):
        beside.sweep(outdate)
    assert session.cache.remembered == 0


def test_poll_does_not_queue_behind_the_proofs_of_a_sweep(session: Session) -> None:
    ids = session.world.project.populate(30)
    session.sweep()
    for user_id in ids[:20]:
        session.world.project.delete(user_id)
    go_on, asked = Event(), Event()

    def hold_proofs(request: Request) -> None:
        if request.path != "/api/v1/users":
            asked.set()
            go_on.wait(10)

    session.world.api.on_request(hold_proofs)
    with ThreadPoolExecutor(1) as threads:
        swept = threads.submit(session.sweep)
        until("proofs are asked for", asked.is_set)
        session.world.project.create()
        assert session.poll().counts["inserted"] == 1
        assert not swept.done()
        go_on.set()
        assert swept.result(20).counts["deleted"] == 20


# Manners


def test_poll_that_took_the_server_long_waits_in_proportion(session: Session) -> None:
    """At most a fifth of the time; the least pause is 0.02 s."""
    sign_up(session.world.project, *range(30))
    health = Health(target="neon_auth", api_host="localhost", sweep_seconds=60)
    telemetry = Telemetry(health, Metrics(health.read), session.cache, session.store.database.clock)
    leader = Leader(session.settings, session.fetcher, session.store, session.cache, telemetry)
    leader.sweep()

    def work(_: Request) -> None:
        Event().wait(0.1)

    session.world.api.on_request(work)
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


def test_user_whom_an_interrupted_sweep_deleted_is_suspected_no_more(session: Session) -> None:
    one, *_ = sign_up(session.world.project, *range(4))
    session.sweep()
    session.world.project.delete(one)
    session.world.query(INTERRUPTED)
    with pytest.raises(Misconfigured):
        session.sweep()
    assert one not in session.live()
    assert session.world.query(MISSING) == [(0,)]
    sign_up(session.world.project, 0)
    session.poll()
    assert one in session.live()
    assert session.world.query(MISSING) == [(0,)]


def test_user_whose_row_another_writer_deleted_is_suspected_no_more_once_restored(
    session: Session,
) -> None:
    one, *others = sign_up(session.world.project, *range(4))
    session.sweep()
    session.world.query(SUSPECT, one)
    session.world.query(MARK_DELETED, one)
    session.cache.load(session.store)
    now = session.store.database.clock.now()
    begin(session.store, session.cache, "sweep", Checkpoint(1, (0, one), {}, now), now)
    session.poll()
    assert session.live() == {one, *others}
    assert session.world.query(MISSING) == [(0,)]
