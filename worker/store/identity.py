"""Which table stands under our name, and how it is made, so that another one is noticed."""

from worker.errors import Misconfigured

# By the catalog alone, and without a lock: `pg_get_expr` would wait for a session that alters the
# table.
# `truncate` and a restore change the file node, or the oid; a crash, which empties an unlogged
# table, changes neither. A table may have partitions, or tables that inherit from it, whose rows
# are its rows, too.
TREE = """
with recursive tree as (
    select c.oid from pg_class c join pg_namespace n on n.oid = c.relnamespace
    where n.nspname = %(target)s and c.relname = 'users_sync' and c.relkind in ('r', 'p')
    union
    select i.inhrelid from tree t join pg_inherits i on i.inhparent = t.oid
)
"""

# Null if there is no such table.
IDENTITY = f"""(
{TREE}
select hashtextextended(string_agg(concat_ws(
    ' ', c.oid, c.relfilenode, c.relpersistence, c.relrowsecurity, c.relforcerowsecurity,
    has_table_privilege(c.oid, 'select'), has_table_privilege(c.oid, 'insert'),
    has_table_privilege(c.oid, 'update'), (
        select string_agg(concat_ws(
            ' ', a.attnum, a.attname, a.atttypid, a.atttypmod, a.attnotnull, a.attgenerated,
            a.attidentity, d.adbin::text), ',' order by a.attnum)
        from pg_attribute a
        left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
        where a.attrelid = c.oid and a.attnum > 0 and not a.attisdropped)
), ';' order by c.oid) collate "C", 0)
from tree join pg_class c using (oid)
)"""  # noqa: S608  our own statements


def no_table(target: str) -> Misconfigured:
    """Say that the table is gone since the worker began."""
    return Misconfigured(
        f"{target}.users_sync does not exist any more: run `users-sync init`, which creates it"
    )
