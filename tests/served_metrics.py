"""Prints what a worker that has swept serves as /metrics: `python -m tests.served_metrics`."""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import urlopen

from tests.support.ports import free_port
from tests.support.processes import command, opened_site
from tests.support.waiting import until
from worker.cli.healthcheck import trouble
from worker.sandbox.postgres import EmbeddedPostgres, create_database

SWEPT = "\nusers_sync_seconds_since_complete_sweep "
# The last one to have a value: the age of a suspicion that a user is gone.
LAST = "\nusers_sync_oldest_candidate_seconds "
SETTINGS = {
    "USERS_SYNC_DELETIONS__ENABLED": "false",
    "USERS_SYNC_SCHEDULE__SWEEP_SECONDS": "0.1",
}


def main() -> None:
    port = free_port()
    with (
        TemporaryDirectory() as folder,
        EmbeddedPostgres(Path(folder) / "postgres") as server,
        opened_site(create_database(server.url()), Path(folder)) as site,
    ):
        site.project.populate(100)
        environ = site.shell.having(**SETTINGS, USERS_SYNC_HTTP__PORT=str(port)).environ()
        with subprocess.Popen(command("run"), env=environ, stdout=subprocess.DEVNULL) as worker:
            try:
                until("it has swept", lambda: swept(port))
                site.project.delete(site.project.ids()[0])
                until("every metric has a value", lambda: LAST in served(port))
                sys.stdout.write(served(port))
            finally:
                worker.terminate()


def swept(port: int) -> bool:
    return trouble("127.0.0.1", port) is None and SWEPT in served(port)


def served(port: int) -> str:
    with urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        return str(answer.read().decode())


if __name__ == "__main__":
    main()
