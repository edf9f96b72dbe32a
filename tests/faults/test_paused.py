"""The process is stopped in the middle of its work, replaced, and wakes up: it writes no more."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from random import Random
from typing import Any

import psycopg
import pytest

from tests.faults.watched import Watched, at_request, logged, stopped_cleanly, watched
from tests.support.waiting import until
from worker.store.transaction import push

pytestmark = pytest.mark.beside_api

# As a writer does that still holds the lease: it is renewed, and runs out when that is undone.
TAKEN = """
update users_sync_worker.lease
set writes = writes + 1, expires_at = clock_timestamp() + interval '3 s'
"""
LOCKED = """
select from users_sync_worker.lease l join pg_stat_activity a on a.backend_xid = l.xmax
where a.state = 'active'
"""
VERSIONS = "select id::text, xmin::text, ctid::text from neon_auth.users_sync order by id"


@pytest.fixture
def world(database_url: str, tmp_path: Path, users_api: str) -> Iterator[Watched]:
    with watched(database_url, tmp_path, users_api) as world:
        world.project.populate(300)
        world.sweep_here()
        yield world


def edit_everybody(world: Watched, name: str) -> None:
    """Let every page have something to write, and every page of before be outdated."""
    for user_id in world.project.ids():
        world.project.edit(user_id, display_name=name)


def versions(world: Watched) -> list[tuple[Any, ...]]:
    return world.site.rows(VERSIONS)


@pytest.mark.fault(
    "SIGSTOP at a random moment of a sweep, another sweep after the lease ran out, SIGCONT",
    held="not one more row is written; exit code 5",
    quick=1,
    thorough=15,
)
def test_a_sweep_that_was_replaced_while_it_was_paused_ends(world: Watched, attempt: int) -> None:
    dice = Random(attempt)
    edit_everybody(world, "Before")

    number, seconds = dice.randint(1, 12), dice.uniform(0, 0.01)
    with at_request(world.api, number, seconds, lambda: paused.signal(signal.SIGSTOP)) as stopped:
        paused = world.shell.start("--once")
        until("it is paused", stopped.is_set)
    edit_everybody(world, "After")
    world.delete(*dice.sample(world.project.ids(), 5))
    world.sweep()
    world.sweep_here()
    assert world.wanted() == world.rows()
    before = versions(world)
    paused.signal(signal.SIGCONT)

    assert paused.end().code == 5
    assert before == versions(world)
    assert world.buried() == world.gone


@pytest.mark.fault(
    "SIGSTOP of a long-running worker at a random moment, until another holds its lease, SIGCONT",
    held="it stands by and writes not one more row; when the other is stopped, it takes over",
    quick=1,
    thorough=6,
)
def test_a_worker_that_was_replaced_while_it_was_paused_stands_by(
    world: Watched, attempt: int
) -> None:
    dice = Random(attempt)
    edit_everybody(world, "Before")

    number, seconds = dice.randint(1, 12), dice.uniform(0, 0.01)
    with at_request(world.api, number, seconds, lambda: paused.signal(signal.SIGSTOP)) as stopped:
        paused = world.shell.start()
        until("it is paused", stopped.is_set)
    edit_everybody(world, "After")
    world.delete(*dice.sample(world.project.ids(), 5))
    other = world.shell.start()
    world.catches_up()
    until("the deletions are there", lambda: world.buried() == world.gone)
    before = versions(world)
    paused.signal(signal.SIGCONT)

    until("it stands by", lambda: logged(paused, "worker.entered", state="standing by") > 0)
    assert before == versions(world)
    stopped_cleanly(other)
    world.change(dice)
    world.catches_up()
    stopped_cleanly(paused)


@contextmanager
def fallen_silent(world: Watched) -> Iterator[None]:
    """Lock the lease row as a writer does, and then say no more; in the end it must be ended."""
    with (
        suppress(psycopg.OperationalError),
        psycopg.connect(world.site.database_url, autocommit=True) as silent,
        silent.pipeline(),
    ):
        silent.execute("begin")
        silent.execute("set local idle_in_transaction_session_timeout = '1s'")
        silent.execute("set local statement_timeout = '1500ms'")
        silent.execute(TAKEN.encode())
        # Unlike at the end of a pipeline, the server waits for the next statement.
        silent.pgconn.send_flush_request()
        push(silent)
        until("the lease row is locked", lambda: bool(world.site.rows(LOCKED)))
        yield
    assert silent.pgconn.error_message


@pytest.mark.fault(
    "a writer falls silent between two statements of its transaction, which no time-out ends",
    held="`--once` ends its backend once the lease has run out, and takes over; exit code 0",
)
def test_a_sweep_ends_a_transaction_that_nobody_ends(world: Watched) -> None:
    edit_everybody(world, "After")
    with fallen_silent(world):
        world.sweep()
    assert world.wanted() == world.rows()
