"""What the long-running worker promises, in this process: real sockets, a real Postgres."""

import re
from collections.abc import Iterator, MutableMapping
from threading import Event
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from structlog.testing import capture_logs

from tests.support.service_world import ServiceWorld, Worker, opened_service_world
from tests.support.waiting import until
from worker.cli.session import opened_session
from worker.clock import Clock
from worker.errors import MirrorOutdated, Misconfigured
from worker.sandbox.api import Reply, Request, server_error
from worker.sandbox.replies import known_error
from worker.store.lease import Lease, LeaseRequest
from worker.sync import walk
from worker.wiring import opened_database

SWEEPS = "select kind, outcome from users_sync_worker.sweep order by number"
REFUSED = known_error(401, "INVALID_SECRET_SERVER_KEY", "The key is not valid.")
HEALTHY = "select healthy, verdict from users_sync_worker.status"
SOMEBODY_WRITES = "update users_sync_worker.lease set writes = writes + 1"
SOMEBODY_TAKES = """
update users_sync_worker.lease
set epoch = epoch + 1, holder = 'somebody', expires_at = clock_timestamp() + interval '1 hour'
"""
SOMEBODY_ENDS = "update users_sync_worker.lease set expires_at = clock_timestamp()"


Logs = list[MutableMapping[str, Any]]


@pytest.fixture
def logs() -> Iterator[Logs]:
    """Return what is logged, as it comes."""
    with capture_logs() as logs:
        yield logs


@pytest.fixture
def world(database_url: str, connection: psycopg.Connection) -> Iterator[ServiceWorld]:
    with opened_service_world(database_url, connection) as world:
        yield world


# New, changed and deleted users


def test_sign_up_and_deletion_reach_the_table(world: ServiceWorld) -> None:
    ids = world.project.populate(30)
    worker = world.at_work()
    created = world.project.create()
    until("the new user has a row", lambda: created in world.live())
    world.project.delete(ids[0])
    until("the deleted user is marked", lambda: ids[0] not in world.live())
    assert worker.not_ready == ()
    worker.stop()


def test_project_without_users_is_served(world: ServiceWorld) -> None:
    worker = world.at_work()
    created = world.project.create()
    until("the first user has a row", lambda: created in world.live())
    worker.stop()


def test_small_project_is_swept_whole_by_each_poll(world: ServiceWorld) -> None:
    ids = world.project.populate(5)
    worker = world.at_work(sweep_seconds=3600)
    world.project.delete(ids[0])
    until("the deleted user is marked", lambda: ids[0] not in world.live())
    polls = len(world.lists())
    until("it polls", lambda: len(world.lists()) > polls + 10)
    worker.stop()
    # The poll that changed something is recorded as a sweep, the others are not; the stop may have
    # come in the middle of one.
    recorded = [sweep for sweep in world.query(SWEEPS) if sweep != ("poll", "stopped")]
    assert recorded == [("sweep", "complete"), ("poll", "complete")]


def test_unchanged_small_project_costs_no_statement(world: ServiceWorld) -> None:
    world.project.populate(5)
    worker = world.at_work(sweep_seconds=3600)
    until("the mirror is saved", lambda: world.query("select 1 from users_sync_worker.snapshot"))
    before = world.lease("writes")
    polls = len(world.lists())
    until("it polls", lambda: len(world.lists()) > polls + 10)
    assert world.lease("writes") == before
    worker.stop()


def test_audit_finds_what_somebody_did_to_the_table(world: ServiceWorld) -> None:
    ids = world.project.populate(30)
    worker = world.at_work(audit_hours=0.2 / 3600)
    world.query("update neon_auth.users_sync set deleted_at = now() where id = %s", ids[3])
    until("the row is live again", lambda: ids[3] in world.live())
    until("the audit ends", lambda: worker.sweeps("audit"))
    worker.stop()


# Stopping


def test_stop_saves_what_was_learnt_since_the_snapshot(world: ServiceWorld) -> None:
    seal = "select seal from users_sync_worker.snapshot"
    world.project.populate(30)
    worker = world.at_work(sweep_seconds=0.2)
    until("the mirror is saved", lambda: world.query(seal))
    before = world.query(seal)
    world.project.create()
    until("the user is there", lambda: world.live() == set(world.project.ids()))
    assert world.query(seal) == before
    worker.stop()
    assert world.query(seal) != before


