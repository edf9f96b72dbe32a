"""What is done to users_sync: load the live keys, apply users, mark users deleted."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime

from psycopg import sql
from psycopg.types.json import Jsonb

from worker.mirror import NO_MILLIS
from worker.model import User, ids_of, json_array
from worker.store.database import Connection
from worker.store.shape import TABLE, Shape
from worker.store.statement import Statement
from worker.store.transaction import IDLE_LIMIT

INSERTED, UPDATED, RESTORED, UNCHANGED, STALE = "iur=s"
DELETED, WAITING = "dw"

Outcome = tuple[Sequence[User], str]
"""Users and what became of them, a letter for each."""

# With the letters of a whole transaction this stays below what fits into a socket's buffers: a
# backend that sends more to a stopped client is ended by no time-out.
MOST_MOVED = 200

_LOAD_CHUNK = 20_000

# Exact to the year 9999; what lies beyond is read from the record itself, if that has it: a plain
# table may hold anything.
_MILLIS = """
case when not isfinite({u}.created_at) then null
     when {u}.created_at >= '10000-01-01'
          and {u}.raw_json->>'signed_up_at_millis' ~ '^-?[0-9]{{1,18}}$'
     then ({u}.raw_json->>'signed_up_at_millis')::bigint
     else (extract(epoch from {u}.created_at) * 1000)::bigint end
"""

_LOAD = """
select coalesce({millis}, {no_millis}) as millis, decode(replace(u.id::text, '-', ''), 'hex') as id
from {table} u
where u.deleted_at is null
  and u.id::text ~ '^[0-9a-f]{{8}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{12}}$'
  and {these}
order by millis, id
"""

_THESE = "u.id = any(%(ids)s::{id_type}[])"

# What an answer says of these users, and those of them who have a row.
COMPARED = """
with incoming as materialized (
    select position, record, (record->>'id')::{id_type} as id,
           (record->>'signed_up_at_millis')::bigint as millis
    from jsonb_array_elements(%(records)s::jsonb) with ordinality as r (record, position)
), old as materialized (
    select i.*, u.deleted_at is not null as was_deleted,
           u.deleted_at is null and not ({differs}) as same, {millis} as old_millis
    from incoming i join {table} u on u.id = i.id
)"""

# Joined to the old rows first: `on conflict do update` would lock the unchanged ones, too. The
# tests that a concurrent writer may upset stand on the target row itself, because after waiting for
# a lock Postgres re-checks only those. The records come in one parameter: `COPY` into a temporary
# table takes as long for new users, and another round trip. `letters` has no records: sorting those
# would take longer than all that is found out about them.
_CHANGED = """, changed as (
    update {table} u
    set {assignments}, updated_at = clock_timestamp(), deleted_at = null
    from old i
    where u.id = i.id and not i.same
      and ({differs} or u.deleted_at is not null)
      and {not_stale}
    returning u.id
), added as (
    insert into {table} ({columns}, updated_at, deleted_at)
    select {values}, null, null
    from incoming i where not exists (select from old o where o.position = i.position)
    on conflict (id) do nothing
    returning id
), letters as (
    select position, o.old_millis, i.millis,
           case when a.id is not null then 'i'
                when c.id is not null and o.was_deleted then 'r'
                when c.id is not null then 'u'
                when o.same then '='
                else 's' end as letter
    from incoming i left join old o using (position)
         left join changed c on c.id = i.id left join added a on a.id = i.id
)
"""

RETURNED = """
select coalesce(string_agg(letter, '' order by position), ''),
       (array_agg(position - 1 order by position) filter (where {moved}))[1:%(most_moved)s],
       (array_agg(coalesce(old_millis, {no_millis}) order by position)
        filter (where {moved}))[1:%(most_moved)s]"""

_APPLY = f"{COMPARED}{_CHANGED}{RETURNED}\nfrom letters"

# Neither looked up nor prepared for a conflict, nor told of one by one: newcomers then take as long
# as by `COPY`, and a fifth less than with `on conflict do nothing`.
_INSERT = """
insert into {table} ({columns}, updated_at, deleted_at)
select {values}, null, null
from (select record, (record->>'id')::{id_type} as id
      from jsonb_array_elements(%(records)s::jsonb) as r (record)) i
