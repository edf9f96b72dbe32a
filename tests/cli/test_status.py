"""How the worker is doing, as the command and the view tell it."""

import json
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest
from psycopg import sql

from tests.support.sweep_world import World, before_page, sign_up
from worker.cli.status import Status, as_json, lines, read_status, sweep_rows
from worker.errors import Misconfigured, SourceUnavailable
from worker.sandbox.api import server_error

VIEW = "select healthy, verdict from users_sync_worker.status"


@pytest.fixture
def swept(quick_world: World) -> World:
    quick_world.project.populate(12)
    quick_world.sweep()
    return quick_world


def status(world: World, longest_age: timedelta | None = None) -> Status:
    return read_status(world.conn, "neon_auth", longest_age)


def age_by(world: World, age: str) -> None:
    """Let the last sweep have ended so long ago."""
    world.query(
        "update users_sync_worker.sweep set started = now() - %s::interval,"
        " finished = now() - %s::interval",
        age,
        age,
    )


def lease(world: World, **columns: Any) -> None:
    for name, value in columns.items():
        query = sql.SQL("update users_sync_worker.lease set {} = %s")
        world.conn.execute(query.format(sql.Identifier(name)), (value,))


def verdict(world: World) -> str:
    """Tell what command and view say; they must agree."""
    found = status(world)
    assert world.query(VIEW) == [(found.healthy, found.facts["verdict"])]
    assert found.healthy == (found.facts["verdict"] == "healthy")
    return str(found.facts["verdict"])


def test_table_that_was_just_swept_is_healthy(swept: World) -> None:
    assert verdict(swept) == "healthy"
    facts = status(swept).facts
    assert (facts["users_live"], facts["users_deleted"], facts["at_work"]) == (12, 0, False)


def test_last_sweep_may_be_five_minutes_old(swept: World) -> None:
    age_by(swept, "4 min 50 s")
    assert verdict(swept) == "healthy"
    age_by(swept, "5 min 2 s")
    assert verdict(swept) == ("the last complete sweep ended 00:05:02 ago (longer than 00:05:00)")


@pytest.mark.parametrize(
    ("seconds", "share", "duration", "limit"),
    [(600, 0.25, 0, 1800), (60, 0.25, 100, 1200), (60, 1.0, 100, 480)],
)
def test_schedule_of_the_worker_says_what_is_too_old(
    swept: World, seconds: float, share: float, duration: int, limit: int
) -> None:
    """Three times the pause and the API's work, which takes at most a share of the time."""
    lease(swept, sweep_seconds=seconds, sweep_share=share)
    for age, healthy in ((limit - 5, True), (limit + 5, False)):
        swept.query(
            "update users_sync_worker.sweep set finished = now() - make_interval(secs => %s),"
            " started = now() - interval '2 h', api_seconds = %s",
            age,
            duration,
        )
        assert status(swept).healthy is healthy


def test_sweeps_schedule_is_left_in_the_lease(swept: World) -> None:
    assert swept.query("select sweep_seconds, sweep_share from users_sync_worker.lease") == [
        (60.0, 0.25)
    ]


def test_in_quiet_mode_age_is_not_judged(swept: World) -> None:
    lease(swept, quiet=True)
    age_by(swept, "5 days")
    assert verdict(swept) == "healthy"
    swept.query("delete from users_sync_worker.sweep")
    assert verdict(swept) == "healthy"


def test_cron_says_how_old_the_last_sweep_may_be(swept: World) -> None:
    age_by(swept, "50 min")
    assert status(swept, timedelta(hours=1)).healthy
    judged = status(swept, timedelta(minutes=40))
    assert judged.facts["verdict"].startswith("the last complete sweep ended 0:50:00 ago")
    lease(swept, quiet=True)
    assert not status(swept, timedelta(minutes=40)).healthy


def test_without_a_complete_sweep_it_is_not_healthy(swept: World) -> None:
    swept.query("update users_sync_worker.sweep set outcome = 'incomplete'")
    assert verdict(swept) == "no sweep was completed yet"
    assert status(swept, timedelta(hours=1)).facts["verdict"] == "no sweep was completed yet"


