"""Who looks after the roster, and when: now and then, and as soon as a worker fell silent."""

import pytest

from tests.support.fleet_world import FleetWorld
from worker.fleet.control import SILENCE_SECONDS, Alive

HERE, THERE = (Alive(name, "machine", 0, 0) for name in ("here", "there"))
RARELY = 3600.0

LATER = "update users_sync_fleet.roster set ran_at = ran_at - interval '2 s'"
SILENT = (
    "update users_sync_fleet.worker set seen_at = seen_at - interval '6 s' where name = 'there'"
)
ENGINE_SILENT = "insert into procrastinate_workers (last_heartbeat) values (now() - interval '6 s')"


def looks(fleet: FleetWorld, alive: Alive, every: float = RARELY) -> bool:
    return fleet.control.tick(alive, every, SILENCE_SECONDS).looks


def test_one_of_the_workers_looks_and_then_nobody_for_a_while(fleet: FleetWorld) -> None:
    assert [looks(fleet, each) for each in (HERE, THERE, HERE)] == [True, False, False]
    fleet.query(LATER)
    assert [looks(fleet, each) for each in (HERE, THERE)] == [False, False]
    assert looks(fleet, THERE, every=1.5)


@pytest.mark.parametrize("silent", [SILENT, ENGINE_SILENT])
def test_another_worker_looks_as_soon_as_one_fell_silent(fleet: FleetWorld, silent: str) -> None:
    looks(fleet, HERE)
    looks(fleet, THERE)
    fleet.query(silent)
    # Not twice within a second: whoever looks needs some time.
    assert not looks(fleet, HERE)
    fleet.query(LATER)
    assert [looks(fleet, HERE), looks(fleet, HERE)] == [True, False]


def test_worker_that_fell_silent_is_forgotten_with_what_waits_for_it(fleet: FleetWorld) -> None:
    fleet.add("a")
    looks(fleet, HERE)
    looks(fleet, THERE)
    fleet.query("update procrastinate_jobs set queue_name = 'visits:there'")
    fleet.control.begin_visit("a", "there", "visits:there", (8, 8))
    assert fleet.control.workers(SILENCE_SECONDS) == 2
    fleet.query(SILENT)
    assert fleet.control.workers(SILENCE_SECONDS) == 1
    fleet.control.look_after(SILENCE_SECONDS, 5.0, 50.0)
    assert fleet.query("select name from users_sync_fleet.worker") == [("here",)]
    assert fleet.query("select visitor from users_sync_fleet.visit") == [(None,)]
    assert fleet.query("select queue_name from procrastinate_jobs") == [("visits",)]


def test_host_is_known_with_the_projects_that_are_visited(fleet: FleetWorld) -> None:
    fleet.add("a")
    fleet.add("b")
    seen = []
    for paused in ([], ["a"], ["a", "b"]):
        fleet.control.enable(paused, enabled=False)
        fleet.control.look_after(SILENCE_SECONDS, 5.0, 50.0)
        seen.append(fleet.control.tick(HERE, RARELY, SILENCE_SECONDS).projects)
    fleet.control.remove(["a", "b"])
    fleet.control.look_after(SILENCE_SECONDS, 5.0, 50.0)
    assert seen == [2, 1, 0]
    assert fleet.query("select api_host from users_sync_fleet.host") == []