"""

_NOT_STALE = """
not coalesce(%(observed_at)s < u.updated_at and u.updated_at <= clock_timestamp(), false)
and not coalesce(%(observed_at)s < u.deleted_at and u.deleted_at <= clock_timestamp(), false)
and not coalesce(
    u.deleted_at <= clock_timestamp()
    and %(observed_at)s <= u.deleted_at + make_interval(secs => %(grace_seconds)s), false)
"""

_MOVED = "letter in ('u', 'r') and old_millis is distinct from millis"

_PLAIN_VALUES = {
    "name": "i.record->>'display_name'",
    "email": "i.record->>'primary_email'",
    "created_at": (
        "to_timestamp(trunc((i.record->>'signed_up_at_millis')::bigint::double precision) / 1000)"
    ),
}

_SAME_RECORD = """
(case when jsonb_typeof(u.raw_json) = 'object' then u.raw_json - %(ignored)s::text[]
      else u.raw_json end) is distinct from i.record - %(ignored)s::text[]
"""

PROVEN = """
with proof as materialized (
    select position, id::{id_type} as id, observed_at
    from unnest(%(ids)s::text[], %(observed_at)s::timestamptz[]) with ordinality
        as p (id, observed_at, position)
)"""

_MARKED = """, marked as (
    update {table} u set deleted_at = clock_timestamp()
    from proof p
    where u.id = p.id and u.deleted_at is null and not ({young}) and {not_newer} and {fresh}
    returning u.id
), counted as (
    update users_sync_worker.sweep
    set {counter} = {counter} + (select count(*) from marked)
    where target = %(target)s and number = %(sweep)s
)
select coalesce(string_agg(
    case when m.id is not null then 'd'
         when u.id is not null and u.deleted_at is null and ({young} or not {fresh}) then 'w'
         else 's' end, '' order by p.position), '')
from proof p left join marked m on m.id = p.id left join {table} u on u.id = p.id
"""

_SOFT_DELETE = f"{PROVEN}{_MARKED}"

# Whoever was gone longer ago may be back since.
_FRESH = "(p.observed_at > clock_timestamp() - make_interval(secs => %(proof_seconds)s))"

_NOT_NEWER = """
not coalesce(p.observed_at < u.updated_at and u.updated_at <= clock_timestamp(), false)
"""

# The list may come from a replica that lags. Times in the future are not believed.
_YOUNG = """
coalesce(u.created_at > clock_timestamp() - make_interval(secs => %(grace_seconds)s)
         and u.created_at <= clock_timestamp(), false)
or coalesce(u.updated_at > clock_timestamp() - make_interval(secs => %(grace_seconds)s)
            and u.updated_at <= clock_timestamp(), false)
