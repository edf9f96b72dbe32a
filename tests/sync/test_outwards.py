"""A walk through a long list: from the middle of what is known down to its start, then up."""

from collections import Counter
from itertools import groupby
from random import Random
from threading import Event

import pytest

from tests.support.sweep_world import World, sign_up
from tests.support.users_apis import every_server
from worker.errors import Stopped
from worker.sandbox.api import Request
from worker.sync import walk
from worker.sync.state import SweepState

pytestmark = every_server

PAGES_DOWN = 5
# A page of five begins behind the cursor's user in today's list, and with that user in April's.
PAGES_EACH_WAY = {"today": (5, 5), "april": (7, 7), "changing": (6, 6)}
SAVED_AT = "select last_id from users_sync_worker.checkpoint"


@pytest.fixture
def known(quick_world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Return a world whose forty users are known, in eight pages, which is long enough."""
    monkeypatch.setattr(walk, "OUTWARDS_PAGES", 3)
    sign_up(quick_world.project, *range(40))
    quick_world.sweep()
    quick_world.api.requests.clear()
    return quick_world


def directions(world: World) -> list[str]:
    """Say of each page that was asked for whether it goes down or up."""
    ways = {"true": "down", "false": "up"}
    return [ways[r.query["desc"]] for r in world.api.requests if "limit" in r.query]


def test_long_list_is_walked_from_its_middle(known: World) -> None:
    report = known.sweep()
    ids = sorted(known.project.ids())
    pages = PAGES_EACH_WAY[known.users_api]
    assert Counter(directions(known)) == {"down": pages[0], "up": pages[1]}
    assert [way for way, _ in groupby(directions(known))] == ["down", "up"]
    assert known.cursors()[0] == ids[21]
    assert (report.counts["users"], report.unchanged, report.outcome) == (40, 40, "complete")


def test_list_of_few_pages_is_walked_from_its_start(known: World) -> None:
    known.sweep(page_size=20)
    assert set(directions(known)) == {"up"}
    assert known.cursors()[0] is None


def test_what_changed_on_either_side_is_written(known: World) -> None:
    ids = sorted(known.project.ids())
    for at in (0, 1, 18, 19, 20, 21, 22, 38, 39):
        known.project.edit(ids[at], display_name="Changed")
    for at in (3, 17, 23, 36):
        known.project.delete(ids[at])
    sign_up(known.project, 100)
    report = known.sweep()
    assert (report.counts["updated"], report.counts["deleted"], report.counts["inserted"]) == (
        9,
        4,
        1,
    )
    assert report.counts["users"] == 37
    assert known.rows() == known.wanted()


@pytest.mark.parametrize("seed", range(12))
def test_nobody_is_lost_whatever_happens_between_two_pages(known: World, seed: int) -> None:
    chance, project = Random(seed), known.project
    new = iter(range(200, 300))

    def happen(request: Request) -> None:
        if "limit" not in request.query or chance.random() < 0.3:
            return
        ids = sorted(project.ids())
        match chance.randrange(4):
            case 0:
                project.delete(chance.choice(ids))
            case 1:
                millis = 1_600_000_000_000 + chance.randrange(25)
                project.edit(chance.choice(ids), signed_up_at_millis=millis)
            case 2:
                sign_up(
                    project, next(new), signed_up_at_millis=1_600_000_000_000 + chance.randrange(25)
                )
            case _:
                project.edit(chance.choice(ids), display_name=f"Name {chance.random()}")

    known.api.on_request(happen)
    for _ in range(3):
        known.sweep()
        assert not known.deleted() & set(project.ids())
    known.api.on_request(lambda _: None)
    for _ in range(2):
        report = known.sweep()
    assert known.rows() == known.wanted()
    assert report.counts["users"] == len(project.ids())


@pytest.mark.parametrize("page", range(2, PAGES_DOWN + 1))
@pytest.mark.parametrize("both", [False, True])
def test_list_whose_cursor_goes_on_the_way_down_is_read_to_its_start(
    known: World, page: int, *, both: bool
) -> None:
    """It answers a clean end, or skips users, and neither is believed."""
    first = min(known.project.ids())
    known.project.edit(first, display_name="Changed")

    def delete(request: Request) -> None:
        cursor = request.query.get("cursor")
        if len(directions(known)) == page and cursor in known.project.ids():
            ids = sorted(known.project.ids())
            at = ids.index(cursor)
            for user_id in [ids[at], *([ids[at - 1]] if both else [])]:
                known.project.delete(user_id)

    known.api.on_request(delete)
    report = known.sweep()
    assert (report.outcome, report.counts["updated"]) == ("complete", 1)
    known.sweep()
    assert known.rows() == known.wanted()


def test_neighbours_of_the_middle_may_go(known: World) -> None:
    """Without the pair of the first page the way back leads up through the mirror."""
    ids = sorted(known.project.ids())
    for user_id in ids[17:24]:
        known.project.delete(user_id)
    assert known.sweep().counts["users"] == len(project_ids := known.project.ids())
    known.sweep()
    assert known.rows() == known.wanted()
    assert known.live() == set(project_ids)


@pytest.mark.parametrize("stops_after", range(1, 11))
def test_walk_that_was_stopped_anywhere_loses_nobody(known: World, stops_after: int) -> None:
    """A checkpoint says that all before it was read: there is none before the way up."""
    ids, stop = sorted(known.project.ids()), Event()
    for user_id in ids[::3]:
        known.project.edit(user_id, display_name="Changed")
    known.project.delete(ids[2])
    known.project.delete(ids[30])

    def halt(state: SweepState) -> None:
        if state.counts["pages"] == stops_after:
            stop.set()

    with pytest.raises(Stopped):
        known.sweep(halt, stop)
    goes_up = directions(known)[:stops_after][-1] == "up"
    saved = known.query(SAVED_AT)
    assert all(row[0] >= ids[19] for row in saved)
    assert saved or not goes_up
    assert not saved or stops_after >= PAGES_DOWN - 1
    known.sweep()
    known.sweep()
    assert known.rows() == known.wanted()
    assert known.live() == set(known.project.ids())
