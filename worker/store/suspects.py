"""The suspicions about live rows, from the first notice to the proof or the person who decides."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from psycopg import sql

from worker.store.connection import Connection
from worker.store.transaction import Statement

_LOAD = """
select user_id, state, first_noticed, noticed_at, asked_at
from users_sync_worker.deletion where target = %(target)s
"""

_NOTICE = """
insert into users_sync_worker.deletion
    (target, user_id, state, first_noticed, last_noticed, noticed_at)
select %(target)s, id, 'candidate', %(sweep)s, %(sweep)s, %(noticed_at)s
from unnest(%(ids)s::text[]) as id
on conflict (target, user_id) do nothing
"""

_STRIKE = """
delete from users_sync_worker.deletion where target = %(target)s and user_id = any(%(ids)s)
"""

_CLEAR = """
delete from users_sync_worker.deletion
where target = %(target)s and user_id = any(%(ids)s) and state <> 'hidden'
"""

_HOLD = """
update users_sync_worker.deletion set state = 'held'
where target = %(target)s and user_id = any(%(ids)s) and state in ('candidate', 'hidden')
"""

_HIDE = """
update users_sync_worker.deletion set state = 'hidden', asked_at = clock_timestamp()
where target = %(target)s and user_id = any(%(ids)s)
"""

_ASKED = """
update users_sync_worker.deletion set asked_at = clock_timestamp()
where target = %(target)s and user_id = any(%(ids)s)
"""

_KEEP = """
update users_sync_worker.deletion set last_noticed = %(sweep)s
where target = %(target)s and user_id = any(%(ids)s) and last_noticed < %(sweep)s
"""

_FORGET = """
delete from users_sync_worker.deletion where target = %(target)s and user_id <> all(%(ids)s)
"""

_APPROVE = """
update users_sync_worker.deletion set state = 'approved'
where target = %(target)s and state = 'held' and first_noticed <= %(sweep)s
"""

_LIST = """
select user_id, state, first_noticed, last_noticed
from users_sync_worker.deletion where target = %(target)s
order by first_noticed, state, user_id
"""

_NEVER = datetime.min.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Suspect:
    """A live row whose user was missing from the list. `noticed_at` is when that page was asked."""

    state: str
    first_noticed: int
    noticed_at: datetime
    asked_at: datetime | None = None

    @property
    def turn(self) -> tuple[datetime, int]:
        """When it is its turn to be asked about: what was asked longest ago comes first."""
        return self.asked_at or _NEVER, self.first_noticed


@dataclass(frozen=True, slots=True)
class Suspects:
    """The `deletion` rows of one target."""

    target: str

    def load(self, conn: Connection) -> dict[str, Suspect]:
        """Give every suspect by user id."""
        rows = conn.execute(_LOAD, {"target": self.target})
        return {row[0]: Suspect(*row[1:]) for row in rows}

    def listed(self, conn: Connection) -> list[tuple[str, str, int, int]]:
        """Give (user id, state, first noticed, last noticed), the oldest suspicion first."""
        return [(r[0], r[1], r[2], r[3]) for r in conn.execute(_LIST, {"target": self.target})]

    def approve(self, conn: Connection, sweep: int) -> int:
        """Approve what is held and was first noticed up to this sweep; returns how many."""
        return conn.execute(_APPROVE, {"target": self.target, "sweep": sweep}).rowcount

    def notice(self, ids: Sequence[str], sweep: int, noticed_at: datetime) -> Statement:
        """Record new candidates; what is recorded already keeps its state."""
        return self._statement(_NOTICE, ids, sweep=sweep, noticed_at=noticed_at)

    def strike(self, ids: Iterable[str]) -> Statement:
        """Forget suspects that were seen again, or that are deleted now."""
        return self._statement(_STRIKE, ids)

    def clear(self, ids: Iterable[str]) -> Statement:
        """Forget what was suspected of users whom the API knows; hidden ones may well stay so."""
        return self._statement(_CLEAR, ids)

    def hold(self, ids: Iterable[str]) -> Statement:
        """Hold these until a person approves."""
        return self._statement(_HOLD, ids)

    def hide(self, ids: Iterable[str]) -> Statement:
        """Record that the API still knows these users, though the list leaves them out."""
        return self._statement(_HIDE, ids)

    def asked(self, ids: Iterable[str]) -> Statement:
        """Record that the API was asked about these users just now."""
        return self._statement(_ASKED, ids)

    def keep(self, ids: Iterable[str], sweep: int) -> Statement:
        """Record that these suspects were noticed again."""
        return self._statement(_KEEP, ids, sweep=sweep)

    def forget_others(self, ids: Iterable[str]) -> Statement:
        """Forget every suspect but these."""
        return self._statement(_FORGET, ids)

    def _statement(self, query: str, ids: Iterable[str], **params: object) -> Statement:
        return Statement(sql.SQL(query), {"target": self.target, "ids": list(ids), **params})
