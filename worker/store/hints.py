"""Hints: users to look at now, left in a table by applications and webhooks."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from psycopg import sql

from worker.store.connection import Connection
from worker.store.transaction import Statement

_LOAD = """
select user_id, asked_at from users_sync_worker.hint
where target = %(target)s order by asked_at limit %(most)s
"""

_LEAVE = """
insert into users_sync_worker.hint (target, user_id)
select distinct %(target)s, id from unnest(%(ids)s::text[]) as id
on conflict (target, user_id) do update set asked_at = clock_timestamp()
"""

# A hint that was left again meanwhile is about a later change.
_REMOVE = """
delete from users_sync_worker.hint h
using unnest(%(ids)s::text[], %(asked_at)s::timestamptz[]) as done (user_id, asked_at)
where h.target = %(target)s and h.user_id = done.user_id and h.asked_at <= done.asked_at
"""

_CLEAR = """
delete from users_sync_worker.hint where target = %(target)s and asked_at <= %(before)s
"""


@dataclass(frozen=True, slots=True)
class Hints:
    """The `hint` rows of one target."""

    target: str

    def load(self, conn: Connection, most: int) -> dict[str, datetime]:
        """Give user ids with the moment of each hint, the oldest first, and at most so many."""
        params = {"target": self.target, "most": most}
        return {row[0]: row[1] for row in conn.execute(_LOAD, params)}

    def leave(self, conn: Connection, ids: Iterable[str]) -> None:
        """Leave a hint for each of these users; needs no lease."""
        # In the order of the key, so that two that leave the same hints do not deadlock.
        conn.execute(_LEAVE, {"target": self.target, "ids": sorted(ids)})

    def remove(self, done: Mapping[str, datetime]) -> Statement:
        """Remove hints that were followed, unless they were left again since."""
        params = {
            "target": self.target,
            "ids": list(done),
            "asked_at": list(done.values()),
        }
        return Statement(sql.SQL(_REMOVE), params)

    def clear(self, before: datetime) -> Statement:
        """Remove all hints up to this moment."""
        return Statement(sql.SQL(_CLEAR), {"target": self.target, "before": before})
