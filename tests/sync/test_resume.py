"""An unfinished sweep goes on where it stopped, and claims to know no more than it saw."""

from collections.abc import Callable
from threading import Event
from typing import Any

import pytest

from tests.support.sweep_world import World, delete_all, is_list, numbered, sign_up
from worker.errors import SourceUnavailable, Stopped, UsersSyncError
from worker.sandbox.api import Request, serve, server_error
from worker.sync.state import SweepState


def stop_after(world: World, pages: int, **options: Any) -> int:
    """Sweep, ask it to stop when so many pages are applied, and give how many users it had read.

    The page that it had asked for ahead may still be taken.
    """
    stop = Event()

    def look(state: SweepState) -> None:
        if state.counts["pages"] >= pages:
            stop.set()

    with pytest.raises(Stopped):
        world.sweep(look, stop, **options)
    return int(world.query("select counts->>'users' from users_sync_worker.checkpoint")[0][0])


def checkpoint(world: World) -> list[tuple[Any, ...]]:
    return world.query("select sweep, last_id from users_sync_worker.checkpoint")


@pytest.mark.parametrize("pages", [1, 2, 5])
def test_a_stopped_sweep_leaves_table_and_checkpoint_agreeing(
    quick_world: World, pages: int
) -> None:
    ids = sign_up(quick_world.project, *range(40))

    users = stop_after(quick_world, pages)

    assert 4 * pages < users < 40
    assert [(1, ids[users - 1])] == checkpoint(quick_world)
    assert set(ids[:users]) == quick_world.live()
    assert quick_world.sweeps() == [(1, "stopped", 0)]
    assert quick_world.query("select holder from users_sync_worker.lease") == [(None,)]


@pytest.mark.parametrize("pages", [1, 2, 5])
def test_the_next_run_goes_on_from_the_checkpoint(quick_world: World, pages: int) -> None:
    ids = sign_up(quick_world.project, *range(40))
    users = stop_after(quick_world, pages)
    quick_world.api.requests.clear()

    report = quick_world.sweep()

    # The cursor is the user before: the page must begin behind him.
    assert quick_world.cursors()[0] == ids[users - 2]
    assert quick_world.wanted() == quick_world.rows()
    assert (report.sweep, report.outcome, report.counts["users"]) == (1, "complete", 40)
    assert (report.counts["inserted"], report.unchanged) == (40, 0)
    assert quick_world.sweeps() == [(1, "complete", 0)]
    assert checkpoint(quick_world) == []


def test_a_sweep_may_be_stopped_again_and_again(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(41))
    quick_world.sweep()
    quick_world.project.delete(ids[1])
    quick_world.project.edit(ids[7], display_name="Other")
    sign_up(quick_world.project, 41, 42)
    for pages in (1, 4, 7):
        stop_after(quick_world, pages)

    report = quick_world.sweep()

    assert quick_world.wanted() == quick_world.rows()
    assert quick_world.deleted() == {ids[1]}
    counts = [report.counts[name] for name in ("inserted", "updated", "deleted")]
    assert (report.sweep, counts) == (2, [2, 1, 1])


def test_a_sweep_that_is_stopped_before_its_first_page_leaves_no_checkpoint(
    quick_world: World,
) -> None:
    sign_up(quick_world.project, *range(9))
    quick_world.sweep()
    stop = Event()
    stop.set()

    with pytest.raises(Stopped):
        quick_world.sweep(stop=stop)

    assert checkpoint(quick_world) == []
    assert quick_world.sweep().outcome == "complete"


@pytest.mark.parametrize(
    ("age", "options"),
    [("61 min", {}), ("2 min", {"resume_minutes": 1}), ("0 s", {"include_anonymous": False})],
    ids=["too old", "too old as configured", "of other options"],
)
def test_a_checkpoint_that_says_nothing_about_this_list_is_not_used(
    quick_world: World, age: str, options: dict[str, Any]
) -> None:
    sign_up(quick_world.project, *range(30))
    users = stop_after(quick_world, 3)
    quick_world.query("update users_sync_worker.checkpoint set moved = moved - %s::interval", age)
    quick_world.api.requests.clear()

    report = quick_world.sweep(**options)

    assert (quick_world.cursors()[0], report.sweep) == (None, 2)
    assert (report.counts["users"], report.counts["inserted"]) == (30, 30 - users)
    assert quick_world.wanted() == quick_world.rows()
    assert checkpoint(quick_world) == []


def test_a_checkpoint_of_another_api_is_not_used(quick_world: World) -> None:
    sign_up(quick_world.project, *range(30))
    stop_after(quick_world, 3)
    quick_world.api.requests.clear()

    with serve(quick_world.api) as api_url:
        report = quick_world.sweep(api_url=api_url)

    assert (quick_world.cursors()[0], report.sweep) == (None, 2)


def gone(world: World, user_id: str) -> None:
    world.project.delete(user_id)


def hidden(world: World, user_id: str) -> None:
    world.project.restrict(user_id)


def moved(world: World, user_id: str) -> None:
    world.project.upgrade(user_id)


