"""What it takes to mark a user deleted: the API's own word, and not too many at once."""

from collections.abc import Callable
from typing import Any

import pytest

from tests.support.sweep_world import World, before_page, delete_all, is_list, numbered, sign_up
from worker.errors import Misconfigured, SourceUnavailable
from worker.sandbox.api import (
    Reply,
    Request,
    bad_gateway_html,
    cut_off,
    html_ok,
    server_error,
    too_many_requests,
)
from worker.sandbox.replies import json_reply, known_error, unknown_path, user_not_found
from worker.store.suspects import Suspects
from worker.sync.sweep import Report


def approve(world: World, sweep: int) -> int:
    """Do what `users-sync deletions approve` does."""
    return Suspects("neon_auth").approve(world.conn, sweep)


def asked_one_by_one(
    answer: Callable[[Request], Reply | None],
) -> Callable[[Request], Reply | None]:
    """Make a hook for GET of single users."""
    return lambda request: None if is_list(request) else answer(request)


def settled(report: Report) -> dict[str, int]:
    names = ("deleted", "approved", "hidden", "held", "restored")
    return {name: report.counts[name] for name in names if report.counts[name]}


def test_a_user_who_left_is_marked_deleted_and_the_row_keeps_its_last_record(
    quick_world: World,
) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    quick_world.project.delete(ids[4])

    report = quick_world.sweep()

    assert {ids[4]} == quick_world.deleted()
    assert set(ids) - {ids[4]} == quick_world.live()
    assert settled(report) == {"deleted": 1}
    assert quick_world.query(
        "select name, updated_at, deleted_at <= clock_timestamp() from {users_sync} where id = %s",
        ids[4],
    ) == [("User 4", None, True)]


