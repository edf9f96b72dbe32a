"""Visits keep many projects in step, each by itself."""

import time
from threading import Event, Thread

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.support.fleet_world import FleetWorld
from tests.support.waiting import until
from worker.fleet.projects import Secrets, resolved
from worker.fleet.site import SITE_BYTES
from worker.sandbox.api import Reply, Request, server_error
from worker.service.supervisor import Supervisor

CONNECTIONS = """
select count(*) from pg_stat_activity where datname = %s and application_name = 'users-sync'
"""


def test_three_projects_come_into_step_and_stay_so(fleet: FleetWorld) -> None:
    members = [fleet.add(name, users) for name, users in (("a", 3), ("b", 250), ("none", 0))]
    with fleet.at_work():
        until("all are in step", lambda: all(each.in_step for each in members))
        a, b, none = (each.project for each in members)
        a.create(display_name="new")
        b.delete(b.ids()[7])
        b.edit(b.ids()[100], display_name="changed")
        none.create()
        until("all are in step again", lambda: all(each.in_step for each in members))
        until("all are fresh", lambda: set(fleet.states().values()) == {"fresh"})
    rows = {row["name"]: row["users"] for row in fleet.control.status()}
    assert rows == {"a": 4, "b": 249, "none": 1}
    assert fleet.query("select visitor from users_sync_fleet.visit where visitor is not null") == []


def test_project_that_fails_backs_off_alone(fleet: FleetWorld) -> None:
    well = fleet.add("well", 2)
    revoked, broken, _, held = (
        fleet.add(name, 20) for name in ("revoked", "broken", "away", "held")
    )
    (fleet.folder / "revoked.key").write_text("ssk_revoked")
    broken.api.on_request(lambda _request: server_error())
    (fleet.folder / "away.url").write_text("postgresql://127.0.0.1:1/none")
    states = {
        "well": "fresh",
        "revoked": "needs a person",
        "broken": "failing",
        "away": "failing",
        "held": "held",
    }
    with fleet.at_work():
        until("held is in step", lambda: held.in_step)
        for user_id in held.project.ids()[:15]:
            held.project.delete(user_id)
        until("each is as it is", lambda: fleet.states() == states, look_seconds=0.2)
        until("it is tried again", lambda: failures(fleet, "revoked") >= 2, look_seconds=0.2)
        well.project.create()
        until("the others go on", lambda: well.in_step)
        waits = {row["name"]: row["waits_for_a_person"] for row in fleet.control.status()}
        assert waits["held"] == "held deletions: 15 (users-sync deletions --project held)"
        assert "secret_ref file:revoked.key of revoked" in waits["revoked"]
        errors = {row["name"]: row["error"] for row in fleet.control.status()}
        assert "127.0.0.1" in errors["away"]
        # What was wrong is put right, and nobody has to restart anything.
        key = revoked.project.secret_server_key
        (fleet.folder / "revoked.key").write_text(key)
        broken.api.on_request(None)
        fleet.query("update procrastinate_jobs set scheduled_at = now() where status = 'todo'")
        until("they are well again", lambda: revoked.in_step and broken.in_step)


def failures(fleet: FleetWorld, name: str) -> int:
    [row] = fleet.control.status(name)
    return int(row["failures"])


def test_projects_are_added_changed_paused_and_removed_at_work(fleet: FleetWorld) -> None:
    a = fleet.add("a", 2)
    with fleet.at_work():
        until("a is in step", lambda: a.in_step)
        fleet.control.enable(["a"], enabled=False)
        until("a is paused", lambda: fleet.states() == {"a": "paused"})
        until("no visit waits", lambda: jobs(fleet) == 0, look_seconds=0.1)
        a.project.create()
        b = fleet.add("b", 2)
        until("b is in step", lambda: b.in_step)
        assert not a.in_step
        fleet.control.enable(["a"], enabled=True)
        until("a is in step again", lambda: a.in_step)
        b.schema = "elsewhere"
        fleet.control.add(fleet.row("b"), replace=True)
        until("b is in step in its new place", lambda: b.in_step)
        fleet.control.remove(["a", "b"])
        until("no visit waits", lambda: jobs(fleet) == 0, look_seconds=0.1)
    assert fleet.control.status() == []


