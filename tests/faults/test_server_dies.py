"""The Postgres server goes down while a worker writes, in every way there is, and comes back."""

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.faults.servers import Server, running_server
from tests.faults.watched import Watched, at_request, logged, stopped_cleanly, watched
from tests.support.waiting import until
from worker.sandbox.postgres import create_database

pytestmark = pytest.mark.beside_api

WAYS: dict[str, Callable[[Server, str], None]] = {
    "crash": lambda server, _: server.stop(signal.SIGKILL),
    "crash of a backend": lambda server, database: server.kill_a_backend(database),
    "immediate shutdown": lambda server, _: server.stop(signal.SIGQUIT),
    "fast shutdown": lambda server, _: server.stop(signal.SIGINT),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def world(server: Server, tmp_path: Path, users_api: str) -> Iterator[Watched]:
    with watched(create_database(server.url), tmp_path, users_api) as world:
        world.project.populate(300)
        yield world


def goes_down(world: Watched, server: Server, way: str) -> None:
    WAYS[way](server, str(conninfo_to_dict(world.site.database_url)["dbname"]))


@pytest.mark.fault(
    "the database server is killed or shut down, again and again, under a long-running worker",
    held="the worker outlives it, the table equals the project, no living user is marked deleted",
    quick=1,
    thorough=10,
)
@pytest.mark.parametrize("way", WAYS)
def test_a_worker_outlives_a_server_that_goes_down(
    world: Watched, server: Server, way: str, tries: int
) -> None:
    dice = Random(tries)
    worker = world.shell.start()
    world.catches_up()
    for _ in range(tries):
        moment = dice.randint(1, 16), dice.uniform(0, 0.01)
        with at_request(world.api, *moment, lambda: goes_down(world, server, way)) as down:
            world.change(dice, edits=100)
            until("the server went down", down.is_set)
        if server.process is None:
            server.start()
        world.catches_up()
    until("the deletions are there", lambda: world.buried() == world.gone)
    stopped_cleanly(worker)


@pytest.mark.fault(
    "the database server is killed or shut down in the middle of `--once`, and started again",
    held="the same sweep goes on to its end; exit code 0",
    quick=1,
    thorough=5,
)
@pytest.mark.parametrize("way", ["crash"])
def test_a_sweep_outlives_a_server_that_goes_down(
    world: Watched, server: Server, way: str, tries: int
) -> None:
    dice = Random(tries)
    for _ in range(tries):
        moment = dice.randint(1, 10), dice.uniform(0, 0.01)
        with at_request(world.api, *moment, lambda: goes_down(world, server, way)) as down:
            sweep = world.shell.start("--once")
            until("the server went down", down.is_set)
        server.start()
        assert sweep.end().code == 0
        assert world.wanted() == world.rows()
        world.change(dice, edits=100, deletions=0)


@pytest.mark.fault(
    "the database server crashes, which empties an unlogged table, under a long-running worker",
    held="the next census misses the rows, and the table equals the project again",
    quick=1,
    thorough=5,
)
@pytest.mark.parametrize("way", ["crash", "crash of a backend"])
def test_a_table_that_a_crash_empties_is_filled_again(
    world: Watched, server: Server, way: str, tries: int
) -> None:
    world.site.execute("alter table neon_auth.users_sync set unlogged")
    worker = world.shell.having(USERS_SYNC_SCHEDULE__CENSUS_MINUTES="0").start()
    world.catches_up()
    for number in range(1, tries + 1):
        goes_down(world, server, way)
        if server.process is None:
            server.start()
        until("rows are missed", lambda: logged(worker, "mirror.discarded") >= number)  # noqa: B023
        world.catches_up()
    stopped_cleanly(worker)