"""

# In the mode in which an update of ours locks rows, whose key never changes.
_LOCKED = """
with free as materialized (
    select u.id from {table} u where {these} for no key update skip locked
)
select (array_agg(u.id::text))[1:%(most)s] from {table} u
where {these} and u.id not in (select id from free)
"""

# Their ids fit into a socket's buffers, as MOST_MOVED do.
MOST_LOCKED = 500

_STATE = "select deleted_at is null from {table} where id::text = %(id)s"

_SAMPLE = """
select id::text from (
    select id, row_number() over (order by id) as at, count(*) over () as live
    from {table} u where deleted_at is null
      and id::text ~ '^[0-9a-f]{{8}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{12}}$'
) u
where (at - 1) %% greatest(1, (live + %(count)s - 1) / %(count)s) = 0
order by at
"""


@dataclass(frozen=True, slots=True)
class Table:
    """The users_sync table of one schema, in the shape that was found, and how it is compared.

    A proof that is older than `proof_seconds` marks nobody deleted.
    """

    schema: str
    shape: Shape
    ignored_fields: tuple[str, ...]
    grace_seconds: float
    proof_seconds: float = field(default=60, kw_only=True)

    @property
    def relation(self) -> sql.SQL:
        """What is read from and written to, for a query that has parameters."""
        return quoted(self.schema)

    @property
    def own_values(self) -> dict[str, str]:
        """Give the columns that we write beside the record, each with what it must hold."""
        return {} if self.shape is Shape.GENERATED else _PLAIN_VALUES

    def load_keys(self, conn: Connection) -> Iterator[tuple[int, bytes]]:
        """Give (millis, 16-byte id) of every live row in the order of the list, in one pass."""
        with conn.transaction(), conn.cursor("users_sync_keys", binary=True) as cursor:
            conn.execute(IDLE_LIMIT)
            cursor.itersize = _LOAD_CHUNK
            yield from cursor.execute(self._sql(_LOAD, these=sql.SQL("true")), {})

    def load_keys_of(self, conn: Connection, ids: Sequence[str]) -> list[tuple[int, bytes]]:
        """Give (millis, 16-byte id) of those of these users whose rows are live."""
        these = sql.SQL(_THESE).format(id_type=self.shape.id_type)
        rows = conn.execute(self._sql(_LOAD, these=these), {"ids": list(ids)})
        return [(row[0], row[1]) for row in rows]

    def sample_ids(self, conn: Connection, count: int) -> list[str]:
        """Give up to `count` ids of live rows, spread over the table."""
        return [row[0] for row in conn.execute(self._sql(_SAMPLE), {"count": count})]

    def is_live(self, conn: Connection, user_id: str) -> bool | None:
        """Whether a user's row is live; None if there is none."""
        row = conn.execute(self._sql(_STATE), {"id": user_id}).fetchone()
        return None if row is None else bool(row[0])

    def apply(self, users: Sequence[User], observed_at: datetime) -> Statement:
        """Write what `observed_at` saw of these users, unless a row is newer.

        Returns one letter per user, in order, and of the rows whose key changed the positions and
        the millis they had before.
        """
        params = {
            "records": Jsonb(users, dumps=json_array),
            "ignored": list(self.ignored_fields),
            "observed_at": observed_at,
            "grace_seconds": self.grace_seconds,
            "most_moved": MOST_MOVED,
        }
        return Statement(self._sql(_APPLY), params)

    def insert(self, users: Sequence[User], observed_at: datetime) -> Statement:  # noqa: ARG002
        """Write users of whom nobody is known to have a row, whenever they were seen.

        Returns no rows. If some have one after all, the database refuses all of them.
        """
        return Statement(self._sql(_INSERT), {"records": Jsonb(users, dumps=json_array)})

    def locked(self, users: Sequence[User]) -> Statement:
        """Find rows of these users that somebody else keeps locked; returns an array of ids."""
        these = sql.SQL(_THESE).format(id_type=self.shape.id_type)
        params = {"ids": ids_of(users), "most": MOST_LOCKED}
        return Statement(self._sql(_LOCKED, these=these), params)

    def soft_delete(
        self, proofs: Sequence[tuple[str, datetime]], sweep: int, *, approved: bool
    ) -> Statement:
        """Mark users deleted that a GET at the given moment proved gone; returns a letter for each.

        The row of the sweep, which must be there, counts them in the same statement: the guard
        relies on that count.
        """
        params = {
            "target": self.schema,
            "sweep": sweep,
            "ids": [user_id for user_id, _ in proofs],
            "observed_at": [observed_at for _, observed_at in proofs],
            "grace_seconds": self.grace_seconds,
            "proof_seconds": self.proof_seconds,
        }
        counter = sql.Identifier("approved" if approved else "deleted")
        return Statement(self._sql(_SOFT_DELETE, counter=counter), params)

    def _sql(self, template: str, **names: sql.Composable) -> sql.Composed:
        own = self.own_values
        columns = {"raw_json": "i.record", **own}
        if self.shape is not Shape.GENERATED:
            columns["id"] = "i.id"
        differs = [_SAME_RECORD, *(f"u.{name} is distinct from {of}" for name, of in own.items())]
        return sql.SQL(template).format(
            **names,
            table=self.relation,
            id_type=self.shape.id_type,
            millis=sql.SQL(_MILLIS).format(u=sql.Identifier("u")),
            no_millis=sql.Literal(NO_MILLIS),
            not_stale=sql.SQL(_NOT_STALE),
            not_newer=sql.SQL(_NOT_NEWER),
            fresh=sql.SQL(_FRESH),
            young=sql.SQL(_YOUNG),
            moved=sql.SQL(_MOVED),
            differs=sql.SQL(" or ").join(map(sql.SQL, differs)),
            assignments=_listed(f"{name} = {of}" for name, of in columns.items() if name != "id"),
            columns=_listed(columns),
            values=_listed(columns.values()),
        )


def quoted(schema: str) -> sql.SQL:
    """Give the name of a schema's table for a query that has parameters."""
    # A percent sign must be doubled there, and psycopg leaves that to us.
    return sql.SQL(sql.Identifier(schema, TABLE).as_string().replace("%", "%%"))


def _listed(parts: Iterable[str]) -> sql.Composed:
    return sql.SQL(", ").join(map(sql.SQL, parts))