def test_stop_gives_the_lease_back_and_saves_how_far_it_was(world: ServiceWorld) -> None:
    world.project.populate(50)
    behind, go_on = Event(), Event()
    pages: list[Request] = []

    def wait(request: Request) -> None:
        if request.query.get("desc") == "false":
            pages.append(request)
            if len(pages) == 4:
                behind.set()
                go_on.wait(10)

    world.api.on_request(wait)
    worker = world.start(page_size=10)
    until("the fourth page is asked for", behind.is_set)
    until("the third is applied", lambda: len(world.live()) >= 28)
    worker.stop()
    go_on.set()
    assert (world.lease("holder"), world.lease("expires_at < now()")) == (None, True)
    assert world.query("select outcome from users_sync_worker.sweep") == [("stopped",)]
    first = len(pages)
    world.api.on_request(pages.append)
    again = world.at_work(page_size=10)
    again.stop()
    resumed = next(r for r in pages[first:] if r.query.get("desc") == "false")
    assert resumed.query.get("cursor") is not None
    assert ("sweep", "complete") in world.query(SWEEPS)


@pytest.mark.parametrize("side", ["API", "database"])
def test_stop_ends_a_retry_pause(world: ServiceWorld, side: str) -> None:
    if side == "API":
        world.api.on_request(lambda _: server_error())
    else:
        world.url = make_conninfo(world.url, host="127.0.0.1", hostaddr="", port=1)
    worker = world.start()
    until("it is in trouble", lambda: worker.service.health.read().trouble)
    worker.stop()


# One writer


def test_lost_lease_is_waited_for_and_taken_again(world: ServiceWorld, logs: Logs) -> None:
    world.project.populate(30)
    worker = world.at_work()
    world.query(SOMEBODY_TAKES)
    until("it stands by", lambda: worker.state == "standing by")
    assert worker.not_ready == ()
    assert not worker.service.health.read().lease_held
    created = world.project.create()
    asked = len(world.lists())
    assert created not in world.live()
    world.query(SOMEBODY_ENDS)
    until("the new user has a row", lambda: created in world.live())
    assert len(world.lists()) > asked
    until("it works", lambda: worker.state == "working")
    assert events(logs).count("lease.lost") == 1
    worker.stop()


def test_worker_whose_jobs_are_stuck_is_found_out_and_replaced(
    world: ServiceWorld, logs: Logs
) -> None:
    world.project.populate(30)
    stuck, other = world.at_work(), world.start()
    until("the other stands by", lambda: other.state == "standing by")
    health = stuck.service.health
    with stuck.service.cache.lock:
        health.longest_step_seconds = 0.5
        until("it is found out", lambda: health.not_alive)
        created = world.project.create()
        until("the other takes over", lambda: created in world.live())
        until("it is told", lambda: "worker.stalled" in events(logs))
    until("it stands by", lambda: stuck.state == "standing by")
    until("it is alive", lambda: not health.not_alive)
    assert other.state == "working"
    other.stop()
    stuck.stop()


def test_worker_with_nothing_to_do_is_no_standstill(world: ServiceWorld) -> None:
    worker = world.at_work(poll_seconds=3600, sweep_seconds=3600)
    health = worker.service.health
    health.longest_step_seconds = 3
    until("it idles", lambda: (health.read().seconds_since_poll or 0) > 4)
    assert health.not_alive == ()
    worker.stop()


def test_outage_is_no_standstill(world: ServiceWorld) -> None:
    worker = world.at_work()
    health = worker.service.health
    health.longest_step_seconds = 4
    world.api.on_request(lambda _: server_error())
    until("it lasts", lambda: (health.read().trouble_seconds or 0) > 5)
    assert health.not_alive == ()
    worker.stop()


def test_second_worker_stands_by_and_takes_over_at_once_after_a_stop(world: ServiceWorld) -> None:
    world.project.populate(30)
    first = world.at_work(lease_seconds=3600)
    second = world.start(lease_seconds=3600)
    until("the second stands by", lambda: second.state == "standing by")
    first.stop()
    created = world.project.create()
    until("the new user has a row", lambda: created in world.live())
    second.stop()


def test_mirror_is_loaded_anew_when_somebody_else_writes(world: ServiceWorld, logs: Logs) -> None:
    ids = world.project.populate(30)
    worker = world.at_work()
    generation = worker.service.cache.generation
    world.query("delete from neon_auth.users_sync where id = %s", ids[4])
    world.query(SOMEBODY_WRITES)
    created = world.project.create()
    until("everybody is there", lambda: {ids[4], created} <= world.live())
    assert worker.service.cache.generation > generation
    assert worker.state == "working"
    worker.stop()
    assert "trouble.began" not in events(logs)