def fail(world: World, number: int, outcome: str, error: str, failures: int = 1) -> None:
    """Record a sweep that did not come to its end."""
    world.query(
        "insert into users_sync_worker.sweep select target, %s, kind, started,"
        " clock_timestamp(), %s, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, %s, 0, 0, %s"
        " from users_sync_worker.sweep where number = 1",
        number,
        outcome,
        error,
        failures,
    )


def test_failed_sweeps_tell_their_reason_and_two_are_not_healthy(swept: World) -> None:
    assert not any(line.startswith("last error") for line in lines(status(swept)))
    fail(swept, 2, "incomplete", "the list has no end")
    assert verdict(swept) == "healthy"
    assert "last error  the list has no end (failed once, first 0:00:00 ago)" in lines(
        status(swept)
    )
    fail(swept, 3, "failed", "Stack Auth answers 500")
    found = status(swept)
    assert verdict(swept) == (
        f"the last 2 sweeps failed, since {local(swept, found.facts['failing_since'])}:"
        " Stack Auth answers 500"
    )
    assert not status(swept, timedelta(hours=1)).healthy
    assert (found.facts["failures"], found.facts["last_error"]) == (2, "Stack Auth answers 500")
    lease(swept, quiet=True)
    assert not status(swept).healthy


def local(world: World, moment: datetime) -> str:
    """Write a moment as the database does."""
    [(text,)] = world.query("select date_trunc('second', %s)::text", moment)
    return str(text)


def test_sweep_that_fails_again_under_its_number_has_failed_twice(quick_world: World) -> None:
    first, *_ = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    quick_world.project.edit(first, display_name="Changed")  # so that there is a checkpoint
    for _ in range(2):
        quick_world.api.on_request(lambda r: server_error() if r.query.get("cursor") else None)
        with pytest.raises(SourceUnavailable):
            quick_world.sweep(retry_minutes=0)
    found = status(quick_world)
    assert (found.facts["failures"], found.healthy) == (2, False)
    assert [sweep["number"] for sweep in found.sweeps] == [2, 1]
    quick_world.api.on_request(None)
    quick_world.sweep()
    assert verdict(quick_world) == "healthy"


def test_outage_during_a_sweep_does_not_raise_the_limit(quick_world: World) -> None:
    sign_up(quick_world.project, *range(12))
    outage = replace(server_error(), headers=[("retry-after", "1")])
    quick_world.api.on_request(before_page(2, lambda _: outage))
    report = quick_world.sweep(retry_minutes=5)
    assert report.duration_seconds >= report.api_seconds + 1
    told = quick_world.query("select api_seconds from users_sync_worker.sweep")
    assert told == [(report.api_seconds,)]
    assert status(quick_world).facts["longest_age"] == timedelta(minutes=5)


def test_held_deletions_and_quarantine_wait_for_a_person(swept: World) -> None:
    swept.query(
        "insert into users_sync_worker.deletion values ('neon_auth', 'a', 'held', 1, 1, now())"
    )
    assert verdict(swept) == "1 deletion is held: users-sync deletions"
    swept.query(
        "insert into users_sync_worker.quarantine values"
        " ('neon_auth', 'a', 'a', '', '{{}}', 'odd', true, now(), now(), 1),"
        " ('neon_auth', 'b', 'b', '', '{{}}', 'odd', true, now(), now(), 1)"
    )
    assert verdict(swept) == (
        "1 deletion is held: users-sync deletions;"
        " 2 records are in quarantine: users-sync quarantine"
    )
    lease(swept, quiet=True)
    assert not status(swept, timedelta(hours=1)).healthy


@pytest.mark.parametrize(
    ("quarantined", "has_row"), [(0, "has its row"), (1, "has its row or is in quarantine")]
)
def test_status_says_up_to_when_each_sign_up_has_its_row(
    swept: World, quarantined: int, has_row: str
) -> None:
    found = status(swept)
    assert not any(line.startswith("sign-ups") for line in lines(found))
    polled = {"polled_at": found.now - timedelta(seconds=90), "quarantined": quarantined}
    told = lines(replace(found, facts={**found.facts, **polled}))
    assert f"sign-ups    every sign-up {has_row} up to 0:01:30 ago" in told