def test_project_is_visited_at_once_when_it_was_added_put_right_or_resumed(
    fleet: FleetWorld,
) -> None:
    a = fleet.add("a", 2)
    (fleet.folder / "a.key").write_text("ssk_revoked")
    with fleet.at_work() as worker:
        # Nobody looks for missing visits, and whoever fails waits for long.
        fleet.query("update users_sync_fleet.roster set ran_at = 'infinity'")
        until("a is visited", lambda: fleet.states()["a"] == "needs a person")
        fleet.query("update procrastinate_jobs set scheduled_at = now() + interval '1 hour'")
        (fleet.folder / "a.key").write_text(a.project.secret_server_key)
        fleet.control.add(fleet.row("a"), replace=True)
        until("a is in step", lambda: a.in_step)
        fleet.control.enable(["a"], enabled=False)
        until("no visit waits", lambda: jobs(fleet) == 0, look_seconds=0.1)
        a.project.create()
        fleet.control.enable(["a"], enabled=True)
        until("a is in step again", lambda: a.in_step)
        b = fleet.add("b", 2)
        until("b is in step", lambda: b.in_step)
        assert worker.telemetry.workers == 1


def jobs(fleet: FleetWorld) -> int:
    return int(fleet.value("select count(*) from procrastinate_jobs"))


def test_long_first_load_is_cut_into_visits_and_others_come_between(fleet: FleetWorld) -> None:
    long = fleet.add("long", 450, stack={"page_size": 30})
    short = fleet.add("short", 1)

    def slowly(request: Request) -> Reply | None:
        if request.query.get("desc") == "false":
            time.sleep(0.2)
        return None

    long.api.on_request(slowly)
    with fleet.at_work(visits=1, visit_seconds=1) as worker:
        until("the short one is in step", lambda: short.in_step)
        assert not long.in_step
        until("the long one is fresh", lambda: fleet.states()["long"] == "fresh")
    pages = [r.query.get("cursor") for r in long.api.requests if r.query.get("desc") == "false"]
    assert pages.count(None) <= 2
    with psycopg.connect(long.url) as conn:
        outcomes = conn.execute(
            "select outcome from users_sync_worker.sweep where target = %s order by number",
            (long.schema,),
        ).fetchall()
    # One sweep, in several visits.
    assert outcomes == [("complete",)]
    assert worker.telemetry.ended["cut"] >= 2


def test_sweep_from_the_middle_that_takes_longer_than_a_visit_comes_to_its_end(
    fleet: FleetWorld,
) -> None:
    a = fleet.add("a", 600, stack={"page_size": 30})
    with fleet.at_work(visit_seconds=1) as worker:
        until("a is fresh", lambda: fleet.states() == {"a": "fresh"})

        def slowly(request: Request) -> Reply | None:
            if "limit" in request.query:
                time.sleep(0.2)
            return None

        a.api.on_request(slowly)
        until("a sweep was cut on its way down", lambda: worker.telemetry.ended.get("cut", 0) > 0)
        # Only a sweep that reads the whole list finds out who is gone.
        a.project.delete(a.project.ids()[0])
        until("a is in step", lambda: a.in_step)


def test_proofs_of_deletions_that_take_longer_than_a_visit_come_to_their_end(
    fleet: FleetWorld,
) -> None:
    a = fleet.add("a", 300)
    with fleet.at_work(visit_seconds=1) as worker:
        until("a is fresh", lambda: fleet.states() == {"a": "fresh"})

        def slowly(request: Request) -> Reply | None:
            if request.path.startswith("/api/v1/users/"):
                time.sleep(0.1)
            return None

        a.api.on_request(slowly)
        for user_id in a.project.ids()[:20]:
            a.project.delete(user_id)
        until("a is in step", lambda: a.in_step)
        assert worker.telemetry.ended.get("cut", 0) == 0


