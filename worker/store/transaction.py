"""Statements as values, and a transaction of them in as few round trips as possible."""

from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg
from psycopg import sql
from psycopg.pq.abc import PGconn
from psycopg.waiting import Ready, Wait

from worker.store.connection import LONGEST_SECONDS, Connection
from worker.tracing import traced

# Waiting longer for a row that an application has locked would hold up everybody else's changes.
LOCK_TIMEOUT_SECONDS = 2.0

# A page of users and what is found out about it, in memory and not in temporary files.
WORK_MEMORY = "64MB"

# Only for this transaction: behind a pooler the session belongs to others as well.
LIMITS = """
select set_config('statement_timeout', %(statement)s, true),
       set_config('lock_timeout', %(lock)s, true),
       set_config('idle_in_transaction_session_timeout', %(idle)s, true),
       set_config('work_mem', %(memory)s, true)
"""

# For a long read, or a transaction of many round trips, whatever time-outs the role has of its own
# (`alter role … set statement_timeout`). The server waits for us in between: the longest while we
# take in 20,000 keys, 0.05 s, or a second on a tenth of a processor. Without an idle limit it may
# take two hours to notice that we are gone. Before version 17 there is no transaction_timeout.
_LONG_LIMITS = """
select set_config(limits.name, limits.value, true)
from pg_settings join (values
    ('idle_in_transaction_session_timeout', '10s'),
    ('statement_timeout', %(longest)s),
    ('transaction_timeout', '0')
) as limits (name, value) using (name)
"""


Row = tuple[Any, ...]
"""A row of what a statement returned; none of ours returns more than one."""


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement with its parameters."""

    query: sql.SQL | sql.Composed
    params: Mapping[str, Any] = field(default_factory=dict)


@contextmanager
def long_transaction(conn: Connection) -> Iterator[None]:
    """Run a transaction whose statements may take LONGEST_SECONDS, though the role's may not."""
    with conn.transaction():
        conn.execute(_LONG_LIMITS, {"longest": f"{LONGEST_SECONDS:.0f}s"})
        yield


def limits(lease_seconds: float) -> dict[str, str]:
    """Give the parameters of LIMITS for writes under a lease of so many seconds."""
    return {
        "memory": WORK_MEMORY,
        "statement": f"{int(lease_seconds * 1000 / 2)}ms",
        "lock": f"{int(min(LOCK_TIMEOUT_SECONDS, lease_seconds / 4) * 1000)}ms",
        "idle": f"{int(lease_seconds * 1000 / 3)}ms",
    }


@contextmanager
def transaction(conn: Connection) -> Iterator[psycopg.Pipeline]:
    """Run a transaction in a pipeline: psycopg's own would cost three round trips more."""
    with traced("transaction"):
        try:
            with conn.pipeline() as pipeline:
                conn.execute("begin")
                yield pipeline
                conn.execute("commit")
        except BaseException:
            if not conn.closed:
                conn.rollback()
            raise


def push(conn: Connection) -> None:
    """Send all that is queued. A pipeline's sync would wait for answers to what it has not sent.

    psycopg gives up sending when the socket's buffer is full, which a page of users fills, and then
    only reads (its issue 685, fixed for the end of a pipeline alone).
    """
    conn.wait(_flushed(conn.pgconn))


def _flushed(pgconn: PGconn) -> Generator[Wait, Ready | int, None]:
    while pgconn.flush():
        if (yield Wait.RW) & Ready.R:
            pgconn.consume_input()
