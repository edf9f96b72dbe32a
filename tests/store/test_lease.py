"""Who may write, and that nobody else's transaction writes anything."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from select import select
from tempfile import TemporaryFile
from threading import Event, Thread

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.support.store_target import PROJECT, Target, people, person
from worker.errors import Blocked, DatabaseUnavailable, DataRefused, LeaseLost, MirrorOutdated
from worker.model import Users
from worker.store.lease import Lease, LeaseRequest, LeaseStatus
from worker.store.transaction import Statement

LIMITS = """
select current_setting('statement_timeout'), current_setting('lock_timeout'),
       current_setting('idle_in_transaction_session_timeout')
"""

# How libpq sends this in a pipeline: an unnamed statement and its text.
COMMIT = b"\x00commit\x00"


@dataclass
class Monotonic:
    """A clock of this machine that stands still unless it is moved."""

    seconds: float = 1000

    def __call__(self) -> float:
        return self.seconds


@dataclass
class Wire:
    """A way to the server that breaks once, at the first commit after it was armed."""

    url: str
    pass_on: bool
    armed: bool = False
    breaking: bool = False
    over: Event = field(default_factory=Event)


@contextmanager
def breaking_at_commit(target: Target, *, pass_on: bool) -> Iterator[Wire]:
    """Lead to the server; one commit is lost, or with `pass_on` only the answer to it."""
    info = target.conn.info
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        where = {"host": "127.0.0.1", "hostaddr": "", "port": port}
        wire = Wire(make_conninfo(target.url, **where, sslmode="disable"), pass_on)
        thread = Thread(target=_lead, args=(listener, info.host, info.port, wire))
        thread.start()
        try:
            yield wire
        finally:
            wire.over.set()
            thread.join()


def _lead(listener: socket.socket, host: str, port: int, wire: Wire) -> None:
    listener.settimeout(0.05)
    while not wire.over.is_set():
        with suppress(TimeoutError), listener.accept()[0] as client, _dial(host, port) as server:
            client.settimeout(None)
            while _pass_on(client, server, wire):
                pass


def _dial(host: str, port: int) -> socket.socket:
    if not host.startswith("/"):
        return socket.create_connection((host, port))
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"{host}/.s.PGSQL.{port}")
    return server


def _pass_on(client: socket.socket, server: socket.socket, wire: Wire) -> bool:
    """Pass on what either side says; False when the connection is over."""
    for ready in select([client, server], [], [], 0.05)[0]:
        data = ready.recv(1 << 20)
        if wire.armed and ready is client and COMMIT in data:
            wire.armed, wire.breaking = False, True
        if not data or (wire.breaking and (ready is server or not wire.pass_on)):
            wire.breaking = False
            return False
        (client if ready is server else server).sendall(data)
    return not wire.over.is_set()


def wanted(target: Target) -> Statement:
    """Write something that can be looked for."""
    return target.table().apply(Users.of([person(1)]), target.now())


def writes(target: Target) -> int:
    count: int = target.lease_row("writes")
    return count


def test_free_lease_is_acquired(generated: Target) -> None:
    lease = generated.lease()
    assert (lease.acquire(), lease.bound, lease.sweep) == (True, False, 0)
    assert (generated.lease_row("holder"), generated.lease_row("epoch")) == ("one", 1)


def test_second_holder_is_refused_until_the_lease_has_run_out(generated: Target) -> None:
    first, second = generated.lease(holder="first"), generated.lease(holder="second")
    assert first.acquire()
    assert not second.acquire()
    generated.run_out()
    assert second.acquire()
    assert not first.acquire()


def test_holder_may_acquire_again(generated: Target) -> None:
    """It may not have learnt that it had it."""
    lease = generated.lease()
    assert [lease.acquire(), lease.acquire()] == [True, True]
    lease.bind()
    lease.commit([wanted(generated)], 1)
    assert generated.ids() == {person(1).id}


def test_released_lease_is_free_at_once(generated: Target) -> None:
    first, second = generated.lease(holder="first"), generated.lease(holder="second")
    first.acquire()
    first.release()
    assert (second.acquire(), generated.lease_row("epoch")) == (True, 2)


def test_lost_lease_is_not_released(generated: Target) -> None:
    first, second = generated.lease(holder="first"), generated.lease(holder="second")
    first.acquire()
    generated.run_out()
    second.acquire()
    first.release()
    assert not first.acquire()


def test_targets_have_a_lease_each(generated: Target) -> None:
    other = Lease(generated.database(), LeaseRequest("other", "p", "two", 60))
    assert (generated.lease().acquire(), other.acquire()) == (True, True)


def test_lease_of_another_project_is_never_acquired(generated: Target) -> None:
    generated.held_lease().release()
    other = generated.lease(holder="two", project="another")
    assert not other.acquire()
    assert not generated.lease(project="another").acquire()
    ours = generated.lease(holder="two")
    assert (ours.acquire(), ours.bound) == (True, True)


def test_project_bound_in_upper_case_is_the_same(generated: Target) -> None:
    generated.held_lease().release()
    generated.query("update users_sync_worker.lease set project = 'AB-1'")
    ours = generated.lease(holder="two", project="ab-1")
    assert (ours.acquire(), ours.bound) == (True, True)
    status = ours.look()
    assert status is not None
    assert status.project == "ab-1"
    ours.bind()
    ours.commit([], 1)
    assert not generated.lease(holder="three", project="ab-2").acquire()


def test_project_is_bound_by_the_holder_alone(generated: Target) -> None:
    first, second = generated.lease(), generated.lease(holder="second", project="another")
    first.acquire()
    second.bind()
    assert generated.lease_row("project") is None
    first.release()
    second.acquire()
    second.bind()
    assert generated.lease_row("project") == "another"


def test_nothing_is_written_before_the_project_is_bound(generated: Target) -> None:
    lease = generated.lease()
    lease.acquire()
    with pytest.raises(LeaseLost):
        lease.commit([wanted(generated)], 1)
    assert (generated.ids(), writes(generated)) == (set(), 0)


def test_lost_lease_writes_nothing(generated: Target) -> None:
    first = generated.held_lease()
    generated.run_out()
    assert generated.lease(holder="second").acquire()
    with pytest.raises(LeaseLost, match="another worker took the lease"):
        first.commit([wanted(generated)], 1)
    assert (generated.ids(), writes(generated)) == (set(), 0)


def test_lease_that_ran_out_is_good_until_somebody_takes_it(generated: Target) -> None:
    lease = generated.held_lease()
    generated.run_out()
    lease.commit([wanted(generated)], 1)
    assert generated.ids() == {person(1).id}
    assert not generated.lease(holder="second").acquire()


def test_write_beside_the_lease_outdates_the_mirror(generated: Target) -> None:
    lease = generated.held_lease()
    generated.query("update users_sync_worker.lease set writes = writes + 1")
    with pytest.raises(MirrorOutdated):
        lease.commit([wanted(generated)], 1)
    assert (generated.ids(), writes(generated)) == (set(), 1)
    lease.resync()
    lease.commit([wanted(generated)], 1)
    assert (generated.ids(), writes(generated)) == ({person(1).id}, 2)


def test_database_that_was_set_back_outdates_the_mirror(generated: Target) -> None:
    lease = generated.held_lease()
    lease.commit([], 1)
    generated.query("update users_sync_worker.lease set writes = 0")
    with pytest.raises(MirrorOutdated):
        lease.commit([wanted(generated)], 1)


def test_lost_lease_is_not_resynced(generated: Target) -> None:
    lease = generated.held_lease()
    generated.run_out()
    generated.lease(holder="second").acquire()
    with pytest.raises(LeaseLost):
        lease.resync()


def test_each_commit_is_one_write_and_renews(generated: Target) -> None:
    lease = generated.held_lease()
    generated.run_out()
    lease.commit([], 3)
    lease.commit([], 2)
    row = [generated.lease_row(name) for name in ("writes", "sweep", "expires_at > now()")]
    assert row == [2, 3, True]
    assert (generated.lease().acquire(), writes(generated)) == (True, 2)


def test_commit_gives_the_first_row_of_each_statement(generated: Target) -> None:
    statements = [
        Statement(sql.SQL("select %(a)s::int, 'b'"), {"a": 1}),
        Statement(sql.SQL("delete from users_sync_worker.checkpoint where false")),
        Statement(sql.SQL("select 1 where false")),
    ]
    assert generated.held_lease().commit(statements, 1) == [(1, "b"), (0,), None]


def test_statement_that_fails_takes_all_others_with_it(generated: Target) -> None:
    lease = generated.held_lease()
    broken = Statement(sql.SQL("select 1 / 0"))
    for statements in ([wanted(generated), broken], [broken, wanted(generated)]):
        with pytest.raises(DataRefused):
            lease.commit(statements, 1)
    assert (generated.ids(), writes(generated)) == (set(), 0)
    lease.commit([wanted(generated)], 1)
    assert (generated.ids(), writes(generated)) == ({person(1).id}, 1)


def test_constraint_that_is_checked_at_the_end_fails_the_commit(generated: Target) -> None:
    generated.query(
        "create table twins (id text references users_sync (id) deferrable initially deferred)"
    )
    lease = generated.held_lease()
    table = sql.SQL(generated.qualified("twins"))
    statement = Statement(sql.SQL("insert into {} values ('x')").format(table))
    with pytest.raises(DataRefused, match="23503"):
        lease.commit([statement], 1)
    assert writes(generated) == 0
    lease.commit([wanted(generated)], 1)


def test_commit_takes_two_round_trips(generated: Target) -> None:
    database = generated.database()
    lease = generated.held_lease(database)
    statements = [
        wanted(generated),
        generated.table().apply(Users.of(people(2, 3)), generated.now()),
    ]
    with TemporaryFile() as trace:
        database.call(lambda conn: conn.pgconn.trace(trace.fileno()))
        lease.commit(statements, 1)
        database.call(lambda conn: conn.pgconn.untrace())
        trace.seek(0)
        assert trace.read().count(b"ReadyForQuery") == 2


def test_renewal_is_due_after_a_third_and_is_no_write(generated: Target) -> None:
    monotonic = Monotonic()
    lease = generated.held_lease(generated.database(monotonic=monotonic), seconds=60)
    generated.run_out()
    before = generated.lease_row("expires_at")

    monotonic.seconds += 19.9
    lease.renew_if_due()
    assert generated.lease_row("expires_at") == before

    monotonic.seconds += 0.2
    lease.renew_if_due()
    assert generated.lease_row("expires_at > clock_timestamp() + interval '50 s'")
    assert writes(generated) == 0


def test_commit_puts_the_renewal_off(generated: Target) -> None:
    monotonic = Monotonic()
    lease = generated.held_lease(generated.database(monotonic=monotonic), seconds=60)
    monotonic.seconds += 19
    lease.commit([], 1)
    before = generated.lease_row("expires_at")
    monotonic.seconds += 19
    lease.renew_if_due()
    assert generated.lease_row("expires_at") == before


def test_renewal_compares_both_numbers(generated: Target) -> None:
    monotonic = Monotonic()
    lease = generated.held_lease(generated.database(monotonic=monotonic), seconds=60)
    monotonic.seconds += 20
    generated.query("update users_sync_worker.lease set writes = writes + 1")
    with pytest.raises(MirrorOutdated):
        lease.renew_if_due()
    generated.run_out()
    generated.lease(holder="second").acquire()
    monotonic.seconds += 20
    with pytest.raises(LeaseLost):
        lease.renew_if_due()


def test_whoever_looks_sees_holder_and_time_left(generated: Target) -> None:
    lease = generated.lease()
    assert lease.look() is None
    lease.acquire()
    status = generated.lease(holder="second").look()
    assert isinstance(status, LeaseStatus)
    assert (status.epoch, status.project, status.holder) == (1, None, "one")
    assert 50 < status.remaining <= 60
    generated.run_out()
    again = lease.look()
    assert again
    assert (again.remaining, again.expires_at != status.expires_at) == (0, True)
    lease.release()
    assert (released := lease.look())
    assert (released.holder, released.remaining) == (None, 0)


def test_clock_is_set_by_every_answer_and_never_fast(generated: Target) -> None:
    monotonic = Monotonic()
    database = generated.database(monotonic=monotonic)
    lease = generated.held_lease(database)
    times: list[datetime] = []
    for answer in (lease.resync, lambda: lease.commit([], 1), lease.acquire):
        before = generated.now()
        answer()
        times += [before, database.clock.now(), generated.now()]
    assert times == sorted(times)


def test_time_limits_are_those_of_the_transaction_alone(generated: Target) -> None:
    database = generated.database()
    before = database.call(lambda conn: conn.execute(LIMITS).fetchone())
    lease = generated.held_lease(database)

    rows = lease.commit([Statement(sql.SQL(LIMITS))], 1)

    lease.release()
    assert rows == [("30s", "2s", "20s")]
    assert before == database.call(lambda conn: conn.execute(LIMITS).fetchone())


@pytest.mark.usefixtures("short_lock_waits")
def test_locked_lease_row_is_waited_for_no_longer_than_a_retry(generated: Target) -> None:
    """It says nothing of the users, so they must not be halved as if one of them were locked."""
    monotonic = Monotonic()
    lease = generated.held_lease(generated.database(monotonic=monotonic))
    monotonic.seconds += 60
    statement = wanted(generated)
    # Once it has run out, whoever is in the way is ended.
    generated.query("update users_sync_worker.lease set expires_at = 'infinity'")
    with generated.conn.transaction():
        generated.query("select from users_sync_worker.lease for update")
        for call in (
            lambda: lease.commit([statement], 1),
            lease.renew_if_due,
            lease.acquire,
            lease.release,
        ):
            with pytest.raises(DatabaseUnavailable, match="the lease row is locked"):
                call()
    assert (generated.ids(), writes(generated)) == (set(), 0)


@pytest.mark.usefixtures("short_lock_waits")
def test_locked_lease_row_is_tried_again(generated: Target, background: ThreadPoolExecutor) -> None:
    lease = generated.held_lease(generated.database(retry_seconds=30))
    statement = wanted(generated)
    with generated.conn.transaction():
        generated.query("select from users_sync_worker.lease for update")
        rows = background.submit(lease.commit, [statement], 1)
        generated.await_waiting()
    assert rows.result(10) == [("i", None, None)]
    assert writes(generated) == 1


@pytest.mark.usefixtures("short_lock_waits")
def test_row_that_an_application_locks_is_blocked(generated: Target) -> None:
    lease = generated.held_lease()
    generated.apply([person(1)])
    statement = generated.table().apply(Users.of(people(1, display_name="New")), generated.now())
    with generated.conn.transaction():
        generated.query("select from users_sync for update")
        with pytest.raises(Blocked, match="lock timeout"):
            lease.commit([statement], 1)
    assert writes(generated) == 0


def test_statement_that_takes_half_a_lease_is_blocked(generated: Target) -> None:
    lease = generated.held_lease(seconds=4)
    with pytest.raises(Blocked, match="statement timeout"):
        lease.commit([Statement(sql.SQL("select pg_sleep(10)"))], 1)
    assert writes(generated) == 0


def test_takeover_waits_for_the_holders_open_transaction_and_finds_it_renewed(
    generated: Target, background: ThreadPoolExecutor
) -> None:
    first, second = generated.held_lease(), generated.lease(holder="second")
    generated.apply([person(1)])
    statement = generated.table().apply(Users.of(people(1, display_name="New")), generated.now())
    generated.run_out()
    with generated.conn.transaction():
        generated.query("select from users_sync for update")
        rows = background.submit(first.commit, [statement], 1)
        generated.await_waiting()
        taken = background.submit(second.acquire)
        generated.await_waiting(2)
    assert (rows.result(10), taken.result(10)) == ([("u", None, None)], False)


def test_backend_killed_before_its_commit_writes_once(
    generated: Target, background: ThreadPoolExecutor
) -> None:
    lease = generated.held_lease(generated.database(retry_seconds=30))
    generated.apply([person(1)])
    statement = generated.table().apply(Users.of(people(1, display_name="New")), generated.now())
    with generated.conn.transaction():
        generated.query("select from users_sync for update")
        rows = background.submit(lease.commit, [statement], 1)
        generated.await_waiting()
        generated.query(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and wait_event_type = 'Lock'"
        )
    assert rows.result(10) == [("u", None, None)]
    assert (writes(generated), generated.row(person(1))[1]) == (1, "New")


def test_commit_that_never_arrived_is_made_again_and_counts_once(generated: Target) -> None:
    with breaking_at_commit(generated, pass_on=False) as wire:
        generated.held_lease()
        database = generated.database(url=wire.url, retry_seconds=30)
        lease = generated.lease(database)
        assert lease.acquire()
        wire.armed = True
        rows = lease.commit([wanted(generated)], 1)
        assert not wire.armed
        database.close()
    assert rows == [("i", None, None)]
    assert (writes(generated), generated.ids()) == (1, {person(1).id})


def test_commit_whose_answer_is_lost_counts_once_and_outdates_the_mirror(
    generated: Target,
) -> None:
    """Whether it was made can not be told from another's write: the table is read again."""
    with breaking_at_commit(generated, pass_on=True) as wire:
        generated.held_lease()
        database = generated.database(url=wire.url, retry_seconds=30)
        lease = generated.lease(database)
        assert lease.acquire()
        wire.armed = True
        with pytest.raises(MirrorOutdated):
            lease.commit([wanted(generated)], 1)
        assert not wire.armed
        lease.resync()
        database.close()
    assert (writes(generated), generated.ids()) == (1, {person(1).id})