def test_mirrors_used_longest_ago_go_when_memory_is_short(fleet: FleetWorld) -> None:
    members = [fleet.add(f"p{number}", 1) for number in range(4)]
    with fleet.at_work() as worker:
        worker.sites.most_bytes = 2 * SITE_BYTES + 1000
        until("all are in step", lambda: all(each.in_step for each in members))
        for each in members:
            each.project.create()
        until("all are in step again", lambda: all(each.in_step for each in members))
        until("some are out of memory", lambda: len(worker.sites) <= 3)
    assert worker.sites.bytes == sum(each.bytes for each in worker.sites)


def test_idle_project_has_no_connection_and_takes_no_statement(fleet: FleetWorld) -> None:
    fleet.add("a", 2)
    name = conninfo_to_dict(fleet.target_urls[0])["dbname"]
    with fleet.at_work() as worker:
        until("a is fresh", lambda: fleet.states() == {"a": "fresh"})
        done = worker.telemetry.ended["done"]
        until("it is visited again", lambda: worker.telemetry.ended["done"] > done + 2)
        seen = []
        for _ in range(20):
            seen.append(fleet.value(CONNECTIONS, name))
            time.sleep(0.05)
    assert seen == [0] * 20


def test_project_of_a_single_worker_is_written_by_one_of_them(fleet: FleetWorld) -> None:
    a = fleet.add("a", 5)
    own = resolved(fleet.row("a"), Secrets(fleet.folder))
    schedule = own.schedule.model_copy(update={"poll_seconds": 0.05, "sweep_seconds": 0.2})
    database = own.database.model_copy(update={"quiet": False, "lease_seconds": 3})
    http = own.http.model_copy(update={"port": 0})
    alone = own.model_copy(update={"schedule": schedule, "database": database, "http": http})
    single = Supervisor(alone, a.url, Event())
    thread = Thread(target=single.run)
    thread.start()
    try:
        until("a is in step", lambda: a.in_step)
        with fleet.at_work():
            until("the fleet stands by", lambda: fleet.states() == {"a": "standing by"})
            a.project.create()
            a.project.delete(a.project.ids()[0])
            until("a is in step again", lambda: a.in_step)
            single.stop.set()
            thread.join(20)
            a.project.create()
            fleet.query("update procrastinate_jobs set scheduled_at = now() where status = 'todo'")
            until("the fleet took over", lambda: a.in_step)
    finally:
        single.stop.set()
        thread.join(20)


def test_fleet_and_its_projects_behind_pgbouncer(fleet: FleetWorld, pgbouncer_url: str) -> None:
    name = conninfo_to_dict(fleet.target_urls[0])["dbname"]
    fleet.target_urls[0] = make_conninfo(pgbouncer_url, dbname=name)
    a = fleet.add("a", 3)
    with fleet.at_work(url=pgbouncer_url):
        until("a is in step", lambda: a.in_step)
        a.project.create()
        a.project.delete(a.project.ids()[0])
        until("a is in step again", lambda: a.in_step)


def test_visits_go_on_by_themselves_after_the_control_database_was_away(
    fleet: FleetWorld,
) -> None:
    a = fleet.add("a", 3)
    name = str(conninfo_to_dict(fleet.control_url)["dbname"])
    admin = fleet.target_urls[0]
    with fleet.at_work() as worker:
        until("a is in step", lambda: a.in_step)
        with psycopg.connect(admin, autocommit=True) as conn:
            conn.execute(allow_connections(name, allowed=False))
            conn.execute(
                "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,)
            )
            time.sleep(2)
            assert worker.telemetry.seconds_since_control > 1
            conn.execute(allow_connections(name, allowed=True))
        a.project.create()
        until("a is in step again", lambda: a.in_step)


def allow_connections(name: str, *, allowed: bool) -> sql.Composed:
    return sql.SQL("alter database {} allow_connections {}").format(
        sql.Identifier(name), sql.Literal(allowed)
    )
