"""An application works on the same rows: it holds locks, forces deadlocks, and serializes."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
import pytest

from tests.faults.watched import Watched, logged, stopped_cleanly, watched
from tests.support.processes import Running
from tests.support.waiting import until

pytestmark = pytest.mark.beside_api

# Of the columns nothing changes, and of the row only its version.
WRITE = "update neon_auth.users_sync set updated_at = updated_at where id = any(%s)"
ALTER = "alter table neon_auth.users_sync alter column updated_at set default null"
WAITING = """
select xact_start from pg_stat_activity
where datname = current_database() and application_name = 'users-sync' and wait_event_type = 'Lock'
"""
DEADLOCKS = "select deadlocks from pg_stat_database where datname = current_database()"
SETTING = """
do $$ begin execute format('alter database %I set {}', current_database()); end $$
"""


@pytest.fixture
def world(database_url: str, tmp_path: Path, users_api: str) -> Iterator[Watched]:
    # Small pages: it takes few attempts to find out which of their rows is locked.
    with watched(database_url, tmp_path, users_api, USERS_SYNC_STACK__PAGE_SIZE="5") as world:
        world.project.populate(60)
        world.sweep_here()
        yield world


def outdated(world: Watched) -> set[str]:
    rows = world.rows()
    return {user_id for user_id, row in world.wanted().items() if rows.get(user_id) != row}


@contextmanager
def working(world: Watched) -> Iterator[Running]:
    worker = world.shell.start()
    until("it has swept", lambda: logged(worker, "sweep.finished") > 0)
    yield worker
    world.catches_up()
    stopped_cleanly(worker)


@contextmanager
def transaction(world: Watched) -> Iterator[psycopg.Connection]:
    with psycopg.connect(world.site.database_url) as conn:
        yield conn


def edit_everybody(world: Watched, name: str) -> None:
    for user_id in world.project.ids():
        world.project.edit(user_id, display_name=name)


def until_the_worker_waits(world: Watched) -> None:
    until("the worker waits for a lock", lambda: bool(world.site.rows(WAITING)))


@pytest.mark.fault(
    "an application keeps rows locked",
    held="everybody else's changes reach the table meanwhile, theirs as soon as it lets go",
    thorough=5,
)
@pytest.mark.parametrize("neighbours", [2, 7])
def test_locked_rows_hold_up_nobody_else(world: Watched, neighbours: int, tries: int) -> None:
    locked = set(world.project.ids()[30 : 30 + neighbours])
    with working(world):
        for number in range(tries):
            with transaction(world) as application:
                application.execute(WRITE, (list(locked),))
                edit_everybody(world, f"Edit {number}")
                until("everybody else is up to date", lambda: outdated(world) == locked)
            world.catches_up()


@pytest.mark.fault(
    "ALTER TABLE in a transaction that stays open for some seconds",
    held="the worker outlives it; what changed meanwhile reaches the table afterwards",
)
def test_a_locked_table_is_outlived(world: Watched) -> None:
    with working(world) as worker, transaction(world) as application:
        application.execute(ALTER)
        edit_everybody(world, "Edited")
        until("it says so", lambda: "(55P03)" in worker.stdout.read_text("utf-8"))


@pytest.mark.fault(
    "an application forces deadlocks",
    held="whichever of the two is ended, the table equals the project",
    thorough=10,
)
def test_deadlocks_are_outlived(world: Watched, tries: int) -> None:
    world.site.execute(SETTING.format("deadlock_timeout = ''50ms''"))
    everybody = world.project.ids()
    with working(world):
        for number in range(tries):
            with transaction(world) as application:
                application.execute(WRITE, (everybody[3:4],))
                edit_everybody(world, f"Edit {number}")
                until_the_worker_waits(world)
                # Some of them the worker has written by now, in a transaction that waits for us.
                finish(application, everybody[:5])
            world.catches_up()
    until("deadlocks are counted", lambda: world.site.rows(DEADLOCKS)[0][0] >= tries)


def finish(application: psycopg.Connection, ids: list[str]) -> None:
    """Write these rows, too, and commit, unless we are the one that is ended."""
    with suppress(psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
        application.execute(WRITE, (ids,))
        application.commit()
    application.rollback()


@pytest.mark.fault(
    "transactions are serializable or repeatable reads by default, and an application writes the"
    " same rows",
    held="serialization failures are tried again; the table equals the project",
    thorough=5,
)
@pytest.mark.parametrize("isolation", ["serializable", "repeatable read"])
def test_serialization_failures_are_outlived(world: Watched, isolation: str, tries: int) -> None:
    world.site.execute(SETTING.format(f"default_transaction_isolation = ''{isolation}''"))
    with working(world) as worker:
        for number in range(tries):
            with transaction(world) as application:
                application.execute(WRITE, (world.project.ids()[3:4],))
                edit_everybody(world, f"Edit {number}")
                until_the_worker_waits(world)
                finish(application, [])
            world.catches_up()
    # Of two that are serializable it may be the application that has to try again.
    assert isolation == "serializable" or "(40001)" in worker.stdout.read_text("utf-8")
