"""Counts the live rows, and those that others wrote, in one pass that writes and locks nothing."""

from dataclasses import dataclass

from worker.store.identity import TREE

# What Postgres counts anyway: while it stands still, there was no write. Null if it does not count.
# Sessions report with up to a minute's delay. A crash sets it back, and this time with it.
MOVES = f"""
{TREE}
select pg_stat_get_bgwriter_stat_reset_time()::text || ' ' || sum(
    pg_stat_get_tuples_inserted(oid) + pg_stat_get_tuples_updated(oid)
    + pg_stat_get_tuples_deleted(oid))::text
from tree where current_setting('track_counts') = 'on'
"""  # noqa: S608  our own statements

# The transaction that wrote a row says who did, without a look at the row. What the last census may
# not have seen is all since the oldest transaction in progress then, for what that wrote behind a
# savepoint bears another number than its own. The age of a row frozen long ago may be negative.
_WRITTEN_BY_OTHERS = """
age(u.xmin) between 0 and (select age(%(since)s::xid8::xid))
and u.xmin <> all(%(own)s::text[]::xid8[]::xid[])
"""

COUNT = f"""
select pg_snapshot_xmin(pg_current_snapshot())::text, count(*) filter (where u.deleted_at is null),
       count(*) filter (where {_WRITTEN_BY_OTHERS})
from {{table}} u
"""  # noqa: S608

LIST = f"""
select u.id::text from {{table}} u
where {_WRITTEN_BY_OTHERS}
  and u.id::text ~ '^[0-9a-f]{{{{8}}}}-([0-9a-f]{{{{4}}}}-){{{{3}}}}[0-9a-f]{{{{12}}}}$'
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Census:
    """What one pass over the table found.

    `moves` is what Postgres had counted before, `horizon` the oldest transaction that was in
    progress: the next census looks at what was written from there on. `by_others` is how many rows
    others have written since the census before.
    """

    moves: str | None
    horizon: str
    live: int
    by_others: int