@pytest.mark.parametrize("leave", [gone, hidden, moved])
@pytest.mark.parametrize("whom", ["the last", "the last two", "all so far"])
def test_who_leaves_at_the_checkpoint_meanwhile_takes_nobody_along(
    quick_world: World, leave: Callable[[World, str], None], whom: str
) -> None:
    ids = sign_up(quick_world.project, *range(30))
    users = stop_after(quick_world, 3, include_anonymous=False)
    since = {"the last": users - 1, "the last two": users - 2, "all so far": 0}[whom]
    leavers = ids[since:users]
    for user_id in leavers:
        leave(quick_world, user_id)

    report = quick_world.sweep(include_anonymous=False)

    assert (report.outcome, report.sweep) == ("complete", 1)
    assert set(ids) - set(leavers) <= quick_world.live()
    assert quick_world.deleted().isdisjoint(quick_world.project.ids())
    quick_world.sweep(include_anonymous=False)
    assert quick_world.live() == set(quick_world.project.ids())


def test_who_left_before_the_stop_is_deleted_by_the_run_that_goes_on(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep()
    delete_all(quick_world.project, [ids[1], ids[20]])
    stop_after(quick_world, 3)
    assert {ids[1]} == quick_world.suspects("candidate")

    report = quick_world.sweep()

    assert (report.sweep, report.counts["deleted"]) == (2, 2)
    assert {ids[1], ids[20]} == quick_world.deleted()
    assert quick_world.suspects() == set()


def test_who_leaves_the_part_that_was_read_is_left_to_the_next_sweep(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep()
    stop_after(quick_world, 3)
    quick_world.project.delete(ids[1])

    assert quick_world.sweep().counts["deleted"] == 0
    assert quick_world.sweep().counts["deleted"] == 1


def test_a_sweep_that_goes_on_forgets_nothing_it_could_not_notice(quick_world: World) -> None:
    """Held ids, hidden users and quarantined records of the part that it did not read."""
    ids = sign_up(quick_world.project, *range(40))
    odd = numbered(99)
    quick_world.project.put_raw(odd, 1_600_000_000_002, f'{{"id":"{odd}"}}'.encode())
    quick_world.sweep(include_anonymous=False)
    quick_world.project.restrict(ids[3])
    delete_all(quick_world.project, ids[5:15])
    quick_world.sweep(include_anonymous=False, max_fraction=0.1)
    before = (quick_world.suspects("held"), quick_world.suspects("hidden"))
    stop_after(quick_world, 5, include_anonymous=False, max_fraction=0.1)

    report = quick_world.sweep(include_anonymous=False, max_fraction=0.1)

    assert before == (set(ids[5:15]), {ids[3]})
    assert before == (quick_world.suspects("held"), quick_world.suspects("hidden"))
    assert {odd} == set(quick_world.quarantined())
    assert (report.outcome, report.counts["held"]) == ("held", 10)


def test_what_was_struck_before_the_stop_stays_struck(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep(include_anonymous=False)
    quick_world.project.restrict(ids[2])
    quick_world.sweep(include_anonymous=False)
    quick_world.project.unrestrict(ids[2])
    stop_after(quick_world, 2, include_anonymous=False)

    quick_world.sweep(include_anonymous=False)

    assert quick_world.suspects() == set()


def test_an_outage_in_the_middle_of_the_proofs_is_gone_on_from(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep()
    delete_all(quick_world.project, ids[3:6])
    quick_world.api.on_request(lambda r: None if is_list(r) else server_error())
    with pytest.raises(SourceUnavailable):
        quick_world.sweep(retry_minutes=0)
    quick_world.api.on_request(None)

    report = quick_world.sweep()

    assert (report.outcome, report.counts["deleted"]) == ("complete", 3)
    assert set(ids[3:6]) == quick_world.deleted()


def test_a_stop_among_the_proofs_deletes_nobody_and_is_gone_on_from(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep()
    delete_all(quick_world.project, ids[3:16])
    stop = Event()

    def halt(request: Request) -> None:
        if not is_list(request):
            stop.set()

    quick_world.api.on_request(halt)
    with pytest.raises(Stopped):
        quick_world.sweep(stop=stop)
    quick_world.api.on_request(None)
    assert set(ids) == quick_world.live()

    report = quick_world.sweep()

    assert (report.sweep, report.counts["deleted"]) == (2, 13)


KILLED = """
create function public.kill() returns trigger language plpgsql as $$
begin
    if new.outcome is not null then raise exception using errcode = '57P01'; end if;
    return new;
end $$;
create trigger kill before insert or update on users_sync_worker.sweep
for each row execute function public.kill()
"""


def test_deletions_before_a_crash_are_not_counted_again(world: World) -> None:
    """The rows were marked, the sweep did not come to its end: the guard counts each once.

    The crash is a database that goes away when the end of the sweep is to be written.
    """
    ids = sign_up(world.project, *range(60))
    world.sweep()
    delete_all(world.project, ids[:6])
    world.query(KILLED)
    with pytest.raises(UsersSyncError):
        world.sweep(retry_minutes=0.001, max_count=8)
    world.query("drop trigger kill on users_sync_worker.sweep")
    assert set(ids[:6]) == world.deleted()

    report = world.sweep(max_count=8)

    assert (report.outcome, report.sweep, report.counts["deleted"]) == ("complete", 2, 6)
    assert world.sweeps()[-1] == (2, "complete", 6)
    world.sweep()
    assert world.suspects() == set()
