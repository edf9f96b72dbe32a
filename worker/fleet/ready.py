"""Makes the control database ready: the engine's tables, and the fleet's numbered SQL files."""

from importlib import resources

from worker import installed_version
from worker.errors import Misconfigured
from worker.store.connection import Connection
from worker.store.migrate import migrations, run_script

_PACKAGE = "worker.fleet"

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


def missing(conn: Connection) -> list[int]:
    """Give the numbers of the files yet to be applied.

    Raises Misconfigured if files were applied that only a newer users-sync has.
    """
    if conn.execute(_IS_THERE, ("users_sync_fleet.migration",)).fetchone() != (True,):
        return list(migrations(_PACKAGE))
    applied: dict[int, str] = dict(conn.execute(_APPLIED).fetchall())
    if newer := applied.keys() - migrations(_PACKAGE).keys():
        raise Misconfigured(
            f"the control database was made ready by a newer users-sync ({applied[max(newer)]}):"
            " update this one"
        )
    return [number for number in migrations(_PACKAGE) if number not in applied]


def make(conn: Connection) -> int:
    """Apply what is missing; returns how many files that was. Raises what `missing` raises."""
    if not missing(conn):
        return 0
    with conn.transaction():
        conn.execute("select pg_advisory_xact_lock(%s)", (_INIT_LOCK,))
        if conn.execute(_IS_THERE, ("procrastinate_jobs",)).fetchone() != (True,):
            engine = resources.files("procrastinate") / "sql" / "schema.sql"
            run_script(conn, engine.read_text("utf-8"))
        run_script(conn, _BOOKKEEPING)
        numbers = missing(conn)  # another process may have been quicker
        for number in numbers:
            name, text = migrations(_PACKAGE)[number]
            run_script(conn, text)
            conn.execute(_RECORD, (number, name, installed_version()))
    return len(numbers)
