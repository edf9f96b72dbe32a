"""The live rows that commands changed beside the holder of the lease."""

from dataclasses import dataclass

from worker.store.connection import Connection

# With more than this, reading everything again is no slower.
MOST_TOUCHED = 200

_LOAD = """
select writes, user_id from users_sync_worker.touched
where target = %(target)s and writes > %(since)s and writes <= %(now)s
"""


@dataclass(frozen=True, slots=True)
class Invalidations:
    """The `touched` rows of one target."""

    target: str

    def between(self, conn: Connection, since: int, now: int) -> list[str] | None:
        """Give the users whose rows were changed while `writes` went from one number to another.

        None if not all of it was done by commands, if it was too much, or if the number went back
        with the whole database.
        """
        if not since < now <= since + MOST_TOUCHED:
            return None
        params = {"target": self.target, "since": since, "now": now}
        rows = conn.execute(_LOAD, params).fetchall()
        ids = {user_id for _, user_id in rows}
        explained = {writes for writes, _ in rows} == set(range(since + 1, now + 1))
        return sorted(ids) if explained and len(ids) <= MOST_TOUCHED else None
