"""A real Postgres for every test that wants one, and PgBouncer where it is installed."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import hypothesis
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.support.pgbouncer import program, running_pgbouncer
from worker.sandbox.postgres import EmbeddedPostgres, create_database, drop_database

pytest_plugins = [
    "tests.faults.tally",
    "tests.support.session_fixtures",
    "tests.support.store_fixtures",
    "tests.support.sweep_fixtures",
]

# A crash of the machine would cost nothing but the test: fsync is most of what a commit takes.
UNSAFE_AND_FAST = ("fsync = off", "synchronous_commit = off", "full_page_writes = off")


# The whole suite is to be run often: fewer examples than usual, new ones each time.
hypothesis.settings.register_profile("often", max_examples=30, deadline=None)
hypothesis.settings.load_profile("often")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Run twice as many tests at once as there are processors: half of the time they wait."""
    count = 2 * (os.cpu_count() or 1)
    return count if config.option.numprocesses == "auto" else None


@pytest.fixture
def users_api(request: pytest.FixtureRequest) -> str:
    """Return the name of the users API to test on, today's unless the test runs on several."""
    return str(getattr(request, "param", "today"))


@pytest.fixture(scope="session")
def postgres_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return a URL of a server where databases may be created.

    TEST_DATABASE_URL, or the embedded one, started for this run of the tests and removed after it.
    """
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        yield given
        return
    with EmbeddedPostgres(tmp_path_factory.mktemp("postgres")) as server:
        _make_fast(server.url())
        yield server.url()
    remove_data(server)


@pytest.fixture
def database_url(postgres_url: str) -> Iterator[str]:
    """Return the URL of a new, empty database, which is dropped afterwards, connections or not."""
    url = create_database(postgres_url)
    yield url
    drop_database(postgres_url, str(conninfo_to_dict(url)["dbname"]))


@pytest.fixture
def connect(database_url: str) -> Iterator[Callable[[], psycopg.Connection]]:
    """Return a function that opens one more autocommit connection; all are closed at the end."""
    with ExitStack() as connections:
        yield lambda: connections.enter_context(psycopg.connect(database_url, autocommit=True))


@pytest.fixture
def connection(connect: Callable[[], psycopg.Connection]) -> psycopg.Connection:
    return connect()


@pytest.fixture
def pgbouncer_url(database_url: str, tmp_path: Path) -> Iterator[str]:
    """Return a URL of `database_url` by way of PgBouncer, one server connection per transaction."""
    if program() is None:
        pytest.skip("PgBouncer is not installed")
    with running_pgbouncer(database_url, tmp_path) as way:
        yield way(database_url)


def remove_data(server: EmbeddedPostgres) -> None:
    """Remove a stopped server's data: as root they are not in the folder that was asked for."""
    shutil.rmtree(server.data.parent, ignore_errors=True)


def _make_fast(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        for setting in UNSAFE_AND_FAST:
            conn.execute(f"alter system set {setting}".encode())
        conn.execute("select pg_reload_conf()")