def test_acquiring_whose_answer_is_lost_succeeds_in_the_end(generated: Target) -> None:
    with breaking_at_commit(generated, pass_on=True) as wire:
        database = generated.database(url=wire.url, retry_seconds=30)
        lease = generated.lease(database)
        wire.armed = True
        assert lease.acquire()
        assert not wire.armed
        lease.bind()
        lease.commit([wanted(generated)], 1)
        database.close()
    assert generated.ids() == {person(1).id}


def test_project_of_the_lease_is_checked_by_every_write(generated: Target) -> None:
    lease = generated.held_lease()
    generated.query("update users_sync_worker.lease set project = 'another'")
    with pytest.raises(LeaseLost):
        lease.commit([wanted(generated)], 1)
    assert generated.ids() == set()


def test_connection_is_usable_after_a_refused_write(generated: Target) -> None:
    database = generated.database()
    lease = generated.held_lease(database)
    before = database.call(lambda conn: conn.info.backend_pid)
    generated.query("update users_sync_worker.lease set writes = writes + 1")
    with pytest.raises(MirrorOutdated):
        lease.commit([wanted(generated)], 1)
    status = database.call(lambda conn: (conn.info.backend_pid, conn.info.transaction_status))
    assert status == (before, psycopg.pq.TransactionStatus.IDLE)


