"""Workers of the fleet as processes: stopped, and killed, in the middle of their visits."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event

import psycopg
import pytest

from tests.support.fleet_world import FleetWorld
from tests.support.processes import Shell
from tests.support.waiting import until
from worker.sandbox.api import Reply, Request

VISITORS = "select name, visitor from users_sync_fleet.visit where visitor is not null"
JOBS = "select lock, queue_name from procrastinate_jobs where status = 'todo' order by lock"
HOLDER = "select holder from users_sync_worker.lease where target = %s and expires_at > now()"
DOING = "select count(*) from procrastinate_jobs where status = 'doing'"

# As if a worker had fallen silent long ago, and nobody had looked after the roster since.
AGE = """
update procrastinate_workers set last_heartbeat = last_heartbeat - interval '1 min';
update users_sync_fleet.worker set seen_at = seen_at - interval '1 min';
update users_sync_fleet.roster set ran_at = 'epoch'
"""


@pytest.fixture
def shell(fleet: FleetWorld, tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path, fleet.variables())
    yield shell
    for member in fleet.members.values():
        member.api.on_request(None)
    shell.close()


def held_up(fleet: FleetWorld, name: str) -> Event:
    """Let the API of a project keep whoever asks waiting, until the event is set."""
    go_on = Event()

    def wait(_request: Request) -> Reply | None:
        go_on.wait(20)
        return None

    fleet.members[name].api.on_request(wait)
    return go_on


def test_sigterm_in_a_visit_ends_the_worker_within_five_seconds_and_loses_no_visit(
    fleet: FleetWorld, shell: Shell
) -> None:
    a, b = fleet.add("a", 3), fleet.add("b", 3)
    go_on = held_up(fleet, "b")
    worker = shell.start("fleet", "work")
    until("a is in step, and b is being visited", lambda: a.in_step and b.api.requests)
    began = time.monotonic()
    worker.signal(signal.SIGTERM)
    ended = worker.end()
    assert time.monotonic() - began < 5
    assert (ended.code, ended.stderr) == (0, "")
    assert fleet.query(VISITORS) == []
    assert fleet.query(JOBS) == [("a", "visits"), ("b", "visits")]
    assert fleet.query("select name from users_sync_fleet.worker") == []
    go_on.set()
    with fleet.at_work():
        until("b is in step", lambda: b.in_step)


def test_killed_worker_is_replaced_by_another(fleet: FleetWorld, shell: Shell) -> None:
    # Nobody could wait for the lease of the dead to run out.
    a, b = (fleet.add(name, 3, database={"lease_seconds": 3600}) for name in "ab")
    go_on = held_up(fleet, "b")
    worker = shell.start("fleet", "work")
    until("a is in step, and b is being visited", lambda: a.in_step and b.api.requests)
    worker.signal(signal.SIGKILL)
    worker.end()
    assert fleet.value(DOING) >= 1
    [*_, (_, visitor)] = fleet.query(VISITORS)
    with psycopg.connect(b.url) as conn:
        assert conn.execute(HOLDER, (b.schema,)).fetchone() == (visitor,)
    go_on.set()
    a.project.create()
    fleet.query(AGE)
    with fleet.at_work() as other:
        until("both are in step", lambda: a.in_step and b.in_step)
        assert other.name != visitor
        until("the jobs of the dead are gone", lambda: fleet.value(DOING) <= 2)
    assert fleet.query("select name from users_sync_fleet.worker") == []
    assert fleet.query(JOBS) == [("a", "visits"), ("b", "visits")]


def test_two_workers_share_the_projects_and_keep_their_mirrors(
    fleet: FleetWorld, shell: Shell
) -> None:
    members = [fleet.add(f"p{number}", 2) for number in range(8)]
    workers = [shell.start("fleet", "work") for _ in range(2)]
    until("all are in step", lambda: all(each.in_step for each in members))
    for each in members:
        each.project.create()
    until("all are in step again", lambda: all(each.in_step for each in members))
    for worker in workers:
        worker.signal(signal.SIGTERM)
    ended = [worker.end() for worker in workers]
    assert [each.code for each in ended] == [0, 0]
    reloads = [line for each in ended for line in each.log if line["event"] == "mirror.discarded"]
    assert len(reloads) <= len(members)
