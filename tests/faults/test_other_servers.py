"""The other ways to a database: a pooler that hands out transactions, and an older PostgreSQL."""

import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import psycopg
import pytest

from tests.faults.servers import Server, running_server, user
from tests.faults.watched import Watched, at_request, kill, logged, stopped_cleanly, watched
from tests.support.pgbouncer import configuration
from tests.support.ports import free_port
from tests.support.waiting import until
from worker.sandbox.postgres import create_database

POSTGRES_15 = Path("/usr/lib/postgresql/15/bin")
REFUSED = "00000000-0000-4000-8000-000000000000"


@dataclass
class Pooler:
    """A PgBouncer that may be killed and started again, one server connection per transaction."""

    start: Callable[[], subprocess.Popen[bytes]]
    url: str
    process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        self.process = self.start()
        until("PgBouncer answers", self.answers)

    def answers(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=5).close()
        except psycopg.OperationalError:
            return False
        return True

    def end(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def pooler(server: Server, tmp_path: Path) -> Iterator[Pooler]:
    program = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin")
    if program is None:
        pytest.skip("PgBouncer is not installed")
    port = free_port()
    config = tmp_path / "pgbouncer.ini"
    config.write_text(configuration(f"host=127.0.0.1 port={server.port} user=postgres", port))
    command = [program, "-q", *(["-u", user() or ""] if user() else []), str(config)]
    database = psycopg.conninfo.conninfo_to_dict(create_database(server.url))["dbname"]

    def start() -> subprocess.Popen[bytes]:
        with (tmp_path / "pgbouncer.log").open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=log)

    pooler = Pooler(start, f"postgresql://postgres@127.0.0.1:{port}/{database}")
    try:
        pooler.begin()
        yield pooler
    finally:
        pooler.end()


@pytest.mark.fault(
    "PgBouncer, in transaction mode, is killed and started again in the middle of a sweep",
    held="a long-running worker and `--once` outlive it; the table equals the project",
    quick=1,
    thorough=10,
)
def test_a_pooler_that_is_killed_is_outlived(
    pooler: Pooler, tmp_path: Path, users_api: str, tries: int
) -> None:
    dice = Random(tries)
    with watched(pooler.url, tmp_path, users_api) as world:
        world.project.populate(300)
        with at_request(world.api, dice.randint(1, 12), dice.uniform(0, 0.01), pooler.end) as ended:
            once = world.shell.start("--once")
            until("the pooler is killed", ended.is_set)
        pooler.begin()
        assert once.end().code == 0
        assert world.wanted() == world.rows()

        worker = world.shell.start()
        until("it has swept", lambda: logged(worker, "sweep.finished") > 0)
        for _ in range(tries):
            moment = dice.randint(1, 12), dice.uniform(0, 0.01)
            with at_request(world.api, *moment, pooler.end) as ended:
                world.change(dice)
                until("the pooler is killed", ended.is_set)
            pooler.begin()
            world.catches_up()
        until("the deletions are there", lambda: world.buried() == world.gone)
        stopped_cleanly(worker)


@pytest.fixture(scope="module")
def postgres_15() -> Iterator[Server]:
    if not (POSTGRES_15 / "initdb").exists():
        pytest.skip(f"there is no PostgreSQL 15 in {POSTGRES_15}")
    with running_server(POSTGRES_15) as server:
        yield server


@pytest.mark.fault(
    "PostgreSQL 15, with a record it refuses, and SIGKILL in the middle of a sweep",
    held="first load, changes, deletions and quarantine are as on 18; the next sweep completes it",
    quick=1,
    thorough=10,
)
def test_an_older_server_is_served_as_well(
    postgres_15: Server, tmp_path: Path, attempt: int
) -> None:
    dice = Random(attempt)
    with watched(create_database(postgres_15.url), tmp_path) as world:
        world.project.populate(300)
        world.site.execute(f"alter table neon_auth.users_sync add check (id <> '{REFUSED}')")
        world.project.create(id=REFUSED, signed_up_at_millis=1_600_000_000_000)
        world.sweep_here()
        assert missing(world) == {REFUSED}
        assert world.site.rows("select user_id from users_sync_worker.quarantine") == [(REFUSED,)]

        world.change(dice)
        with at_request(world.api, dice.randint(1, 16), 0, lambda: kill(killed)):
            killed = world.shell.start("--once")
            assert killed.end().code == -signal.SIGKILL
        assert world.nobody_was_wronged()
        world.let_the_lease_run_out()
        world.sweep()
        world.sweep_here()
        assert missing(world) == {REFUSED} - world.gone
        assert world.buried() == world.gone - {REFUSED}


def missing(world: Watched) -> set[str]:
    """Give the users whose rows are not what they must be; all others are."""
    rows, wanted = world.rows(), world.wanted()
    assert rows.keys() <= wanted.keys()
    return {user_id for user_id, row in wanted.items() if rows.get(user_id) != row}