def test_transaction_in_the_way_of_a_takeover_is_ended(
    world: ServiceWorld, database_url: str, logs: Logs
) -> None:
    world.at_work().stop()
    settings, stop = world.settings(), Event()
    claim = LeaseRequest("neon_auth", world.project.project_id, "successor", 0.2)
    with (
        psycopg.connect(database_url) as lost,
        opened_database(settings, database_url, Clock(), stop) as database,
    ):
        lost.execute(SOMEBODY_TAKES.encode())
        assert Lease(database, claim).acquire()
        with pytest.raises(psycopg.OperationalError):
            lost.execute("select")
    assert "backend.ended" in events(logs)
    assert world.lease("holder") == "successor"


# Quiet mode


def test_quiet_worker_leaves_the_database_alone_until_something_changes(
    world: ServiceWorld,
) -> None:
    world.project.populate(30)
    worker = world.at_work(quiet=True)
    until("it is quiet", lambda: world.connections() == 0)
    epoch, writes = world.lease("epoch"), world.lease("writes")
    polls, sweeps = world.polls(), worker.sweeps()
    seen = 0
    while world.polls() < polls + 10 or worker.sweeps() < sweeps + 2:
        seen = max(seen, world.connections())
    assert (seen, world.lease("epoch"), world.lease("writes")) == (0, epoch, writes)
    created = world.project.create()
    until("the new user has a row", lambda: created in world.live())
    until("it is quiet again", lambda: world.connections() == 0)
    assert (world.lease("epoch"), world.lease("holder")) == (epoch + 1, None)
    assert worker.not_ready == ()
    worker.stop()


