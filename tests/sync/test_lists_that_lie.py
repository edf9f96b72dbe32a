"""The list answers a clean end, or skips users, when its cursor's user left, hid or moved."""

from collections.abc import Callable, Sequence
from itertools import product

import pytest

from tests.support.sweep_world import World, before_page, delete_all, is_list, sign_up
from tests.support.users_apis import every_server
from worker.errors import SweepIncomplete
from worker.sandbox.api import Request
from worker.sandbox.project import Project

pytestmark = every_server

Lose = Callable[[Project, Sequence[str]], None]


def delete(project: Project, ids: Sequence[str]) -> None:
    delete_all(project, ids)


def hide(project: Project, ids: Sequence[str]) -> None:
    for user_id in ids:
        project.restrict(user_id)


def move(project: Project, ids: Sequence[str]) -> None:
    for user_id in ids:
        project.upgrade(user_id)


KINDS: dict[str, Lose] = {"deleted": delete, "hidden": hide, "moved": move}


def around(ids: Sequence[str], cursor: str, whom: str) -> list[str]:
    """Choose users around the end of the page before, whose second-last user is the cursor."""
    at = ids.index(cursor)
    last = at + 1
    return {
        "the one before": [ids[at]],
        "the last": list(ids[last : last + 1]),
        "the one behind": list(ids[last + 1 : last + 2]),
        "all three": list(ids[at : last + 2]),
        "the last 3": list(ids[max(0, last - 2) : last + 1]),
        "the last 120": list(ids[max(0, last - 119) : last + 1]),
        "all behind": list(ids[at:]),
    }[whom]


def in_between(world: World, ids: Sequence[str], kind: str, whom: str) -> Callable[[Request], None]:
    """Make what happens before a page is answered; it fills `lost`."""

    def act(request: Request) -> None:
        KINDS[kind](world.project, around(ids, request.query["cursor"], whom))

    return act


def check(world: World, ids: Sequence[str]) -> None:
    """See that nobody was skipped, nobody living marked deleted, and all is right in the end.

    `ids` had a row before; who was never on a page, and is not now, needs none.
    """
    living = set(world.project.ids())
    visible = set(world.wanted(hidden_too=False))
    assert world.deleted().isdisjoint(living)
    assert visible <= world.live()
    world.api.on_request(None)
    assert world.sweep(page_size=200, include_anonymous=False).outcome == "complete"
    assert world.live() == (set(ids) | visible) & living
    assert world.deleted() == set(ids) - living
    assert world.wanted(hidden_too=False).items() <= world.rows().items()


POSITIONS = ["the one before", "the last", "the one behind", "all three", "the last 3"]
CASES = [
    *product([3], POSITIONS, [2]),
    *product([7], POSITIONS, [3]),
    (50, "all behind", 3),
    (200, "the last 120", 2),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "whom", "page"), CASES)
def test_nobody_is_lost_when_users_go_between_two_pages_of_a_later_sweep(
    quick_world: World, size: int, whom: str, page: int, kind: str
) -> None:
    ids = sign_up(quick_world.project, *range(max(9, size * 5 // 2)))
    quick_world.sweep(page_size=200, include_anonymous=False)
    hook = before_page(page, in_between(quick_world, ids, kind, whom))
    quick_world.api.on_request(hook)

    report = quick_world.sweep(page_size=size, include_anonymous=False)

    assert report.outcome == "complete"
    check(quick_world, ids)


FIRST_CASES = [*product([4], POSITIONS, [3]), (50, "the last 120", 3), (50, "all behind", 2)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("size", "whom", "page"), FIRST_CASES)
def test_nobody_is_skipped_when_users_go_between_two_pages_of_a_first_sweep(
    quick_world: World, size: int, whom: str, page: int, kind: str
) -> None:
    ids = sign_up(quick_world.project, *range(max(9, size * 5 // 2)))
    quick_world.api.on_request(before_page(page, in_between(quick_world, ids, kind, whom)))

    report = quick_world.sweep(page_size=size, include_anonymous=False)

    assert report.outcome == "complete"
    assert set(quick_world.wanted(hidden_too=False)) <= quick_world.live()
    assert quick_world.deleted().isdisjoint(quick_world.project.ids())
    check(quick_world, list(quick_world.live() | quick_world.deleted()))


@pytest.mark.parametrize("kind", KINDS)
def test_users_may_go_before_every_single_page(quick_world: World, kind: str) -> None:
    """The cursor's user or the one behind, each time, until a third of the project has gone."""
    ids = sign_up(quick_world.project, *range(45))
    quick_world.sweep(page_size=200, include_anonymous=False)
    left = list(ids)

    def go(request: Request) -> None:
        cursor = request.query.get("cursor")
        if is_list(request) and cursor in left and len(left) > 30:
            at = left.index(cursor) + len(left) % 2
            user_id = left.pop(min(at, len(left) - 1))
            KINDS[kind](quick_world.project, [user_id])

    quick_world.api.on_request(go)
    report = quick_world.sweep(page_size=4, include_anonymous=False)

    assert (report.outcome, len(left)) == ("complete", 30)
    check(quick_world, ids)


def test_everybody_may_go_in_the_middle_of_a_sweep(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(20))
    quick_world.sweep()
    quick_world.api.on_request(before_page(3, lambda _: delete_all(quick_world.project, ids)))

    report = quick_world.sweep(max_fraction=0.2)

    assert (report.outcome, quick_world.deleted()) == ("held", set())


def test_a_list_that_never_goes_on_makes_the_sweep_incomplete(quick_world: World) -> None:
    """Every page but the first answers a clean end, for ever: no end is believed."""
    ids = sign_up(quick_world.project, *range(20))
    quick_world.sweep()
    quick_world.project.delete(ids[2])

    def lie(request: Request) -> None:
        if is_list(request) and request.query.get("cursor"):
            request.query["cursor"] = "00000000-0000-4000-8000-ffffffffffff"

    quick_world.api.on_request(lie)
    with pytest.raises(SweepIncomplete) as failure:
        quick_world.sweep()

    assert "\n" not in str(failure.value)
    assert (quick_world.deleted(), quick_world.sweeps()[-1][1]) == (set(), "incomplete")
    assert {ids[2]} == quick_world.suspects("candidate")


def test_a_sign_up_during_the_sweep_is_seen_by_it(quick_world: World) -> None:
    sign_up(quick_world.project, *range(20))

    def one_more(_: Request) -> None:
        sign_up(quick_world.project, 30)

    quick_world.api.on_request(before_page(5, one_more))

    quick_world.sweep()

    assert quick_world.wanted() == quick_world.rows()


def test_many_who_share_a_millisecond_are_told_apart(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(20), signed_up_at_millis=1_600_000_000_000)
    quick_world.sweep(page_size=3)
    quick_world.api.on_request(
        before_page(4, lambda r: quick_world.project.delete(r.query["cursor"]))
    )

    report = quick_world.sweep(page_size=3)

    assert report.outcome == "complete"
    assert len(quick_world.live() & set(ids)) == 20 - len(quick_world.deleted())
    check(quick_world, ids)
