"""The process is killed at any moment: what it leaves agrees, and the next one completes it."""

import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from tests.faults.watched import Watched, at_request, kill, watched
from tests.support.users_apis import both_servers

pytestmark = both_servers

USERS = 300


@pytest.fixture
def world(database_url: str, tmp_path: Path, users_api: str) -> Iterator[Watched]:
    with watched(database_url, tmp_path, users_api) as world:
        world.project.populate(USERS)
        yield world


def sweep_and_be_killed(world: Watched, dice: Random, requests: int) -> None:
    """Kill a sweep within some milliseconds after one of its requests."""
    number, seconds = dice.randint(1, requests), dice.uniform(0, 0.02)
    with at_request(world.api, number, seconds, lambda: kill(killed)):
        killed = world.shell.start("--once")
        code = killed.end().code
    # After the last requests it may have been quicker.
    assert code == -signal.SIGKILL or (code == 0 and number > requests - 5)
    reached = world.as_far_as_the_checkpoint()
    assert reached.items() <= world.rows().items()
    world.let_the_lease_run_out()
    assert world.nobody_was_wronged()


@pytest.mark.fault(
    "SIGKILL at a random moment of a first load",
    held="everybody up to the checkpoint is a row, and the next sweep completes the table",
    quick=4,
    thorough=50,
)
def test_a_first_load_may_be_killed_at_any_moment(world: Watched, attempt: int) -> None:
    sweep_and_be_killed(world, Random(attempt), requests=16)

    world.sweep()

    assert world.wanted() == world.rows()
    assert world.buried() == set()


@pytest.mark.fault(
    "SIGKILL at a random moment of a sweep with changes and deletions",
    held="everybody up to the checkpoint is up to date, only users who left are marked deleted,"
    " and the next sweep completes the table",
    quick=4,
    thorough=50,
)
def test_a_later_sweep_may_be_killed_at_any_moment(world: Watched, attempt: int) -> None:
    dice = Random(attempt)
    world.sweep_here()
    world.change(dice)

    sweep_and_be_killed(world, dice, requests=21)

    # What was read before the kill is not read again: who left that part is the next sweep's.
    world.sweep()
    world.sweep_here()
    assert world.wanted() == world.rows()
    assert world.buried() == world.gone