def test_quiet_worker_writes_no_checkpoint_in_a_long_sweep_without_changes(
    world: ServiceWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.project.populate(30)
    worker = world.at_work(quiet=True)
    until("it is quiet", lambda: world.connections() == 0)
    # As if each page took so long.
    monkeypatch.setattr(walk, "CHECKPOINT_SECONDS", 0.0)
    writes, sweeps = world.lease("writes"), worker.sweeps()
    until("it has swept", lambda: worker.sweeps() > sweeps + 2)
    assert world.lease("writes") == writes
    worker.stop()


def test_two_quiet_workers_stay_right(world: ServiceWorld) -> None:
    ids = world.project.populate(30)
    workers = [world.at_work(quiet=True), world.start(quiet=True)]
    until("both work", lambda: [one.state for one in workers] == ["quiet", "quiet"])
    for number in range(5):
        world.project.delete(ids[number])
        world.project.edit(ids[-1 - number], display_name=f"Name {number}")
        world.project.create()
        until("the table is right", lambda: world.live() == set(world.project.ids()))
    names = "select count(*) from neon_auth.users_sync where name like 'Name _'"
    until("the names are right", lambda: world.query(names) == [(5,)])
    for worker in workers:
        worker.stop()


# Outages and mistakes


def test_outage_of_the_api_is_told_once_and_outlived(world: ServiceWorld, logs: Logs) -> None:
    world.project.populate(30)
    worker = world.at_work()
    world.api.on_request(lambda _: server_error())
    until("it is in trouble", lambda: worker.service.health.read().trouble)
    asked = len(world.lists())
    until("it tries again", lambda: len(world.lists()) > asked + 4)
    world.api.on_request(None)
    created = world.project.create()
    until("the new user has a row", lambda: created in world.live())
    until("the trouble is over", lambda: worker.service.health.read().trouble is None)
    worker.stop()
    told = [event for event in events(logs) if event.startswith("trouble.")]
    assert told == ["trouble.began", "trouble.ended"]


def test_first_sweep_after_an_outage_begins_at_once(world: ServiceWorld) -> None:
    ids = world.project.populate(30)
    worker = world.at_work(sweep_seconds=3600)
    world.api.on_request(lambda _: server_error())
    asked = len(world.lists())
    until("it has tried three times", lambda: len(world.lists()) > asked + 3)
    world.project.delete(ids[0])
    world.api.on_request(None)
    until("the deleted user is marked", lambda: ids[0] not in world.live())
    worker.stop()


def test_outage_of_the_database_is_followed_by_a_sweep(
    world: ServiceWorld, postgres_url: str
) -> None:
    ids = world.project.populate(30)
    worker = world.at_work(sweep_seconds=3600)
    name = world.conn.info.dbname
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(f"alter database {name} allow_connections false".encode())
        world.query(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        failures = 'users_sync_retries_total{service="the database"}'
        until("it tries again", lambda: metric(worker, failures) >= 2)
        server.execute(f"alter database {name} allow_connections true".encode())
    world.project.delete(ids[0])
    until("the deleted user is marked", lambda: ids[0] not in world.live())
    worker.stop()


@pytest.mark.parametrize("quiet", [False, True])
def test_sweeps_that_fail_make_it_unready_and_unhealthy_until_one_is_complete(
    world: ServiceWorld, *, quiet: bool
) -> None:
    world.project.populate(30)
    worker = world.at_work(quiet=quiet)

    def refuse_sweeps(request: Request) -> Reply | None:
        return REFUSED if request.query.get("desc") == "false" else None

    world.api.on_request(refuse_sweeps)
    until("sweeps fail", lambda: any("sweeps failed" in reason for reason in worker.not_ready))
    [(healthy, verdict)] = world.query(HEALTHY)
    assert not healthy
    assert "sweeps failed, since" in verdict
    assert "STACK_SECRET_SERVER_KEY" in verdict
    world.api.on_request(None)
    until("it is ready", lambda: worker.not_ready == ())
    assert world.query(HEALTHY) == [(True, "healthy")]
    worker.stop()


def test_killed_connections_are_outlived(world: ServiceWorld) -> None:
    world.project.populate(30)
    worker = world.at_work()
    for _ in range(5):
        until("it is connected", lambda: world.connections() > 0)
        world.query(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        created = world.project.create()
        until("the new user has a row", lambda: created in world.live())  # noqa: B023
    assert worker.state == "working"
    worker.stop()


def test_database_that_takes_no_connections_for_a_while_is_outlived(
    world: ServiceWorld, postgres_url: str
) -> None:
    world.project.populate(30)
    worker = world.at_work()
    name = world.conn.info.dbname
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(f"alter database {name} allow_connections false".encode())
        world.query(
            "select pg_terminate_backend(pid) from pg_stat_activity"
            " where datname = current_database() and pid <> pg_backend_pid()"
        )
        created = world.project.create()
        until("it is in trouble", lambda: worker.service.health.read().trouble)
        assert not worker.service.health.read().trouble_is_fatal
        server.execute(f"alter database {name} allow_connections true".encode())
    until("the new user has a row", lambda: created in world.live())
    worker.stop()


def test_key_that_is_revoked_at_run_time_keeps_it_alive_but_not_ready(
    world: ServiceWorld, logs: Logs
) -> None:
    world.project.populate(30)
    worker = world.at_work()
    key, world.project.secret_server_key = world.project.secret_server_key, "ssk_another"
    until("it is not ready", lambda: worker.not_ready)
    assert worker.thread.is_alive()
    world.project.secret_server_key = key
    until("it is ready", lambda: worker.not_ready == ())
    created = world.project.create()
    until("the new user has a row", lambda: created in world.live())
    worker.stop()
    assert events(logs).count("trouble.began") == events(logs).count("trouble.ended") == 1


def test_wrong_key_at_the_start_ends_it(world: ServiceWorld) -> None:
    error = world.start(secret_server_key="ssk_wrong").end()
    assert isinstance(error, Misconfigured)
    assert "STACK_SECRET_SERVER_KEY" in str(error)


def test_table_of_another_project_ends_it(world: ServiceWorld) -> None:
    world.project.populate(3)
    world.at_work().stop()
    error = world.start(project_id="22222222-2222-4222-8222-222222222222").end()
    assert isinstance(error, Misconfigured)
    assert world.project.project_id in str(error)


def test_table_that_cannot_be_used_ends_it(world: ServiceWorld) -> None:
    world.query("create schema neon_auth create table users_sync (id integer primary key)")
    assert isinstance(world.start().end(), Misconfigured)
    assert world.api.requests == []


def test_error_that_nobody_expected_is_told_and_outlived(world: ServiceWorld, logs: Logs) -> None:
    world.project.populate(30)
    worker = world.at_work()

    def stumble(_: object) -> None:
        raise ZeroDivisionError

    worker.service.cache.on_inserted = stumble
    created = world.project.create()
    until("it is in trouble", lambda: worker.service.health.read().trouble)
    worker.service.cache.on_inserted = lambda _: None
    until("the trouble is over", lambda: worker.service.health.read().trouble is None)
    assert created in world.live()
    worker.stop()
    assert "job.failed" in events(logs)


# What it says of itself


def test_worker_is_ready_after_its_first_sweep(world: ServiceWorld) -> None:
    world.project.populate(30)
    go_on = Event()

    def wait(request: Request) -> None:
        if request.query.get("desc") == "false":
            go_on.wait(10)

    world.api.on_request(wait)
    worker = world.start()
    until("it works", lambda: worker.state == "working")
    assert worker.not_ready == ("no sweep was completed yet",)
    go_on.set()
    until("it is ready", lambda: worker.not_ready == ())
    worker.stop()


def test_held_deletions_are_told_once_and_make_it_unready(world: ServiceWorld, logs: Logs) -> None:
    ids = world.project.populate(40)
    worker = world.at_work(max_fraction=0.2, poll_page_size=100)
    for user_id in ids[:20]:
        world.project.delete(user_id)
    until("deletions are held", lambda: worker.not_ready)
    assert worker.not_ready == ("20 deletions are held: users-sync deletions",)
    polls = len(world.lists())
    until("it polls", lambda: len(world.lists()) > polls + 10)
    assert world.live() == set(ids)
    worker.stop()
    assert events(logs).count("deletions.held") == 1


def test_requests_are_counted_by_their_status(world: ServiceWorld) -> None:
    world.project.populate(30)
    world.api.fail_next(server_error())
    worker = world.at_work()
    text = metrics(worker)
    assert 'users_sync_api_requests_total{status="500"} 1.0' in text
    assert 'users_sync_api_requests_total{status="200"}' in text
    assert 'users_sync_retries_total{service="Stack Auth"} 1.0' in text
    worker.stop()


def test_sign_up_to_row_is_measured_for_new_users_only(world: ServiceWorld) -> None:
    world.project.populate(30)
    worker = world.at_work()
    assert "users_sync_signup_to_row_seconds_count 0.0" in metrics(worker)
    created = world.project.create()
    until("the new user has a row", lambda: created in world.live())
    count = "users_sync_signup_to_row_seconds_count 1.0"
    until("it is measured", lambda: count in metrics(worker))
    worker.stop()


def events(logs: Logs) -> list[str]:
    """Give the events that were logged, in order."""
    return [str(line["event"]) for line in logs]


def metric(worker: Worker, name: str) -> float:
    """Give the value of one series."""
    found = re.search(rf"^{re.escape(name)} (.+)$", metrics(worker), re.MULTILINE)
    return float(found[1]) if found else 0.0


def metrics(worker: Worker) -> str:
    return worker.service.metrics.render()[0].decode()


# Commands beside it


@pytest.mark.parametrize("quiet", [False, True])
def test_worker_looks_again_at_what_a_command_touched_and_at_nothing_else(
    world: ServiceWorld, logs: Logs, *, quiet: bool
) -> None:
    ids = world.project.populate(60)
    # No poll and no sweep comes between that would find the changes by itself.
    worker = world.at_work(poll_seconds=3600, sweep_seconds=3600, quiet=quiet)
    if quiet:
        until("it rests", lambda: world.connections() == 0)
    created = world.project.create()
    world.project.edit(ids[0], display_name="Changed")
    world.project.delete(ids[1])
    with opened_session(world.settings(), world.url, Event()) as session:
        became = [session.sync(user_id).became for user_id in (created, ids[0], ids[1], ids[2])]
    assert became == ["inserted", "updated", "deleted", "unchanged"]
    cache, generation = worker.service.cache, worker.service.cache.generation
    if quiet:
        with pytest.raises(MirrorOutdated):
            worker.service._store.write([], 1)  # noqa: SLF001
        cache.reload(worker.service._store, generation)  # noqa: SLF001
    until("the worker notices", lambda: cache.generation > generation)
    assert events(logs).count("mirror.amended") == 1
    assert "mirror.discarded" not in events(logs)
    live = {user_id for _, user_id in cache.mirror.keys()}  # noqa: SIM118  it is no dict
    assert live == world.live() == set(world.project.ids())
    worker.stop()


def test_worker_and_commands_keep_out_of_each_others_way(world: ServiceWorld) -> None:
    ids = world.project.populate(40)
    worker = world.at_work()
    with opened_session(world.settings(), world.url, Event()) as session:
        for number in range(15):
            world.project.edit(ids[number], display_name=f"Name {number}")
            assert session.sync(ids[number]).became in {"updated", "unchanged"}
            session.sync(world.project.create())
            world.project.delete(ids[-1 - number])
            assert session.sync(ids[-1 - number]).became in {"deleted", "deleted before"}
    until("the table is right", lambda: world.live() == set(world.project.ids()))
    sweeps = worker.sweeps()
    until("it sweeps in peace", lambda: worker.sweeps() > sweeps + 1)
    assert world.live() == set(world.project.ids())
    assert world.query("select * from users_sync_worker.deletion") == []
    worker.stop()
