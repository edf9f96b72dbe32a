"""Rows of users who left long ago, and what refers to them."""

from collections.abc import Callable, Iterator
from io import StringIO
from threading import Barrier, Event

import psycopg
import pytest
from rich.console import Console

from tests.support.sweep_world import World, numbered, sign_up
from worker.cli import purge as module
from worker.cli.options import seconds_of
from worker.cli.output import asking
from worker.cli.purge import Purge, Purged
from worker.cli.session import Session
from worker.errors import Misconfigured, Stopped
from worker.sandbox.api import Request

OpenSession = Callable[..., Session]


HOUR = 3600

APPLICATION = """
drop schema if exists app cascade;
create schema app;
create table app.todos (
    id int primary key, user_id text not null references neon_auth.users_sync on delete cascade);
create table app.posts (
    id int primary key, author_id text references neon_auth.users_sync on delete set null);
create table app.bills (id int primary key, payer_id text references neon_auth.users_sync)
"""
LONG_AGO = """
update neon_auth.users_sync set deleted_at = deleted_at - interval '2 h'
where deleted_at is not null
"""


@pytest.fixture
def left(quick_world: World) -> Iterator[list[str]]:
    """Make an application's tables and nine users, of whom these four left two hours ago."""
    everybody = sign_up(quick_world.project, *range(9))
    quick_world.sweep()
    quick_world.query(APPLICATION)
    for user_id in everybody[:4]:
        quick_world.project.delete(user_id)
    quick_world.sweep()
    quick_world.query(LONG_AGO)
    assert quick_world.deleted() == set(everybody[:4])
    yield everybody[:4]
    quick_world.query("drop schema app cascade")


@pytest.fixture
def session(open_session: OpenSession, left: list[str]) -> Session:
    return open_session()


def refer(world: World, table: str, *ids: str) -> None:
    for number, user_id in enumerate(ids):
        world.query(f"insert into app.{table} values (%s, %s)", number, user_id)  # noqa: S608


def column(world: World, table: str, name: str) -> list[str]:
    rows = world.query(f"select {name} from app.{table} order by id")  # noqa: S608
    return [row[0] for row in rows]


def purge(session: Session, seconds: int = HOUR, *, dry_run: bool = False) -> Purged:
    return Purge(session, seconds, dry_run).run()


def test_rows_deleted_long_ago_go_and_on_delete_acts(
    quick_world: World, session: Session, left: list[str]
) -> None:
    stays = numbered(5)
    refer(quick_world, "todos", left[0], left[0], stays)
    refer(quick_world, "posts", left[1], stays)
    assert purge(session).users == 4
    assert (quick_world.deleted(), len(quick_world.live())) == (set(), 5)
    assert column(quick_world, "todos", "user_id") == [stays]
    assert column(quick_world, "posts", "author_id") == [None, stays]


def test_rows_deleted_lately_stay(quick_world: World, session: Session, left: list[str]) -> None:
    assert purge(session, 3 * HOUR).users == 0
    assert quick_world.deleted() == set(left)


def test_user_whom_the_project_knows_again_is_never_purged(
    quick_world: World, session: Session, left: list[str]
) -> None:
    sign_up(quick_world.project, 2)
    purged = purge(session)
    assert (purged.users, purged.known) == (3, 1)
    assert quick_world.deleted() == {left[2]}


