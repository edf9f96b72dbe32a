"""What the check finds out by trying: a made-up user is written, and all of it rolled back."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import psycopg

from worker.cli.check.publications import find_publications
from worker.cli.check.result import Finding
from worker.store.connection import Connection
from worker.store.probe import ProbedTable
from worker.store.table_shape import Shape
from worker.store.transaction import LIMITS, limits

# No statement takes half of this, and none waits for a lock longer than 2 s.
PROBE_SECONDS = 20

_IS_READ_ONLY = "select current_setting('transaction_read_only')::boolean or pg_is_in_recovery()"

# Constraints and triggers that would wait for a commit are tried, too.
_NOTHING_DEFERRED = "set constraints all immediate"

_MEDDLERS = """
select coalesce(string_agg(name, ', ' order by name), '') from (
    select format('trigger %%I', tgname) as name from pg_trigger
    where tgrelid = format('%%I.users_sync', %(schema)s::text)::regclass and not tgisinternal
      and tgenabled in ('O', 'A')
    union all
    select format('rule %%I', rulename) from pg_rewrite
    where ev_class = format('%%I.users_sync', %(schema)s::text)::regclass
) m
"""

_ROLE = "select quote_ident(current_user)"

# What a record or the table's rules for it may be to blame for: users like it go to quarantine.
_OF_DATA = {"21", "22", "23", "44", "54", "P0"}
# What passes by itself, unless a function raised it.
_PASSING = {"08", "40", "53", "57", "58"}
# A time-out may be a lock's.
_LOCKED = {"55P03", "57014"}
_NO_REPLICA_IDENTITY = {"42P10", "55000"}

# Of errors in a function, such as a trigger's, Postgres' own words in these cases name objects
# alone: a lacking right, a missing table, function or schema. All others may quote a row.
_NAME_OBJECTS = {"42501", "42P01", "42883", "3F000"}
_RAISE = "exec_stmt_raise"

# These say in their detail what is wrong with a publication or a column.
_DETAILED = {"42P10", "0A000", "55000"}

_FUNCTION = re.compile(
    r"^(?:PL/\w+|SQL) function (.+?)(?= line \d+| during | statement \d+|$)", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class _Step:
    """One thing to try; `failed` says what is wrong if the table does something else."""

    what: str
    attempt: Callable[[Connection], bool]
    failed: str


def find_refusals(conn: Connection, schema: str, shape: Shape) -> list[Finding]:
    """Insert, update, mark deleted and restore a made-up user; say what the table made of it.

    All of it is rolled back. Where nothing can be written, nothing is tried.
    """
    if conn.execute(_IS_READ_ONLY).fetchone() == (True,):
        return []
    table = ProbedTable(schema, shape, (), 0)
    with conn.transaction(force_rollback=True):
        conn.execute(LIMITS, limits(PROBE_SECONDS))
        conn.execute(_NOTHING_DEFERRED)
        return _try_all(conn, table)


def _try_all(conn: Connection, table: ProbedTable) -> list[Finding]:
    """Go on until something fails: what comes after it would only fail, too."""
    found = _try_each(
        conn,
        table,
        _Step("an insert", table.try_insert, "leaves no row"),
        _Step("a search", table.try_find, "by the id that was written does not find the row"),
    )
    if found:
        return found
    return [
        *_judge_values(conn, table),
        *_try_each(
            conn,
            table,
            _Step("an update", table.try_update, "leaves the row as it was"),
            _Step("a soft delete", table.try_soft_delete, "leaves the row live"),
            _Step("a restoration", table.try_restore, "leaves the row deleted"),
        ),
    ]


def _try_each(conn: Connection, table: ProbedTable, *steps: _Step) -> list[Finding]:
    attempts = (_try(conn, table, step) for step in steps)
    return next((found for found in attempts if found), [])


def _try(conn: Connection, table: ProbedTable, step: _Step) -> list[Finding]:
    try:
        with conn.transaction():
            done = step.attempt(conn)
    except psycopg.Error as error:
        if error.sqlstate is None or _passes(error):
            raise
        return _refused(conn, table, step, error)
    if done:
        return []
    return [Finding("FAIL", "table", f"{step.what} {step.failed}{_because(conn, table)}", 2)]


def _passes(error: psycopg.Error) -> bool:
    state = error.sqlstate or ""
    return state[:2] in _PASSING and state not in _LOCKED and not error.diag.context


def _refused(
    conn: Connection, table: ProbedTable, step: _Step, error: psycopg.Error
) -> list[Finding]:
    state = error.sqlstate or ""
    text = f"{step.what} of a made-up user is refused: {_server_words(error)}"
    if state in _LOCKED:
        return [Finding("warn", "table", f"{text}; run the check again later")]
    if state[:2] in _OF_DATA:
        return [Finding("warn", "table", f"{text}; users like it go to quarantine")]
    if state in _NO_REPLICA_IDENTITY and not error.diag.context:
        return [
            Finding("FAIL", "table", text, 2),
            *find_publications(conn, table.schema),
        ]
    if state == "42501":
        [(role,)] = conn.execute(_ROLE)
        return [Finding("FAIL", "table", f"{text}; let its owner grant that right to {role}", 2)]
    return [Finding("FAIL", "table", f"{text}{_because(conn, table)}", 2)]


def _server_words(error: psycopg.Error) -> str:
    """Give the server's words and SQLSTATE in one line, and the function that failed."""
    diag = error.diag
    words = type(error).__name__
    if not diag.context:
        words = diag.message_primary or words
        if diag.message_detail and error.sqlstate in _DETAILED:
            words = f"{words}: {diag.message_detail.rstrip('.')}"
    elif error.sqlstate in _NAME_OBJECTS and diag.source_function not in {None, _RAISE}:
        words = diag.message_primary or words
    elif diag.constraint_name:
        words = f"{words} {diag.constraint_name}"
    inside = _FUNCTION.search(diag.context or "")
    where = f" in the function {inside[1]}" if inside else ""
    return f"{' '.join(words.split())} ({error.sqlstate}){where}"


def _because(conn: Connection, table: ProbedTable) -> str:
    """Name what may be in the way of a statement."""
    [(names,)] = conn.execute(_MEDDLERS, {"schema": table.schema})
    return f"; see {names}" if names else ""


def _judge_values(conn: Connection, table: ProbedTable) -> list[Finding]:
    """Say which columns hold something else than was written."""
    names = table.differing(conn)
    if not names:
        return []
    because = _because(conn, table)
    if "created_at" in names:
        text = "created_at does not hold the sign-up to the millisecond: the row is never in step"
        return [Finding("FAIL", "table", text + because, 2)]
    text = f"{', '.join(names)} of a row differ from what was written: each `--once` writes it"
    return [Finding("warn", "table", f"{text} again{because}")]