def test_a_deleted_user_is_neither_asked_for_nor_written_again(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    quick_world.project.delete(ids[4])
    quick_world.sweep()
    before, asked = quick_world.versions(), quick_world.asked()

    report = quick_world.sweep()

    assert before == quick_world.versions()
    assert asked == quick_world.asked()
    assert (settled(report), quick_world.suspects()) == ({}, set())


def test_a_user_who_comes_back_is_restored(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    quick_world.project.delete(ids[4])
    quick_world.sweep()
    sign_up(quick_world.project, 4, display_name="Back")

    report = quick_world.sweep()

    assert settled(report) == {"restored": 1}
    assert quick_world.wanted() == quick_world.rows()
    assert quick_world.query(
        "select deleted_at, updated_at <= clock_timestamp() from {users_sync} where id = %s",
        ids[4],
    ) == [(None, True)]


def test_a_user_who_comes_back_within_the_grace_period_waits(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    quick_world.project.delete(ids[4])
    quick_world.sweep()
    sign_up(quick_world.project, 4)

    report = quick_world.sweep(grace_seconds=60)

    assert (settled(report), report.counts["stale"]) == ({}, 1)
    assert {ids[4]} == quick_world.deleted()
    quick_world.query("update {users_sync} set deleted_at = deleted_at - interval '61 s'")
    assert settled(quick_world.sweep(grace_seconds=60)) == {"restored": 1}


def test_young_rows_wait_for_the_grace_period(quick_world: World) -> None:
    """By sign-up or by the last change, they may be younger than what a replica shows."""
    ids = sign_up(quick_world.project, *range(12))
    young = quick_world.project.create()
    quick_world.sweep()
    quick_world.project.edit(ids[3], display_name="Changed")
    quick_world.sweep()
    delete_all(quick_world.project, [young, ids[3], ids[5]])

    report = quick_world.sweep(grace_seconds=60)

    assert (report.outcome, report.waiting, settled(report)) == ("complete", 2, {"deleted": 1})
    assert {ids[5]} == quick_world.deleted()
    assert {young, ids[3]} == quick_world.suspects("candidate")


def test_who_waited_is_deleted_later(quick_world: World) -> None:
    young = quick_world.project.create()
    sign_up(quick_world.project, *range(3))
    quick_world.sweep()
    quick_world.project.delete(young)
    quick_world.sweep(grace_seconds=60)

    report = quick_world.sweep(grace_seconds=0)

    assert (settled(report), report.waiting) == ({"deleted": 1}, 0)
    assert ({young}, set()) == (quick_world.deleted(), quick_world.suspects())


def test_waiting_deletions_count_for_the_guard(quick_world: World) -> None:
    old = sign_up(quick_world.project, *range(6))
    young = [quick_world.project.create() for _ in range(6)]
    sign_up(quick_world.project, *range(10, 18))
    quick_world.sweep()
    delete_all(quick_world.project, [*old[:5], *young])

    report = quick_world.sweep(grace_seconds=60, max_fraction=0.5)

    assert (report.outcome, settled(report)) == ("held", {"held": 11})
    assert quick_world.deleted() == set()


PASSING = {
    "500": server_error(),
    "429": too_many_requests(),
    "502 HTML": bad_gateway_html(),
    "200 HTML": html_ok(),
    "cut off": cut_off(),
    "another form": json_reply(200, b"[]"),
    "404 of another kind in the header": Reply(
        "404 Not Found", [("x-stack-known-error", "OTHER")], b'{"code":"USER_NOT_FOUND"}'
    ),
    "404 without the header": Reply(
        "404 Not Found", [("content-type", "application/json")], b'{"code":"USER_NOT_FOUND"}'
    ),
}
LASTING = {
    "plain 404": unknown_path("http://127.0.0.1/users"),
    "404 of another kind": known_error(404, "TEAM_NOT_FOUND", "Team not found."),
    "401": known_error(401, "INVALID_SECRET_SERVER_KEY", "no"),
    "403": Reply("403 Forbidden", [("content-type", "text/plain")], b"blocked"),
    "400": known_error(400, "CURRENT_PROJECT_NOT_FOUND", "no"),
    "301": Reply("301 Moved Permanently", [("location", "http://elsewhere.example")], b""),
}


@pytest.mark.parametrize("case", [*PASSING, *LASTING])
def test_nothing_but_the_apis_own_not_found_deletes(quick_world: World, case: str) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    before = quick_world.versions()
    quick_world.project.delete(ids[4])
    quick_world.api.on_request(asked_one_by_one(lambda _: (PASSING | LASTING)[case]))

    with pytest.raises(SourceUnavailable if case in PASSING else Misconfigured) as failure:
        quick_world.sweep(retry_minutes=0)

    assert "\n" not in str(failure.value)
    assert before == quick_world.versions()
    assert {ids[4]} == quick_world.suspects("candidate")
    assert quick_world.sweeps()[-1][1:] == ("incomplete", 0)


def test_one_proof_that_is_not_to_be_had_keeps_everybody(quick_world: World) -> None:
    """Half the proofs would be half a list."""
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    delete_all(quick_world.project, ids[2:5])
    quick_world.api.on_request(
        asked_one_by_one(lambda r: server_error() if r.path.endswith(ids[3]) else None)
    )

    with pytest.raises(SourceUnavailable):
        quick_world.sweep(retry_minutes=0)

    assert set(ids) == quick_world.live()
    quick_world.api.on_request(None)
    assert settled(quick_world.sweep()) == {"deleted": 3}


def empty_list(request: Request) -> Reply | None:
    """Answer as if nobody were there, though everybody can be asked for."""
    empty = b'{"items":[],"is_paginated":true,"pagination":{"next_cursor":null}}'
    return json_reply(200, empty) if is_list(request) else None


def test_an_empty_list_deletes_nobody_whom_the_api_still_knows(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep()
    before = quick_world.versions()
    quick_world.api.on_request(empty_list)

    report = quick_world.sweep()

    assert before == quick_world.versions()
    assert settled(report) == {"hidden": 30}
    quick_world.api.on_request(None)
    quick_world.sweep()
    assert (quick_world.suspects(), quick_world.live()) == (set(), set(ids))


@pytest.mark.parametrize(("live", "outcome"), [(9, "complete"), (10, "held")])
def test_an_emptied_project_is_held_from_ten_users_on(
    quick_world: World, live: int, outcome: str
) -> None:
    ids = sign_up(quick_world.project, *range(live))
    quick_world.sweep()
    delete_all(quick_world.project, ids)

    report = quick_world.sweep(max_fraction=1)

    assert report.outcome == outcome
    assert len(quick_world.deleted()) == (0 if outcome == "held" else live)


GUARDED: dict[str, Any] = {"max_fraction": 0.2, "max_count": 500}


def most_gone(world: World) -> tuple[list[str], list[str]]:
    """Sweep in 30 users and let 18 of them leave; returns those who left and those who stayed."""
    ids = sign_up(world.project, *range(30))
    world.sweep()
    delete_all(world.project, ids[6:24])
    return ids[6:24], ids[:6] + ids[24:]


def test_too_many_deletions_are_held(quick_world: World) -> None:
    gone, _ = most_gone(quick_world)
    before = quick_world.versions()

    report = quick_world.sweep(**GUARDED)

    assert (report.outcome, settled(report)) == ("held", {"held": 18})
    assert before == quick_world.versions()
    assert set(gone) == quick_world.suspects("held") == quick_world.suspects()
    assert quick_world.sweeps()[-1] == (2, "held", 0)


def test_held_deletions_stay_held_and_are_not_asked_for_again(quick_world: World) -> None:
    gone, _ = most_gone(quick_world)
    quick_world.sweep(**GUARDED)
    asked = quick_world.asked()

    report = quick_world.sweep(**GUARDED)

    assert (report.outcome, settled(report)) == ("held", {"held": 18})
    assert set(gone) == quick_world.suspects("held")
    assert asked == quick_world.asked()
    first_and_last = quick_world.query(
        "select distinct first_noticed, last_noticed from users_sync_worker.deletion"
    )
    assert first_and_last == [(2, 3)]


def test_exactly_what_was_approved_is_deleted(quick_world: World) -> None:
    gone, stayed = most_gone(quick_world)
    held = quick_world.sweep(**GUARDED)
    delete_all(quick_world.project, stayed[:1])

    assert approve(quick_world, held.sweep) == 18
    report = quick_world.sweep(**GUARDED)

    assert (report.outcome, settled(report)) == ("complete", {"approved": 18, "deleted": 1})
    assert {*gone, stayed[0]} == quick_world.deleted()
    assert quick_world.suspects() == set()


def test_who_left_since_is_judged_anew(quick_world: World) -> None:
    """What was approved covers nobody who left later, and doesn't count against them."""
    ids = sign_up(quick_world.project, *range(60))
    quick_world.sweep()
    delete_all(quick_world.project, ids[:20])
    held = quick_world.sweep(**GUARDED)
    delete_all(quick_world.project, ids[20:35])
    quick_world.sweep(**GUARDED)

    assert approve(quick_world, held.sweep) == 20
    report = quick_world.sweep(**GUARDED)

    assert (report.outcome, settled(report)) == ("held", {"approved": 20, "held": 15})
    assert set(ids[:20]) == quick_world.deleted()
    assert set(ids[20:35]) == quick_world.suspects("held")


def test_held_ids_do_not_count_again(quick_world: World) -> None:
    """A few more who leave are not too many, whatever else is waiting for a person."""
    _, stayed = most_gone(quick_world)
    quick_world.sweep(**GUARDED)
    delete_all(quick_world.project, stayed[:2])

    report = quick_world.sweep(**GUARDED)

    assert (report.outcome, settled(report)) == ("held", {"deleted": 2, "held": 18})
    assert set(stayed[:2]) == quick_world.deleted()


def test_a_held_user_who_comes_back_is_struck_out(quick_world: World) -> None:
    gone, _ = most_gone(quick_world)
    quick_world.sweep(**GUARDED)
    sign_up(quick_world.project, 8)

    report = quick_world.sweep(**GUARDED)

    assert (report.outcome, settled(report)) == ("held", {"held": 17})
    assert set(gone) - {numbered(8)} == quick_world.suspects("held")
    assert numbered(8) in quick_world.live()


def test_when_all_who_were_held_come_back_the_sweep_is_complete(quick_world: World) -> None:
    most_gone(quick_world)
    quick_world.sweep(**GUARDED)
    sign_up(quick_world.project, *range(6, 24))

    report = quick_world.sweep(**GUARDED)

    assert (report.outcome, settled(report)) == ("complete", {})
    assert quick_world.suspects() == set()


def test_an_approved_user_who_came_back_is_not_deleted(quick_world: World) -> None:
    gone, _ = most_gone(quick_world)
    approve(quick_world, quick_world.sweep(**GUARDED).sweep)
    sign_up(quick_world.project, 8)

    report = quick_world.sweep(**GUARDED)

    assert settled(report) == {"approved": 17}
    assert numbered(8) in quick_world.live()
    assert set(gone) - {numbered(8)} == quick_world.deleted()


def test_approved_deletions_do_not_use_up_the_day(quick_world: World) -> None:
    _, stayed = most_gone(quick_world)
    approve(quick_world, quick_world.sweep(**GUARDED).sweep)
    quick_world.sweep(**GUARDED)
    delete_all(quick_world.project, stayed[:9])

    report = quick_world.sweep(**GUARDED)

    assert (report.outcome, settled(report)) == ("complete", {"deleted": 9})


def test_more_than_max_count_are_held(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep()
    delete_all(quick_world.project, ids[:4])

    assert quick_world.sweep(max_count=3).outcome == "held"
    assert quick_world.deleted() == set()


def test_as_many_as_max_count_are_deleted(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep()
    delete_all(quick_world.project, ids[:4])

    report = quick_world.sweep(max_count=4)

    assert (report.outcome, settled(report)) == ("complete", {"deleted": 4})


def test_no_more_than_max_count_and_one_are_asked_for(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(60))
    quick_world.sweep(page_size=60)
    delete_all(quick_world.project, ids[:50])

    report = quick_world.sweep(max_count=10)

    assert (report.outcome, settled(report)) == ("held", {"held": 50})
    assert len(quick_world.asked()) == 11


def test_sweeps_of_a_day_add_up(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(60))
    quick_world.sweep()
    for at in range(0, 9, 3):
        delete_all(quick_world.project, ids[at : at + 3])
        assert settled(quick_world.sweep(max_count=10)) == {"deleted": 3}
    delete_all(quick_world.project, ids[9:12])

    report = quick_world.sweep(max_count=10)

    assert (report.outcome, settled(report)) == ("held", {"held": 3})


def test_what_was_deleted_a_day_ago_does_not_count(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(30))
    quick_world.sweep()
    delete_all(quick_world.project, ids[:3])
    quick_world.sweep(max_count=3)
    quick_world.query(
        "update users_sync_worker.sweep set started = started - interval '25 hours',"
        " finished = finished - interval '25 hours'"
    )
    delete_all(quick_world.project, ids[3:6])

    assert settled(quick_world.sweep(max_count=3)) == {"deleted": 3}


def test_deletions_that_are_not_enabled_are_only_reported(quick_world: World) -> None:
    gone, _ = most_gone(quick_world)
    before = quick_world.versions()

    report = quick_world.sweep(enabled=False)

    assert (report.outcome, report.candidates, settled(report)) == ("complete", 18, {})
    assert (before, []) == (quick_world.versions(), quick_world.asked())
    assert set(gone) == quick_world.suspects("candidate")


def test_more_than_five_hundred_are_deleted_in_several_transactions(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(620))
    quick_world.sweep(page_size=1000)
    delete_all(quick_world.project, ids[:600])

    report = quick_world.sweep(page_size=1000, max_count=1000)

    assert settled(report) == {"deleted": 600}
    assert set(ids[:600]) == quick_world.deleted()


def test_a_row_that_changed_after_the_proof_is_not_deleted(quick_world: World) -> None:
    """Another writer is not overruled by what was asked before it wrote."""
    ids = sign_up(quick_world.project, *range(8))
    quick_world.sweep()
    quick_world.project.delete(ids[4])

    def write(_: Request) -> None:
        quick_world.query(
            "update {users_sync} set updated_at = clock_timestamp() where id = %s", ids[4]
        )

    quick_world.api.on_request(asked_one_by_one(write))
    report = quick_world.sweep()

    assert (settled(report), quick_world.deleted()) == ({}, set())
    quick_world.api.on_request(None)
    assert settled(quick_world.sweep()) == {"deleted": 1}


@pytest.mark.usefixtures("short_lock_waits")
def test_a_row_that_an_application_keeps_locked_is_deleted_later(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(8))
    quick_world.sweep()
    delete_all(quick_world.project, ids[3:5])

    with quick_world.conn.transaction():
        quick_world.query("select from {users_sync} where id = %s for update", ids[4])
        report = quick_world.sweep()

    assert (report.outcome, settled(report)) == ("complete", {"deleted": 1})
    assert settled(quick_world.sweep()) == {"deleted": 1}


HIDING: dict[str, Any] = {"include_anonymous": False}


@pytest.mark.parametrize("how", ["restricted", "anonymous"])
def test_users_hidden_from_the_list_stay_live(quick_world: World, how: str) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep(**HIDING)
    fields = {"is_restricted": True} if how == "restricted" else {"is_anonymous": True}
    quick_world.project.edit(ids[5], **fields)

    report = quick_world.sweep(**HIDING)

    assert (report.outcome, settled(report)) == ("complete", {"hidden": 1})
    assert set(ids) == quick_world.live()
    assert {ids[5]} == quick_world.suspects("hidden")
    assert quick_world.wanted()[ids[5]] == quick_world.rows()[ids[5]]


def test_hidden_users_are_asked_for_again_only_after_audit_hours(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep(**HIDING)
    quick_world.project.restrict(ids[5])
    quick_world.sweep(**HIDING)
    quick_world.project.delete(ids[5])

    assert settled(quick_world.sweep(**HIDING)) == {}
    assert [ids[5]] == quick_world.asked()
    quick_world.query(
        "update users_sync_worker.deletion set asked_at = asked_at - interval '1 day'"
    )
    assert settled(quick_world.sweep(**HIDING)) == {"deleted": 1}


def test_suspects_that_were_not_asked_about_are_counted_and_are_the_first_of_the_next_sweep(
    quick_world: World,
) -> None:
    """More are hidden than may be asked about at once, and the last of them really left."""
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep(page_size=60)
    quick_world.project.delete(ids[8])
    for user_id in set(ids[:10]) - {ids[8]}:
        quick_world.project.restrict(user_id)
    options: dict[str, Any] = {**HIDING, "max_count": 3, "page_size": 60}

    told = []
    for _ in range(4):
        quick_world.api.requests.clear()
        report = quick_world.sweep(**options)
        told.append((sorted(quick_world.asked()), report.counts["unasked"], settled(report)))

    assert told == [
        (ids[:4], 6, {"hidden": 4}),
        (ids[4:8], 2, {"hidden": 4}),
        (ids[8:10], 0, {"deleted": 1, "hidden": 1}),
        ([], 0, {}),
    ]
    recorded = quick_world.query("select unasked from users_sync_worker.sweep order by number")
    assert [row[0] for row in recorded] == [0, 6, 2, 0, 0]


def test_known_hidden_users_are_not_in_the_way_of_new_suspects(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep(page_size=60)
    for user_id in ids[:4]:
        quick_world.project.restrict(user_id)
    options: dict[str, Any] = {**HIDING, "max_count": 3, "page_size": 60}
    quick_world.sweep(**options)
    quick_world.query("update users_sync_worker.deletion set asked_at = asked_at - interval '2 d'")
    quick_world.project.delete(ids[9])

    report = quick_world.sweep(**options)

    assert settled(report) == {"deleted": 1, "hidden": 3}
    assert report.counts["unasked"] == 1


def test_proven_deletions_that_wait_are_not_in_the_way_of_suspects_not_asked_about(
    quick_world: World,
) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep(page_size=60)
    quick_world.query(
        "update {users_sync} set updated_at = clock_timestamp() where id = any(%s)", ids[:4]
    )
    delete_all(quick_world.project, ids[:4])
    options: dict[str, Any] = {**HIDING, "page_size": 60, "grace_seconds": 3600}
    waiting = quick_world.sweep(**options).waiting
    quick_world.project.restrict(ids[8])
    quick_world.api.requests.clear()

    report = quick_world.sweep(**options, max_count=3)

    assert waiting == 4
    assert ids[8] in quick_world.asked()  # a few at a time, in any order
    assert (report.counts["hidden"], report.counts["unasked"]) == (1, 1)


def test_a_hidden_user_who_shows_again_is_struck_out(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep(**HIDING)
    quick_world.project.restrict(ids[5])
    quick_world.sweep(**HIDING)
    quick_world.project.unrestrict(ids[5])

    quick_world.sweep(**HIDING)

    assert quick_world.suspects() == set()
    assert quick_world.wanted() == quick_world.rows()


def test_a_user_who_reappears_later_in_the_walk_is_no_longer_suspected(quick_world: World) -> None:
    """Somebody missing on one page was only moved: a later page of the sweep shows them."""
    ids = sign_up(quick_world.project, *range(20))
    quick_world.sweep()
    quick_world.api.on_request(before_page(1, lambda _: quick_world.project.upgrade(ids[3])))

    report = quick_world.sweep()

    assert (settled(report), report.candidates, quick_world.asked()) == ({}, 0, [])
    assert quick_world.wanted() == quick_world.rows()


def test_a_user_who_moves_behind_the_walk_is_found_by_asking(quick_world: World) -> None:
    """The last page was read when the user moved to the end: only GET tells that it lives."""
    ids = sign_up(quick_world.project, *range(20))
    quick_world.sweep()
    quick_world.project.delete(ids[3])

    def come_back(request: Request) -> None:
        if not is_list(request) and request.path.endswith(ids[3]):
            sign_up(quick_world.project, 40, id=ids[3])

    quick_world.api.on_request(come_back)
    report = quick_world.sweep()

    assert (settled(report), quick_world.deleted()) == ({}, set())
    assert quick_world.wanted() == quick_world.rows()


def test_a_proof_says_nothing_about_who_is_on_the_list_again(quick_world: World) -> None:
    ids = sign_up(quick_world.project, *range(12))
    quick_world.sweep()
    quick_world.api.on_request(asked_one_by_one(lambda _: user_not_found()))

    report = quick_world.sweep()

    assert (settled(report), set(ids)) == ({}, quick_world.live())
