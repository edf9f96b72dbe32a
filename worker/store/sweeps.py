"""How far an unfinished sweep has come, and what every sweep did."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from psycopg import sql
from psycopg.types.json import Jsonb

from worker.model import Key
from worker.store.connection import Connection
from worker.store.transaction import Statement

KEPT_DAYS = 30

# A sweep adds one row, so that any number above makes up for sweeps that did not prune.
PRUNED_AT_ONCE = 100

COUNTS = (
    "pages",
    "users",
    "inserted",
    "updated",
    "restored",
    "deleted",
    "approved",
    "hidden",
    "stale",
    "quarantined",
    "held",
    "unasked",
)

# Deletions are counted by their own statement, in the row of the sweep.
_LOAD = """
select c.sweep, c.last_millis, c.last_id, c.started,
       c.counts || jsonb_build_object('deleted', coalesce(s.deleted, 0),
                                      'approved', coalesce(s.approved, 0))
from users_sync_worker.checkpoint c
left join users_sync_worker.sweep s on s.target = c.target and s.number = c.sweep
where c.target = %(target)s and c.asked = %(asked)s
  and c.moved > clock_timestamp() - make_interval(secs => %(seconds)s)
"""

_MOVE = """
insert into users_sync_worker.checkpoint
    (target, asked, sweep, last_millis, last_id, counts, started, moved)
values (%(target)s, %(asked)s, %(sweep)s, %(millis)s, %(id)s, %(counts)s, %(started)s,
        clock_timestamp())
on conflict (target) do update
set asked = excluded.asked, sweep = excluded.sweep, last_millis = excluded.last_millis,
    last_id = excluded.last_id, counts = excluded.counts, started = excluded.started,
    moved = excluded.moved
"""

_CLEAR = "delete from users_sync_worker.checkpoint where target = %(target)s"

_INSERT = """
insert into users_sync_worker.sweep
    (target, number, kind, started, finished, outcome, error, api_seconds, failures, {columns})
values (%(target)s, %(number)s, %(kind)s, %(started)s,
        case when %(outcome)s::text is not null then clock_timestamp() end,
        %(outcome)s, %(error)s, %(api_seconds)s,
        coalesce(%(outcome)s::text in ('failed', 'incomplete'), false)::int, {values})
"""

_RECORD = f"""{_INSERT}
on conflict (target, number) do update
set finished = excluded.finished, outcome = excluded.outcome, error = excluded.error,
    api_seconds = excluded.api_seconds, failures = sweep.failures + excluded.failures,
    {{assignments}}
"""

_ENSURE = f"{_INSERT}on conflict (target, number) do nothing"

# Only the oldest are looked at, along the primary key: to look at all takes 20 ms for 43,000 rows,
# which is what a sweep each minute leaves in 30 days.
_PRUNE = """
delete from users_sync_worker.sweep
where target = %(target)s and started < clock_timestamp() - make_interval(days => %(days)s)
  and number in (
      select number from users_sync_worker.sweep
      where target = %(target)s order by number limit %(at_once)s)
"""

_DELETED_TODAY = """
select coalesce(sum(deleted), 0)::bigint from users_sync_worker.sweep
where target = %(target)s
  and coalesce(finished, started) > clock_timestamp() - interval '1 day'
"""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An unfinished sweep: its number, the key of the last user, and its counts so far."""

    sweep: int
    key: Key
    counts: Mapping[str, int]
    started: datetime


@dataclass(frozen=True, slots=True)
class SweepRow:
    """One row of the `sweep` table; without an outcome it is still at work."""

    number: int
    kind: str
    started: datetime
    counts: Mapping[str, int]
    outcome: str | None = None
    error: str | None = None

    @property
    def api_seconds(self) -> float:
        """How long the API worked for it."""
        return self.counts.get("api_millis", 0) / 1000


@dataclass(frozen=True, slots=True)
class Sweeps:
    """The checkpoint and the sweeps of one target. `asked` says what is asked of which API."""

    target: str
    asked: str

    def load(self, conn: Connection, resume_minutes: float) -> Checkpoint | None:
        """Give the checkpoint, if it is young enough and was made by the same questions."""
        params = {"target": self.target, "asked": self.asked, "seconds": resume_minutes * 60}
        row = conn.execute(_LOAD, params).fetchone()
        return None if row is None else Checkpoint(row[0], (row[1], row[2]), row[4], row[3])

    def deleted_today(self, conn: Connection) -> int:
        """Count what sweeps deleted without approval within a day."""
        row = conn.execute(_DELETED_TODAY, {"target": self.target}).fetchone()
        return row[0] if row else 0

    def move(self, checkpoint: Checkpoint) -> Statement:
        """Set the checkpoint."""
        params = {
            "target": self.target,
            "asked": self.asked,
            "sweep": checkpoint.sweep,
            "millis": checkpoint.key[0],
            "id": checkpoint.key[1],
            "counts": Jsonb(dict(checkpoint.counts)),
            "started": checkpoint.started,
        }
        return Statement(sql.SQL(_MOVE), params)

    def clear(self) -> Statement:
        """Drop the checkpoint: nothing is unfinished."""
        return Statement(sql.SQL(_CLEAR), {"target": self.target})

    def record(self, row: SweepRow) -> Statement:
        """Write a sweep's row, or bring it up to date."""
        params: dict[str, Any] = {
            "target": self.target,
            "number": row.number,
            "kind": row.kind,
            "started": row.started,
            "outcome": row.outcome,
            "error": row.error,
            "api_seconds": row.api_seconds,
            **{name: row.counts.get(name, 0) for name in COUNTS},
        }
        query = sql.SQL(_RECORD).format(
            columns=_listed("{}"),
            values=_listed("%({})s"),
            # The row counts deletions, too, whose commit was not acknowledged.
            assignments=_listed("{0} = greatest(sweep.{0}, excluded.{0})"),
        )
        return Statement(query, params)

    def ensure(self, row: SweepRow) -> Statement:
        """Make sure that there is a row of this number, for deletions to be counted in."""
        query = sql.SQL(_ENSURE).format(columns=_listed("{}"), values=_listed("%({})s"))
        return Statement(query, self.record(row).params)

    def prune(self) -> Statement:
        """Drop some of the rows of sweeps that are too old to be of interest."""
        params = {"target": self.target, "days": KEPT_DAYS, "at_once": PRUNED_AT_ONCE}
        return Statement(sql.SQL(_PRUNE), params)


def _listed(form: str) -> sql.Composed:
    return sql.SQL(", ").join(sql.SQL(form.format(name)) for name in COUNTS)
