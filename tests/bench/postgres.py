"""A real Postgres with its usual, safe settings; what it wrote; and a link to it that is slow."""

import os
import select
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Value, get_context
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.support.waiting import until
from worker.sandbox.postgres import EmbeddedPostgres, create_database, drop_database
from worker.store.migrate import creation_sql

CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Written:
    """What a database had done at one moment."""

    wal_bytes: int
    rows: int

    def since(self, before: "Written") -> "Written":
        return Written(self.wal_bytes - before.wal_bytes, self.rows - before.rows)


@dataclass(frozen=True, slots=True)
class Databases:
    """A server on which databases are created, each for one measurement."""

    url: str

    @contextmanager
    def fresh(self, *, with_table: bool = False) -> Iterator[str]:
        url = create_database(self.url)
        if with_table:
            with psycopg.connect(url, autocommit=True) as conn:
                conn.execute(creation_sql("neon_auth").encode())
        self.execute("checkpoint")
        try:
            yield url
        finally:
            drop_database(self.url, str(conninfo_to_dict(url)["dbname"]))

    def version(self) -> str:
        with psycopg.connect(self.url) as conn:
            number = conn.info.parameter_status("server_version") or ""
        return f"PostgreSQL {number.split()[0]}"

    def execute(self, query: str) -> None:
        with psycopg.connect(self.url, autocommit=True) as conn:
            conn.execute(query.encode())


@contextmanager
def opened_server() -> Iterator[Databases]:
    """Start a server, or take that of BENCH_DATABASE_URL."""
    given = os.environ.get("BENCH_DATABASE_URL")
    if given:
        yield Databases(given)
        return
    with tempfile.TemporaryDirectory() as folder:
        server = EmbeddedPostgres(Path(folder))
        try:
            with server:
                yield Databases(server.url())
        finally:
            # For root they are not in the folder that was asked for, and a million users are 2 GB.
            shutil.rmtree(server.data.parent, ignore_errors=True)


_WRITTEN = """
select pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')::bigint,
       coalesce((select sum(n_tup_ins + n_tup_upd)::bigint from pg_stat_user_tables
                 where relname = 'users_sync'), 0)
"""
_OTHERS = """
select count(*) from pg_stat_activity
where datname = current_database() and backend_type = 'client backend' and pid <> pg_backend_pid()
"""


def written(url: str, *, by_leavers: bool = False) -> Written:
    """See what a database has done.

    Rows are counted late, and surely only when whoever wrote them has left: `by_leavers` waits
    until nobody else is connected.
    """
    with psycopg.connect(url, autocommit=True) as conn:
        if by_leavers:
            until("the others leave", lambda: conn.execute(_OTHERS).fetchone() == (0,))
        row = conn.execute(_WRITTEN).fetchone()
        assert row is not None
        return Written(*row)


@dataclass(frozen=True, slots=True)
class Link:
    """A way to the database that counts round trips, and lets each take longer."""

    url: str
    # The process that takes new connections.
    pid: int
    _trips: "Synchronized[int]"

    @property
    def trips(self) -> int:
        return self._trips.value


@contextmanager
def linked(url: str, seconds: float = 0.0) -> Iterator[Link]:
    """Put a relay, in a process of its own, before the database; a round trip costs `seconds`."""
    trips: Any = Value("q", 0)
    parts = conninfo_to_dict(url)
    listening = socket.create_server(("127.0.0.1", 0))
    process = get_context("fork").Process(
        target=_relay, args=(listening, parts, trips, seconds), daemon=True
    )
    process.start()
    port = listening.getsockname()[1]
    listening.close()
    try:
        url = f"postgresql://{parts['user']}@127.0.0.1:{port}/{parts['dbname']}"
        yield Link(url, process.pid or 0, trips)
    finally:
        process.kill()
        process.join()


def _relay(
    listening: socket.socket, parts: dict[str, Any], trips: "Synchronized[int]", seconds: float
) -> None:
    while True:
        client, _ = listening.accept()
        if os.fork() == 0:
            with suppress(ConnectionError):
                _carry(client, _server(parts), trips, seconds)
            os._exit(0)


def _server(parts: dict[str, Any]) -> socket.socket:
    host, port = str(parts["host"]), int(parts.get("port") or 5432)
    if not host.startswith("/"):
        return socket.create_connection((host, port))
    server = socket.socket(socket.AF_UNIX)
    server.connect(f"{host}/.s.PGSQL.{port}")
    return server


def _carry(
    client: socket.socket, server: socket.socket, trips: "Synchronized[int]", seconds: float
) -> None:
    """Carry bytes both ways; whenever the client speaks after the server did, a trip begins."""
    answered = True
    while True:
        for source in select.select([client, server], [], [])[0]:
            data = source.recv(CHUNK)
            if not data:
                return
            if source is client and answered:
                time.sleep(seconds)
                with trips.get_lock():
                    trips.value += 1
            answered = source is server
            (server if source is client else client).sendall(data)
