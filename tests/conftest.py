"""A real Postgres for every test that wants one, and PgBouncer where it is installed."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import hypothesis
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.support.pgbouncer import configuration
from tests.support.ports import free_port
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
    program = shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    with psycopg.connect(database_url) as conn:
        target = conn.info
        port = free_port()
        config = tmp_path / "pgbouncer.ini"
        config.write_text(_pgbouncer_config(target, port))
        url = f"postgresql://{quote(target.user)}@127.0.0.1:{port}/{quote(target.dbname)}"
        command = [program, *_other_user(target.host), str(config)]
    with (tmp_path / "pgbouncer.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_until_answered(url, process, Path(log.name))
            yield url
        finally:
            process.kill()
            process.wait()


def remove_data(server: EmbeddedPostgres) -> None:
    """Remove a stopped server's data: as root they are not in the folder that was asked for."""
    shutil.rmtree(server.data.parent, ignore_errors=True)


def _make_fast(url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        for setting in UNSAFE_AND_FAST:
            conn.execute(f"alter system set {setting}".encode())
        conn.execute("select pg_reload_conf()")


def _pgbouncer_config(target: psycopg.ConnectionInfo, port: int) -> str:
    """Write the configuration; any client is let in, and taken for the user that is named here."""
    keys = {key: str(getattr(target, key)) for key in ("host", "port", "user", "password")}
    # It does not read an empty value.
    doubled = {key: value.replace("'", "''") for key, value in keys.items() if value}
    return configuration(" ".join(f"{key}='{value}'" for key, value in doubled.items()), port)


def _other_user(host: str) -> list[str]:
    """Say who PgBouncer is to run as: never root, and one who gets at the server's socket."""
    if os.geteuid() != 0:
        return []
    return ["-u", Path(host).owner() if host.startswith("/") else "nobody"]


def _wait_until_answered(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 10
    while True:
        try:
            psycopg.connect(url, connect_timeout=5).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"PgBouncer does not answer: {log.read_text()[-1000:]}")
            time.sleep(0.02)
        else:
            return
