"""How many users the table refuses, or would refuse by its own constraints."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import psycopg
from psycopg import sql
from psycopg.types.json import Jsonb

from worker.cli.check.result import Finding, alike
from worker.model import User, Users
from worker.store.connection import Connection
from worker.store.table_shape import Shape, detect_shape

_REFUSED = """
select error, count(*) from users_sync_worker.quarantine
where target = %(schema)s and not permanent group by error order by 2 desc, 1
"""

_CONSTRAINTS = """
select quote_ident(conname), pg_get_expr(conbin, conrelid, true) from pg_constraint
where conrelid = format('%%I.users_sync', %(schema)s::text)::regclass and contype = 'c'
union all
select format('not null of column %%I', attname), format('%%I is not null', attname)
from pg_attribute
where attrelid = format('%%I.users_sync', %(schema)s::text)::regclass and attnotnull
  and attname in ('name', 'email')
order by 1
"""

# What a constraint calls must not write anything, and must come to an end.
_READ_ONLY = """
select set_config('transaction_read_only', 'on', true), set_config('statement_timeout', '10s', true)
"""

# A constraint that is null lets a row pass.
_COUNT = """
select count(*) from (
    select i.record as raw_json, (i.record->>'id')::{id_type} as id,
           i.record->>'display_name' as name, i.record->>'primary_email' as email,
           to_timestamp((i.record->>'signed_up_at_millis')::bigint / 1000.0) as created_at,
           null::timestamptz as updated_at, null::timestamptz as deleted_at
    from jsonb_array_elements(%(records)s::jsonb) as i (record)
) users_sync where not ({expression})
"""


def find_refused(conn: Connection, schema: str) -> list[Finding]:
    """Say how many users are in quarantine because the database refuses them, and why."""
    texts = [
        f"{_users(count)} {error}; `users-sync quarantine` lists them"
        for error, count in conn.execute(_REFUSED, {"schema": schema})
    ]
    return alike("warn", "table", texts)


def find_refusable(conn: Connection, schema: str, users: Sequence[User]) -> list[Finding]:
    """Say how many of these users, the first of the list, a constraint of the table refuses."""
    shape = detect_shape(conn, schema) if users else None
    if shape is None:
        return []
    texts = [
        f"{count} of the first {_users(len(users))} would be refused by {name}: they stay in"
        " quarantine unless it lets them pass"
        for name, count in _count(conn, schema, shape, users)
        if count
    ]
    return alike("warn", "table", texts)


def _count(
    conn: Connection, schema: str, shape: Shape, users: Sequence[User]
) -> Iterator[tuple[str, int]]:
    records = Jsonb(Users.of(users), dumps=lambda them: them.json)
    for name, expression in conn.execute(_CONSTRAINTS, {"schema": schema}).fetchall():
        own = sql.SQL(expression.replace("%", "%%"))
        query = sql.SQL(_COUNT).format(id_type=shape.id_type, expression=own)
        # A constraint that looks at columns of others, or fails, is passed over.
        with suppress(psycopg.Error), conn.transaction():
            conn.execute(_READ_ONLY)
            row = conn.execute(query, {"records": records}).fetchone()
            yield name, row[0] if row else 0


def _users(count: int) -> str:
    return "1 user" if count == 1 else f"{count} users"
