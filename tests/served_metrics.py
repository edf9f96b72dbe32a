"""Prints what a worker that has swept serves as /metrics, or one of a fleet that has visited.

python -m tests.served_metrics worker|fleet
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from tests.support.fleet_world import opened_fleet
from tests.support.ports import free_port
from tests.support.processes import Shell, command, opened_site
from tests.support.waiting import until
from worker.cli.healthcheck import trouble
from worker.sandbox.postgres import EmbeddedPostgres, create_database

SWEPT = "\nusers_sync_seconds_since_complete_sweep "
# The last one to have a value: the age of a suspicion that a user is gone.
LAST = "\nusers_sync_oldest_candidate_seconds "
# The last one of a fleet: it takes a visit, and a look at the roster after it.
FRESH = "\nusers_sync_fleet_fresh_seconds{"
SETTINGS = {
    "USERS_SYNC_DELETIONS__ENABLED": "false",
    "USERS_SYNC_SCHEDULE__SWEEP_SECONDS": "0.1",
}


def main() -> None:
    with TemporaryDirectory() as folder, EmbeddedPostgres(Path(folder) / "postgres") as server:
        serve_metrics = {"worker": of_a_worker, "fleet": of_a_fleet}[sys.argv[1]]
        sys.stdout.write(serve_metrics(server.url(), Path(folder)))


def of_a_worker(server_url: str, folder: Path) -> str:
    port = free_port()
    with opened_site(create_database(server_url), folder) as site:
        site.project.populate(100)
        shell = site.shell.having(**SETTINGS, USERS_SYNC_HTTP__PORT=str(port))
        with at_work(shell.environ(), "run"):
            until("it has swept", lambda: swept(port))
            site.project.delete(site.project.ids()[0])
            until("every metric has a value", lambda: LAST in served(port))
            return served(port)


def of_a_fleet(server_url: str, folder: Path) -> str:
    port = free_port()
    control_url, target_url = (create_database(server_url) for _ in range(2))
    with opened_fleet(control_url, [target_url], folder) as fleet:
        fleet.add("acme", 100)
        with at_work(Shell(folder, fleet.variables(port)).environ(), "fleet", "work"):
            until("it is alive", lambda: trouble("127.0.0.1", port) is None)
            until("every metric has a value", lambda: FRESH in served(port))
            return served(port)


@contextmanager
def at_work(environ: dict[str, str], *arguments: str) -> Iterator[None]:
    with subprocess.Popen(command(*arguments), env=environ, stdout=subprocess.DEVNULL) as worker:
        try:
            yield
        finally:
            worker.terminate()


def swept(port: int) -> bool:
    return trouble("127.0.0.1", port) is None and SWEPT in served(port)


def served(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return str(answer.read().decode())


if __name__ == "__main__":
    main()