def test_holder_and_its_sweep_are_told(swept: World) -> None:
    swept.query(
        "update users_sync_worker.lease set holder = 'host:1:ab',"
        " acquired_at = now() - interval '90 s', expires_at = now() + interval '1 min', sweep = 2;"
        " insert into users_sync_worker.sweep select target, 2, kind, now(), null, null, 0, 0, 0,"
        " 0, 0, 0, 0, 0, 0, 0, 0 from users_sync_worker.sweep"
    )
    found = status(swept)
    assert found.facts["sweeping_since"] is not None
    assert "worker      host:1:ab at work, lease held for 0:01:30" in lines(found)
    assert [sweep["number"] for sweep in found.sweeps] == [2, 1]
    header, rows = sweep_rows(found)
    assert header == [
        "sweep",
        "kind",
        "outcome",
        "started",
        "seconds",
        "pages",
        "users",
        "inserted",
    ]
    assert [row[2] for row in rows] == ["at work", "complete"]


def test_json_holds_all_of_it(swept: World) -> None:
    told = json.loads(json.dumps(as_json(status(swept))))
    assert (told["healthy"], told["users_live"], told["longest_age_seconds"]) == (True, 12, 300)
    assert told["sweeps"][0]["inserted"] == 12


def test_json_holds_a_limit_of_no_time_at_all(swept: World) -> None:
    told = json.loads(json.dumps(as_json(status(swept, timedelta(0)))))
    assert (told["healthy"], told["longest_age_seconds"]) == (False, 0)


def test_nothing_that_was_never_synced_has_a_status(swept: World) -> None:
    with pytest.raises(Misconfigured, match=r"other\.users_sync was never synced"):
        read_status(swept.conn, "other", None)


def test_application_may_read_the_view_without_seeing_users_or_records(
    swept: World, connection: psycopg.Connection, plain_role: str
) -> None:
    role = sql.Identifier(plain_role)
    grant = sql.SQL(
        "grant usage on schema users_sync_worker to {0};"
        "grant select on users_sync_worker.status to {0}"
    )
    swept.conn.execute(grant.format(role))
    try:
        swept.conn.execute(sql.SQL("set role {}").format(role))
        assert swept.query(VIEW) == [(True, "healthy")]
        assert swept.query("select users_live from users_sync_worker.status") == [(None,)]
        with pytest.raises(psycopg.errors.InsufficientPrivilege):
            swept.query("select * from users_sync_worker.quarantine")
    finally:
        swept.conn.execute("reset role")
        swept.conn.execute(sql.SQL("drop owned by {}").format(role))


@pytest.mark.parametrize("gone", ["table neon_auth.users_sync", "schema neon_auth cascade"])
def test_without_a_table_it_is_not_healthy(world: World, gone: str) -> None:
    world.sweep()
    world.query(f"drop {gone}")
    assert world.query("select users_live from users_sync_worker.status") == [(None,)]
    assert verdict(world) == "neon_auth.users_sync does not exist: users-sync init"
    assert "users       cannot be counted" in lines(status(world))
    assert not status(world, timedelta(hours=1)).healthy
    lease(world, quiet=True)
    assert not status(world).healthy


def test_table_that_lacks_a_column_is_not_healthy(world: World) -> None:
    world.sweep()
    world.query("alter table {users_sync} drop column deleted_at")
    assert verdict(world) == "neon_auth.users_sync lacks a column: users-sync check"


def test_role_that_may_not_read_the_table_is_told_so(
    swept: World, connection: psycopg.Connection, plain_role: str
) -> None:
    role = sql.Identifier(plain_role)
    grant = sql.SQL(
        "grant usage on schema users_sync_worker to {0};"
        "grant select on all tables in schema users_sync_worker to {0}"
    )
    swept.conn.execute(grant.format(role))
    try:
        swept.conn.execute(sql.SQL("set role {}").format(role))
        found = status(swept)
    finally:
        swept.conn.execute("reset role")
        swept.conn.execute(sql.SQL("drop owned by {}").format(role))
    assert not found.healthy
    reason = "this role may not read neon_auth.users_sync: users-sync check"
    assert found.facts["verdict"] == reason
    assert "users       cannot be counted" in lines(found)