def test_user_who_came_back_meanwhile_is_not_purged(
    quick_world: World, session: Session, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prove = Session.gone

    def prove_and_restore(session: Session, ids: list[str]) -> set[str]:
        gone = prove(session, ids)
        quick_world.query(
            "update neon_auth.users_sync set deleted_at = null where id = %s", left[0]
        )
        return gone

    monkeypatch.setattr(Session, "gone", prove_and_restore)
    assert purge(session).users == 3
    assert left[0] in quick_world.live()


def test_user_to_whom_rows_must_refer_stays_and_the_others_go(
    quick_world: World, session: Session, left: list[str]
) -> None:
    refer(quick_world, "bills", left[1])
    purged = purge(session)
    assert (purged.users, quick_world.deleted()) == (3, {left[1]})
    assert purged.kept == [(left[1], "rows still refer to it: bills_payer_id_fkey")]


@pytest.mark.usefixtures("short_lock_waits")
def test_row_that_an_application_keeps_locked_is_passed_by(
    quick_world: World, session: Session, left: list[str]
) -> None:
    with psycopg.connect(quick_world.url) as other:
        other.execute("select from neon_auth.users_sync where id = %s for update", (left[3],))
        purged = purge(session)
    assert (purged.users, [user_id for user_id, _ in purged.kept]) == (3, [left[3]])


def test_dry_run_counts_and_changes_nothing(
    quick_world: World, session: Session, left: list[str]
) -> None:
    refer(quick_world, "todos", left[0], left[0], left[2], numbered(5))
    refer(quick_world, "posts", left[1], left[3])
    refer(quick_world, "bills", left[3])
    sign_up(quick_world.project, 2)
    before = quick_world.versions()
    purged = purge(session, dry_run=True)
    assert quick_world.versions() == before
    counted = {str(reference): rows for reference, rows in purged.referring.items()}
    assert counted == {"app.posts.author_id (set null)": 1, "app.todos.user_id (cascade)": 2}
    assert (purged.users, purged.known) == (2, 1)
    really = purge(session)
    assert (really.users, really.known, really.kept) == (2, 1, purged.kept)


@pytest.mark.parametrize("dry_run", [False, True])
def test_users_are_asked_for_a_few_at_a_time_with_signs_of_life(
    quick_world: World, session: Session, monkeypatch: pytest.MonkeyPatch, *, dry_run: bool
) -> None:
    monkeypatch.setattr(module, "ASKED_AT_ONCE", 2)
    side_by_side = Barrier(2)

    def meet(_: Request) -> None:
        side_by_side.wait(10)

    quick_world.api.on_request(meet)
    told: list[tuple[int, int]] = []
    purged = Purge(session, HOUR, dry_run, lambda *numbers: told.append(numbers)).run()
    assert purged.users == 4
    assert told == [(0, 4), (2, 4), (4, 4)]


def test_progress_is_shown_on_a_terminal_and_nowhere_else() -> None:
    shown = []
    for terminal in (True, False):
        file = StringIO()
        with asking(Console(file=file, force_terminal=terminal, width=80)) as on_asked:
            on_asked(20, 437)
        shown.append(file.getvalue())
    assert "20/437" in shown[0]
    assert shown[1] == ""


def test_batches_come_to_an_end_whoever_stays(
    quick_world: World, session: Session, left: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BATCH", 2)
    refer(quick_world, "bills", left[0], left[1])
    purged = purge(session)
    assert (purged.users, len(purged.kept), quick_world.deleted()) == (2, 2, set(left[:2]))


def test_ids_that_are_not_stack_auths_are_left_alone(quick_world: World, session: Session) -> None:
    quick_world.query(
        "insert into neon_auth.users_sync (raw_json, deleted_at)"
        ' values (\'{{"id": "admin", "signed_up_at_millis": 1}}\', now() - interval \'1 year\')'
    )
    assert purge(session).users == 4
    assert quick_world.deleted() == {"admin"}


def test_holder_of_the_lease_is_not_disturbed(quick_world: World, session: Session) -> None:
    query = "select writes from users_sync_worker.lease"
    before = quick_world.query(query)
    with psycopg.connect(quick_world.url) as holder:
        holder.execute("update users_sync_worker.lease set sweep = sweep")
        assert purge(session).users == 4
    assert quick_world.query(query) == before


def test_stop_ends_it_between_batches(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 1)
    stop: Event = session.fetcher.stop
    gone = Session.gone

    def stop_after(session: Session, ids: list[str]) -> set[str]:
        found = gone(session, ids)
        stop.set()
        return found

    monkeypatch.setattr(Session, "gone", stop_after)
    with pytest.raises(Stopped):
        purge(session)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30d", 2_592_000), ("2 h", 7200), ("90M", 5400), ("3600s", 3600), ("1w", 604_800)],
)
def test_age_is_a_number_and_a_unit(text: str, seconds: int) -> None:
    assert seconds_of(text, "--older-than") == seconds


@pytest.mark.parametrize("text", ["36501d", "999999w"])
def test_age_of_more_than_a_century_is_refused(text: str) -> None:
    with pytest.raises(Misconfigured, match="--older-than: should be at most 36500d"):
        seconds_of(text, "--older-than")


@pytest.mark.parametrize("text", ["", "30", "d", "-1d", "1.5h", "1y", "30d;", "9999999d"])
def test_other_ages_are_refused(text: str) -> None:
    with pytest.raises(Misconfigured, match="--older-than: should be a number with s, m, h, d"):
        seconds_of(text, "--older-than")
