"""Which publications keep users_sync from being updated, and how to change that."""

from worker.cli.check.result import Finding
from worker.store.connection import Connection

# The columns of a catalog that came with PostgreSQL 15 or 18 are read as JSON.
_PUBLICATIONS = """
select quote_ident(p.pubname), to_jsonb(p)->>'pubgencols' = 'n',
       to_jsonb(r)->>'prqual' is not null, to_jsonb(r)->>'prattrs' is not null
from pg_publication_tables t
join pg_publication p on p.pubname = t.pubname
left join pg_publication_rel r on r.prpubid = p.oid and r.prrelid = %(table)s::regclass
where p.pubupdate and t.schemaname = %(schema)s and t.tablename = 'users_sync'
order by 1
"""

# By which columns a subscriber finds a row: `d` is the primary key, `f` all, `n` none.
_IDENTITY = """
select case when c.relreplident = 'd' and k.indexrelid is null then 'n'
            else c.relreplident::text end,
       p.indexrelid is not null, g.columns <> '{}', g.columns && k.indkey::int2[]
from pg_class c
left join pg_index p on p.indrelid = c.oid and p.indisprimary
left join pg_index k on k.indrelid = c.oid and (
    case c.relreplident when 'i' then k.indisreplident else k.indisprimary end)
cross join lateral (
    select array(select attnum from pg_attribute
                 where attrelid = c.oid and not attisdropped and attgenerated = 's') as columns
) g
where c.oid = %(table)s::regclass
"""

_TABLE = "select format('%%I.users_sync', %(schema)s::text)"


def find_publications(conn: Connection, schema: str) -> list[Finding]:
    """Name each publication because of which Postgres refuses updates, with the fix."""
    [(table,)] = conn.execute(_TABLE, {"schema": schema})
    params = {"schema": schema, "table": table}
    [(identity, has_key, any_generated, key_generated)] = conn.execute(_IDENTITY, params)
    texts = []
    for name, hides_generated, filtered, listed in conn.execute(_PUBLICATIONS, params):
        fixes = []
        full = identity == "f" or filtered or (identity == "n" and not has_key)
        if listed:
            fixes.append(f"alter publication {name} drop table {table}")
            fixes.append(f"alter publication {name} add table {table}")
        if full and identity != "f":
            fixes.append(f"alter table {table} replica identity full")
        elif identity == "n":
            fixes.append(f"alter table {table} replica identity default")
        # Postgres refuses updates if the replica identity has a generated column that is not
        # published: with `full` every column belongs to it, else those of the key.
        if hides_generated and (any_generated if full else key_generated):
            fixes.append(f"alter publication {name} set (publish_generated_columns = stored)")
        if fixes:
            run = ", then ".join(f"`{fix}`" for fix in fixes)
            texts.append(f"the publication {name} keeps the table from being updated: run {run}")
    return [Finding("FAIL", "publication", text, 2) for text in texts]
