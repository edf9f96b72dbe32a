"""Makes the control database ready: the engine's tables, and the fleet's numbered SQL files."""

from importlib import resources

import psycopg

from worker import installed_version
from worker.errors import Misconfigured
from worker.store.connection import Connection

# Advisory locks share one space of numbers; this one was drawn at random.
_INIT_LOCK = 3_914_457_206_118_255

_BOOKKEEPING = """
create schema if not exists users_sync_fleet;
create table if not exists users_sync_fleet.migration (
    number int primary key,
    name text not null,
    version text not null,
    applied_at timestamptz not null default now()
);
comment on table users_sync_fleet.migration is 'Which of the numbered SQL files were applied.';
"""
_APPLIED = "select number, version from users_sync_fleet.migration"
_RECORD = "insert into users_sync_fleet.migration (number, name, version) values (%s, %s, %s)"
_IS_THERE = "select to_regclass(%s) is not null"


def migrations() -> dict[int, tuple[str, str]]:
    """Give every numbered SQL file of the fleet: number, then name and text, in order."""
    folder = resources.files("worker.fleet") / "migrations"
    files = sorted((f for f in folder.iterdir() if f.name.endswith(".sql")), key=lambda f: f.name)
    return {int(file.name[:3]): (file.name, file.read_text("utf-8")) for file in files}


def missing(conn: Connection) -> list[int]:
    """Give the numbers of the files yet to be applied.

    Raises Misconfigured if files were applied that only a newer users-sync has.
    """
    if conn.execute(_IS_THERE, ("users_sync_fleet.migration",)).fetchone() != (True,):
        return list(migrations())
    applied: dict[int, str] = dict(conn.execute(_APPLIED).fetchall())
    if newer := applied.keys() - migrations().keys():
        raise Misconfigured(
            f"the control database was made ready by a newer users-sync ({applied[max(newer)]}):"
            " update this one"
        )
    return [number for number in migrations() if number not in applied]


def make(conn: Connection) -> int:
    """Apply what is missing; returns how many files that was. Raises what `missing` raises."""
    if not missing(conn):
        return 0
    with conn.transaction():
        conn.execute("select pg_advisory_xact_lock(%s)", (_INIT_LOCK,))
        if conn.execute(_IS_THERE, ("procrastinate_jobs",)).fetchone() != (True,):
            engine = resources.files("procrastinate") / "sql" / "schema.sql"
            _run_script(conn, engine.read_text("utf-8"))
        _run_script(conn, _BOOKKEEPING)
        numbers = missing(conn)  # another process may have been quicker
        for number in numbers:
            name, text = migrations()[number]
            _run_script(conn, text)
            conn.execute(_RECORD, (number, name, installed_version()))
    return len(numbers)


def _run_script(conn: Connection, text: str) -> None:
    psycopg.Cursor(conn).execute(text.encode())
