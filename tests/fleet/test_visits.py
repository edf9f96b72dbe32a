"""Visits keep many projects in step, each by itself."""

from tests.support.fleet_world import FleetWorld
from tests.support.waiting import until


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
