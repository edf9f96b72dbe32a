"""The records that cannot be stored as they are, with what was wrong with them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from psycopg import sql

from worker.errors import DataRefused
from worker.model import Unreadable, User
from worker.store.connection import Connection
from worker.store.transaction import Statement

_LOAD = """
select record, digest, error, permanent from users_sync_worker.quarantine
where target = %(target)s
"""

_PUT = """
insert into users_sync_worker.quarantine
    (target, record, user_id, digest, payload, error, permanent, first_seen, last_seen, times)
select %(target)s, record, user_id, digest, payload, error, permanent,
       statement_timestamp(), statement_timestamp(), 1
from unnest(%(record)s::text[], %(user_id)s::text[], %(digest)s::text[], %(payload)s::text[],
            %(error)s::text[], %(permanent)s::boolean[])
    as r (record, user_id, digest, payload, error, permanent)
on conflict (target, record) do update
set digest = excluded.digest, payload = excluded.payload, error = excluded.error,
    permanent = excluded.permanent, last_seen = excluded.last_seen, times = quarantine.times + 1
"""

_FORGET_USER = """
delete from users_sync_worker.quarantine where target = %(target)s and user_id = %(user_id)s
"""

_LIST = """
select record, user_id, error, permanent, first_seen, last_seen, times
from users_sync_worker.quarantine where target = %(target)s order by first_seen, record
"""

_FORGET = """
delete from users_sync_worker.quarantine where target = %(target)s and record <> all(%(records)s)
"""


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record and why it is not in the table; `permanent` if it fails for as long as it is so.

    That is sure only of what we refuse ourselves: an error of the database may come from a trigger,
    a constraint or an index, whatever its SQLSTATE. `blames_data` says that the record itself looks
    odd, and not what refused it.
    """

    user_id: str | None
    digest: str
    payload: str
    error: str
    permanent: bool = True
    blames_data: bool = True

    @property
    def record(self) -> str:
        """What it is known by: its user id, or its digest if that cannot be read."""
        return self.user_id or self.digest


class QuarantineMark(NamedTuple):
    """What to remember of a record in quarantine."""

    digest: str
    error: str
    permanent: bool


@dataclass(frozen=True, slots=True)
class QuarantineRow:
    """One row of the quarantine, without the record itself, which is personal data."""

    record: str
    user_id: str | None
    error: str
    permanent: bool
    first_seen: datetime
    last_seen: datetime
    times: int


@dataclass(frozen=True, slots=True)
class Quarantine:
    """The `quarantine` rows of one target."""

    target: str

    def load(self, conn: Connection) -> dict[str, QuarantineMark]:
        """Give every record, by what it is known by."""
        rows = conn.execute(_LOAD, {"target": self.target})
        return {row[0]: QuarantineMark(*row[1:]) for row in rows}

    def put(self, rejected: Sequence[BadRecord]) -> Statement:
        """Record them, or that they were seen again; of a record that is there twice the last."""
        names = ("record", "user_id", "digest", "payload", "error", "permanent")
        records = {each.record: each for each in rejected}.values()
        columns = {name: [getattr(each, name) for each in records] for name in names}
        return Statement(sql.SQL(_PUT), {"target": self.target, **columns})

    def forget_others(self, records: Iterable[str]) -> Statement:
        """Forget every record but these."""
        return Statement(sql.SQL(_FORGET), {"target": self.target, "records": list(records)})

    def forget(self, user_id: str) -> Statement:
        """Forget the record of one user."""
        return Statement(sql.SQL(_FORGET_USER), {"target": self.target, "user_id": user_id})

    def listed(self, conn: Connection) -> list[QuarantineRow]:
        """Give what is in quarantine, the oldest first."""
        return [QuarantineRow(*row) for row in conn.execute(_LIST, {"target": self.target})]


def refused_record(user: User, error: DataRefused) -> BadRecord:
    """Describe a user that the database refused."""
    return BadRecord(
        user_id=user.id,
        digest=user.fingerprint.hex(),
        payload=user.json.decode(),
        error=f"refused by the database: {error.code}",
        permanent=False,
        blames_data=error.blames_data,
    )


def unreadable_record(record: Unreadable) -> BadRecord:
    """Describe a record that could not even be read."""
    return BadRecord(record.id, record.fingerprint.hex(), record.payload, record.error)
