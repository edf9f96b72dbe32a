"""A PgBouncer in front of a server: its configuration, and the process."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.support.ports import free_port

PATIENCE_SECONDS = 10.0


def configuration(database: str, port: int) -> str:
    """Write it: any client is let in, and taken for the user whom `database` names."""
    return f"""
[databases]
* = {database}
[pgbouncer]
pool_mode = transaction
auth_type = any
listen_addr = 127.0.0.1
listen_port = {port}
unix_socket_dir =
"""


def program() -> str | None:
    """Find PgBouncer; None where it is not installed."""
    return shutil.which("pgbouncer", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")


@contextmanager
def running_pgbouncer(url: str, folder: Path) -> Iterator[Callable[[str], str]]:
    """Start PgBouncer, one server connection per transaction, in front of the server at `url`.

    Gives what turns the URL of any database there into one by way of PgBouncer.
    """
    found = program()
    assert found is not None
    with psycopg.connect(url) as conn:
        server, port, config = conn.info, free_port(), folder / "pgbouncer.ini"
        config.write_text(_for_server(server, port))
        command = [found, *_other_user(server.host), str(config)]
        user = quote(server.user)

    def way(url: str) -> str:
        name = quote(str(conninfo_to_dict(url)["dbname"]))
        return f"postgresql://{user}@127.0.0.1:{port}/{name}"

    with (folder / "pgbouncer.log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _wait_until_answered(way(url), process, Path(log.name))
            yield way
        finally:
            process.kill()
            process.wait()


def _for_server(server: psycopg.ConnectionInfo, port: int) -> str:
    keys = {key: str(getattr(server, key)) for key in ("host", "port", "user", "password")}
    # It does not read an empty value.
    doubled = {key: value.replace("'", "''") for key, value in keys.items() if value}
    return configuration(" ".join(f"{key}='{value}'" for key, value in doubled.items()), port)


def _other_user(host: str) -> list[str]:
    """Say who PgBouncer is to run as: never root, and one who gets at the server's socket."""
    if os.geteuid() != 0:
        return []
    return ["-u", Path(host).owner() if host.startswith("/") else "nobody"]


def _wait_until_answered(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while True:
        try:
            psycopg.connect(url, connect_timeout=5).close()
        except psycopg.OperationalError:
            if process.poll() is not None or time.monotonic() > deadline:
                text = log.read_text()[-1000:]
                raise RuntimeError(f"PgBouncer does not answer: {text}") from None
            time.sleep(0.02)
        else:
            return