def test_statement_that_fills_the_buffers_on_the_way_is_sent_whole(generated: Target) -> None:
    text = "x" * 40_000_000
    long = Statement(sql.SQL("select length(%(text)s)"), {"text": text})
    with breaking_at_commit(generated, pass_on=True) as wire, ThreadPoolExecutor(1) as pool:
        lease = generated.held_lease(generated.database(url=wire.url))
        committed = pool.submit(lease.commit, [long], 1)
        try:
            assert committed.result(timeout=30) == [(len(text),)]
        finally:
            wire.over.set()


# What was written meanwhile


def test_resync_says_how_far_the_mirror_was_true(generated: Target) -> None:
    lease = generated.held_lease()
    lease.commit([], 1)
    generated.query("update users_sync_worker.lease set writes = writes + 3")
    for _ in range(2):
        with pytest.raises(MirrorOutdated):
            lease.commit([wanted(generated)], 1)
    assert lease.resync() == (1, 4)
    lease.commit([], 1)
    assert writes(generated) == 5


def test_resync_that_was_not_needed_says_nothing(generated: Target) -> None:
    assert generated.held_lease().resync() is None


def test_lease_that_was_taken_anew_says_nothing_of_before(generated: Target) -> None:
    lease = generated.held_lease()
    generated.query("update users_sync_worker.lease set writes = writes + 1")
    with pytest.raises(MirrorOutdated):
        lease.commit([], 1)
    generated.run_out()
    assert lease.acquire()
    assert lease.resync() is None


def test_quiet_lease_says_how_far_the_mirror_was_true_unless_another_held_it(
    generated: Target,
) -> None:
    claim = LeaseRequest(generated.schema, PROJECT, "quiet", 60, quiet=True)
    lease = Lease(generated.database(), claim)
    assert lease.acquire()
    lease.bind()
    lease.rest()
    generated.query("update users_sync_worker.lease set writes = writes + 1")
    for _ in range(2):
        with pytest.raises(MirrorOutdated):
            lease.commit([wanted(generated)], 1)
    assert lease.resync() == (0, 1)
    lease.rest()
    generated.query("update users_sync_worker.lease set writes = writes + 1, epoch = epoch + 1")
    with pytest.raises(MirrorOutdated):
        lease.commit([wanted(generated)], 1)
    assert lease.resync() is None
    assert generated.ids() == set()
