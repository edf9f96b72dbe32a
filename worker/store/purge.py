"""Removes rows that were soft-deleted long ago, so that what refers to them goes or is nulled."""

from collections.abc import Sequence
from dataclasses import dataclass

from psycopg import sql

from worker.store.connection import Connection
from worker.store.table import Table, quoted
from worker.store.table_shape import TABLE
from worker.store.transaction import Statement, long_transaction

_ALL_DUE = """ from {table}
where deleted_at <= clock_timestamp() - make_interval(secs => %(seconds)s)
  and id::text ~ '^[0-9a-f]{{8}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{4}}-[0-9a-f]{{12}}$'
"""

_COUNT_DUE = f"select count(*){_ALL_DUE}"

# In the order of ids, so that those which have to stay are passed by once.
_DUE = f"""
select id::text{_ALL_DUE}  and id > %(behind)s::{{id_type}}
order by id limit %(limit)s
"""

_PURGE = """
with purged as (
    delete from {table}
    where id = any(%(ids)s::{id_type}[])
      and deleted_at <= clock_timestamp() - make_interval(secs => %(seconds)s)
    returning id
)
select count(*) from purged
"""

# Of a partitioned table only the constraint on the whole.
_REFERENCES = """
select n.nspname, t.relname, c.conname,
       array(select a.attname::text from unnest(c.conkey) with ordinality as k (num, place)
             join pg_attribute a on a.attrelid = c.conrelid and a.attnum = k.num order by place),
       array(select a.attname::text from unnest(c.confkey) with ordinality as k (num, place)
             join pg_attribute a on a.attrelid = c.confrelid and a.attnum = k.num order by place),
       c.confdeltype::text, has_table_privilege(t.oid, 'select')
from pg_constraint c join pg_class t on t.oid = c.conrelid
join pg_namespace n on n.oid = t.relnamespace
where c.contype = 'f' and c.conparentid = 0
  and c.confrelid = to_regclass(format('%%I.%%I', %(schema)s::text, %(table)s::text))
order by 1, 2, 3
"""

_REFERRING = """
select u.id::text, count(*) from {child} c join {table} u on {same}
where u.id = any(%(ids)s::{id_type}[]) group by u.id
"""

_KEEPING = {"restrict", "no action"}

_ACTIONS = {"c": "cascade", "n": "set null", "d": "set default", "r": "restrict", "a": "no action"}


@dataclass(frozen=True, slots=True)
class Reference:
    """A foreign key on users_sync; `action` is what it does when a row goes."""

    schema: str
    table: str
    name: str
    columns: tuple[str, ...]
    referred: tuple[str, ...]
    action: str
    countable: bool

    @property
    def keeps(self) -> bool:
        """Whether it keeps a row from going that is referred to."""
        return self.action in _KEEPING

    def __str__(self) -> str:
        return f"{self.schema}.{self.table}.{', '.join(self.columns)} ({self.action})"


@dataclass(frozen=True, slots=True)
class Purging:
    """The rows of one table that were soft-deleted more than `seconds` ago."""

    table: Table
    seconds: float

    def count_due(self, conn: Connection) -> int:
        """Count all that `due` would give."""
        with long_transaction(conn):
            row = conn.execute(self._sql(_COUNT_DUE), {"seconds": self.seconds}).fetchone()
        return row[0] if row else 0

    def due(self, conn: Connection, behind: str, limit: int) -> list[str]:
        """Give the next ids behind this one; ids that are no UUID are not Stack Auth's."""
        params = {"seconds": self.seconds, "behind": behind, "limit": limit}
        with long_transaction(conn):
            return [row[0] for row in conn.execute(self._sql(_DUE), params)]

    def purge(self, ids: Sequence[str]) -> Statement:
        """Remove these rows unless they came back; returns how many."""
        return Statement(self._sql(_PURGE), {"ids": list(ids), "seconds": self.seconds})

    def references(self, conn: Connection) -> list[Reference]:
        """Give the foreign keys on the table."""
        params = {"schema": self.table.schema, "table": TABLE}
        return [
            Reference(
                row[0], row[1], row[2], tuple(row[3]), tuple(row[4]), _ACTIONS[row[5]], row[6]
            )
            for row in conn.execute(_REFERENCES, params)
        ]

    def referring(
        self, conn: Connection, reference: Reference, ids: Sequence[str]
    ) -> dict[str, int]:
        """Count the rows that refer to each of these users by this foreign key."""
        pairs = zip(reference.columns, reference.referred, strict=True)
        same = [
            sql.SQL("{} = {}").format(
                _doubled(sql.Identifier("c", own)), _doubled(sql.Identifier("u", other))
            )
            for own, other in pairs
        ]
        child = _doubled(sql.Identifier(reference.schema, reference.table))
        query = self._sql(_REFERRING, child=child, same=sql.SQL(" and ").join(same))
        with long_transaction(conn):
            return {row[0]: row[1] for row in conn.execute(query, {"ids": list(ids)})}

    def _sql(self, template: str, **parts: sql.Composable) -> sql.Composed:
        name = quoted(self.table.schema)
        return sql.SQL(template).format(table=name, id_type=self.table.shape.id_type, **parts)


def _doubled(name: sql.Identifier) -> sql.SQL:
    return sql.SQL(name.as_string().replace("%", "%%"))
