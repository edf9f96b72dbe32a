"""One user brought up to date on request: what becomes of the row, and who gets to know."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from threading import Event, Timer

import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.support.sweep_world import (
    World,
    delete_all,
    numbered,
    raw_record,
    row_of,
    settings,
    sign_up,
)
from tests.support.waiting import until
from worker.cli.session import Session, opened_session
from worker.errors import Misconfigured, Stopped, UpdatesRefused

OpenSession = Callable[..., Session]


TOUCHED = "select writes, user_id from users_sync_worker.touched order by writes"
WRITES = "select writes from users_sync_worker.lease"
MOVE_BACK = "update neon_auth.users_sync set {} = now() - interval '1 minute' where id = %s"


def writes(world: World) -> int:
    return int(world.query(WRITES)[0][0])


def some_user(world: World) -> str:
    return sorted(world.project.ids())[3]


def became(session: Session, user_id: str) -> str:
    return session.sync(user_id).became


# What becomes of the row


def test_sign_up_is_inserted(quick_world: World, session: Session) -> None:
    created = quick_world.project.create(display_name="New")
    assert became(session, created) == "inserted"
    assert quick_world.rows()[created] == row_of(quick_world.project.users()[created])


def test_change_is_written(quick_world: World, session: Session) -> None:
    user_id = some_user(quick_world)
    quick_world.project.edit(user_id, display_name="Changed")
    assert became(session, user_id) == "updated"
    assert quick_world.rows() == quick_world.wanted()


def test_user_who_is_known_again_is_restored(quick_world: World, session: Session) -> None:
    user_id = some_user(quick_world)
    quick_world.query(MOVE_BACK.replace("{}", "deleted_at"), user_id)
    assert became(session, user_id) == "restored"
    assert user_id in quick_world.live()


def test_user_who_is_gone_is_deleted_on_proof(quick_world: World, session: Session) -> None:
    user_id = some_user(quick_world)
    quick_world.project.delete(user_id)
    assert became(session, user_id) == "deleted"
    assert quick_world.deleted() == {user_id}
    assert became(session, user_id) == "deleted before"


@pytest.mark.parametrize("by_hand", [False, True], ids=["by us", "before us"])
def test_held_deletion_of_a_row_that_is_marked_deleted_is_struck(
    quick_world: World, session: Session, *, by_hand: bool
) -> None:
    one, other, *_ = sorted(quick_world.project.ids())
    delete_all(quick_world.project, [one, other])
    quick_world.sweep(max_count=1)
    assert quick_world.suspects("held") == {one, other}
    if by_hand:
        quick_world.query("update {users_sync} set deleted_at = now() where id = %s", one)

    told = became(session, one)

    assert told == ("deleted before" if by_hand else "deleted")
    assert quick_world.suspects() == {other}


def test_held_deletion_of_a_row_that_must_wait_stays_held(
    quick_world: World, open_session: OpenSession
) -> None:
    quick_world.project.populate(10)
    quick_world.sweep()
    one, other, *_ = sorted(quick_world.project.ids())
    delete_all(quick_world.project, [one, other])
    quick_world.sweep(max_count=1)
    quick_world.query("update {users_sync} set updated_at = now() where id = %s", one)

    told = became(open_session(grace_seconds=3600), one)

    assert told == "waiting"
    assert quick_world.suspects("held") == {one, other}


def test_row_that_is_in_step_is_neither_written_nor_locked(
    quick_world: World, session: Session
) -> None:
    before, counted = quick_world.versions(), writes(quick_world)
    assert became(session, some_user(quick_world)) == "unchanged"
    assert (quick_world.versions(), writes(quick_world)) == (before, counted)


def test_row_that_is_newer_than_the_answer_is_left(quick_world: World, session: Session) -> None:
    user_id = some_user(quick_world)
    single = session.ask(user_id)
    quick_world.query(
        "update neon_auth.users_sync set updated_at = clock_timestamp(),"
        ' raw_json = raw_json || \'{{"display_name": "Newer"}}\' where id = %s',
        user_id,
    )
    assert session.sync(user_id, single).became == "stale"
    assert quick_world.rows()[user_id][1] == "Newer"


MARK = "update neon_auth.users_sync set deleted_at = clock_timestamp() where id = %s"
CHANGE = "update neon_auth.users_sync set raw_json = %s, updated_at = clock_timestamp()"
INSERT = "insert into neon_auth.users_sync (raw_json) values (%s)"
WAITING_FOR_US = """
select 1 from pg_stat_activity where pg_backend_pid() = any(pg_blocking_pids(pid))
"""


def meet(world: World, session: Session, user_id: str, query: str, *params: object) -> str:
    """Write a row as a worker does while the command is about to; returns what came of it."""
    single = session.ask(user_id)
    with (
        ThreadPoolExecutor(1) as pool,
        psycopg.connect(world.url) as worker,
    ):
        worker.execute(query.encode(), params)
        outcome = pool.submit(session.sync, user_id, single)
        until("it waits for the row", lambda: worker.execute(WAITING_FOR_US.encode()).fetchone())
        worker.commit()
        return outcome.result().became


def test_row_that_a_worker_deletes_at_the_same_moment_is_told_as_deleted(
    quick_world: World, session: Session
) -> None:
    user_id = some_user(quick_world)
    quick_world.project.delete(user_id)
    assert meet(quick_world, session, user_id, MARK, user_id) == "deleted before"


def test_row_that_a_worker_writes_at_the_same_moment_is_told_as_in_step(
    quick_world: World, session: Session
) -> None:
    user_id = some_user(quick_world)
    quick_world.project.edit(user_id, display_name="Changed")
    record = Jsonb(quick_world.project.users()[user_id])
    change = f"{CHANGE} where id = %s"
    assert meet(quick_world, session, user_id, change, record, user_id) == "unchanged"
    created = quick_world.project.create()
    record = Jsonb(quick_world.project.users()[created])
    assert meet(quick_world, session, created, INSERT, record) == "unchanged"


def test_young_row_waits_for_the_grace_period(
    quick_world: World, open_session: OpenSession
) -> None:
    created = quick_world.project.create()
    quick_world.sweep()
    quick_world.project.delete(created)
    assert became(open_session(grace_seconds=60), created) == "waiting"
    assert created in quick_world.live()


def test_answer_that_is_older_than_the_lease_proves_no_deletion(
    quick_world: World, session: Session, open_session: OpenSession
) -> None:
    user_id = some_user(quick_world)
    quick_world.project.delete(user_id)
    single = session.ask(user_id)
    single = replace(single, observed_at=single.observed_at - timedelta(seconds=30))
    told = open_session(lease_seconds=20).sync(user_id, single).became
    assert (told, user_id in quick_world.live()) == ("waiting", True)


def test_nobody_knows_a_stranger(quick_world: World, session: Session) -> None:
    counted = writes(quick_world)
    assert became(session, numbered(77)) == "unknown"
    assert writes(quick_world) == counted


# Quarantine


def test_record_that_cannot_be_read_is_quarantined_until_it_can(
    quick_world: World, session: Session
) -> None:
    quick_world.project.put_raw(numbered(1), 1, raw_record(numbered(1), "soon"))
    outcome = session.sync(numbered(1))
    assert (outcome.became, outcome.error) == (
        "unreadable",
        "signed_up_at_millis is not an integer",
    )
    assert quick_world.quarantined() == {numbered(1): outcome.error}
    quick_world.project.put_raw(numbered(1), 1, raw_record(numbered(1), 1))
    assert became(session, numbered(1)) == "inserted"
    assert quick_world.quarantined() == {}


def test_record_that_the_database_refuses_is_quarantined(
    quick_world: World, session: Session
) -> None:
    user_id = some_user(quick_world)
    quick_world.query(
        "alter table neon_auth.users_sync add constraint short check (name <> 'Too long')"
    )
    try:
        quick_world.project.edit(user_id, display_name="Too long")
        outcome = session.sync(user_id)
        assert (outcome.became, outcome.error) == (
            "refused",
            "refused by the database: 23514 short",
        )
        assert quick_world.quarantined() == {user_id: outcome.error}
    finally:
        quick_world.query("alter table neon_auth.users_sync drop constraint short")


def test_new_user_is_inserted_where_a_publication_forbids_updates(
    quick_world: World, session: Session
) -> None:
    there = some_user(quick_world)
    quick_world.query("alter table neon_auth.users_sync replica identity nothing")
    quick_world.query("create publication everything for all tables")
    try:
        [new] = sign_up(quick_world.project, 1)
        assert [became(session, new) for _ in range(2)] == ["inserted", "unchanged"]
        quick_world.project.edit(there, display_name="New")
        with pytest.raises(UpdatesRefused):
            session.sync(there)
    finally:
        quick_world.query("drop publication everything")
        quick_world.query("alter table neon_auth.users_sync replica identity default")
    assert became(session, there) == "updated"


def test_user_who_left_leaves_quarantine(quick_world: World, session: Session) -> None:
    quick_world.project.put_raw(numbered(1), 1, raw_record(numbered(1), "soon"))
    session.sync(numbered(1))
    quick_world.project.delete(numbered(1))
    assert became(session, numbered(1)) == "unknown"
    assert quick_world.quarantined() == {}


# Who gets to know


def test_changed_live_row_moves_writes_and_is_touched(quick_world: World, session: Session) -> None:
    user_id, counted = some_user(quick_world), writes(quick_world)
    quick_world.project.edit(user_id, display_name="Changed")
    session.sync(user_id)
    # What was written within the same moment might be newer than the answer.
    quick_world.query("update neon_auth.users_sync set updated_at = now() - interval '1 minute'")
    quick_world.project.delete(user_id)
    session.sync(user_id)
    assert quick_world.query(TOUCHED)[-2:] == [(counted + 1, user_id), (counted + 2, user_id)]
    assert writes(quick_world) == counted + 2


def test_touched_rows_are_kept_for_a_day(quick_world: World, session: Session) -> None:
    quick_world.query(
        "insert into users_sync_worker.touched"
        " values ('neon_auth', 1, 'old', now() - interval '25 h')"
    )
    session.sync(quick_world.project.create())
    assert "old" not in {user_id for _, user_id in quick_world.query(TOUCHED)}


def test_known_user_is_suspected_no_more(quick_world: World, session: Session) -> None:
    one, other = sorted(quick_world.project.ids())[:2]
    for user_id, state in ((one, "held"), (other, "hidden")):
        quick_world.query(
            "insert into users_sync_worker.deletion values ('neon_auth', %s, %s, 1, 1, now())",
            user_id,
            state,
        )
        session.sync(user_id)
    # That the API knows a hidden user is what makes it hidden.
    assert quick_world.suspects() == {other}


# Who may


def test_another_project_may_not(
    quick_world: World, open_session: OpenSession, session: Session
) -> None:
    with pytest.raises(Misconfigured, match="users of another Stack Auth project"):
        open_session(project_id="22222222-2222-4222-8222-222222222222")
    quick_world.query("update users_sync_worker.lease set project = 'other'")
    with pytest.raises(Misconfigured, match="users of another Stack Auth project"):
        session.sync(quick_world.project.create())
    assert len(quick_world.live()) == 10


def test_nothing_is_written_before_the_first_sweep(
    quick_world: World, open_session: OpenSession
) -> None:
    quick_world.forget_everything()
    with pytest.raises(Misconfigured, match="run `users-sync --once` first"):
        open_session()


def test_nothing_is_created(world: World) -> None:
    chosen = settings(world.project)
    with (
        pytest.raises(Misconfigured, match="run `users-sync init`"),
        opened_session(chosen, world.url, Event()),
    ):
        pass
    assert world.query("select to_regnamespace('users_sync_worker')") == [(None,)]


def test_lease_that_another_worker_holds_is_no_obstacle(
    quick_world: World, session: Session
) -> None:
    quick_world.query(
        "update users_sync_worker.lease set holder = 'another', expires_at = now() + interval '1 h'"
    )
    assert became(session, quick_world.project.create()) == "inserted"


# Waiting for a sign-up


def test_user_is_awaited_until_the_sign_up(quick_world: World, session: Session) -> None:
    wanted = numbered(5)

    def sign_up() -> None:
        quick_world.project.create(id=wanted)

    Timer(0.1, sign_up).start()
    assert session.sync(wanted, session.await_user(wanted, 10)).became == "inserted"


def test_user_who_never_comes_is_awaited_no_longer(quick_world: World, session: Session) -> None:
    assert session.await_user(numbered(5), 0.1).found is None


def test_stop_ends_the_wait(session: Session) -> None:
    stop: Event = session.fetcher.stop
    Timer(0.1, stop.set).start()
    with pytest.raises(Stopped):
        session.await_user(numbered(5), 60)
