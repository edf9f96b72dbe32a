"""What the check says of users_sync: its shape, its indexes, and the foreign keys to it."""

from worker.cli.check.other_writers import find_writers
from worker.cli.check.probe import find_refusals
from worker.cli.check.result import Finding, alike
from worker.cli.check.rights import purge_grant, require_table_rights
from worker.settings.names import USUAL_NAMES
from worker.store.connection import Connection
from worker.store.identity import TREE
from worker.store.table_shape import detect_shape

_INDEXES = """
select format('%%I.users_sync', %(schema)s::text), exists (
    select from pg_index i join pg_attribute a
        on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
    where i.indrelid = format('%%I.users_sync', %(schema)s::text)::regclass
      and a.attname = 'deleted_at'
)
"""

# What follows `using` in the definition, without its predicate, and how to drop the index. A
# soft-deleted row keeps its address, so the predicate must leave it out.
_UNIQUE_EMAILS = """
select substr(d.definition, strpos(d.definition, d.begins) + length(d.begins),
              length(d.definition) - length(d.ends) - strpos(d.definition, d.begins)
              - length(d.begins) + 1),
       d.predicate, c.relkind = 'I', case when o.conname is null
           then format('drop index %%I.%%I', %(schema)s::text, c.relname)
           else format('alter table %%I.users_sync drop constraint %%I',
                       %(schema)s::text, o.conname) end
from pg_index i join pg_class c on c.oid = i.indexrelid
left join pg_constraint o on o.conindid = c.oid and o.contype in ('p', 'u')
cross join lateral (
    select array_agg(pg_get_indexdef(i.indexrelid, position, true)) as keys
    from generate_series(1, i.indnkeyatts) as p (position)
) k
cross join lateral (
    select pg_get_indexdef(i.indexrelid) as definition,
           pg_get_expr(i.indpred, i.indrelid) as predicate,
           format('%%I.users_sync USING ', %(schema)s::text) as begins,
           coalesce(' WHERE ' || pg_get_expr(i.indpred, i.indrelid), '') as ends
) d
where i.indrelid = format('%%I.users_sync', %(schema)s::text)::regclass and i.indisunique
  and array_to_string(keys, ' ') ~ '\\m(primary_)?email\\M' and 'id' <> all(keys)
order by c.relname
"""

_LIVE_ONLY = "(deleted_at IS NULL)"
_UNLOGGED = f"""
{TREE}
select format('alter table %%I.%%I set logged', n.nspname, c.relname)
from tree join pg_class c using (oid) join pg_namespace n on n.oid = c.relnamespace
where c.relpersistence = 'u' order by c.oid
"""  # noqa: S608  our own statements

# A partition's foreign keys and indexes are its parent's. Those that are not enforced, which came
# with PostgreSQL 18, do nothing. A partial index finds rows by a foreign key if it leaves out null.
_FOREIGN_KEYS = """
select r.name, r.columns, cardinality(f.conkey) > 1, f.confdeltype::text, c.relkind = 'p', exists (
    select from pg_index i
    where i.indrelid = f.conrelid and i.indisvalid and i.indkey[0] = any(f.conkey)
      and (i.indpred is null or pg_get_expr(i.indpred, i.indrelid) = any(r.not_null))
)
from pg_constraint f
join pg_class c on c.oid = f.conrelid
join pg_namespace n on n.oid = c.relnamespace
cross join lateral (
    select format('%%I.%%I', n.nspname, c.relname) as name,
           string_agg(quote_ident(a.attname), ', ' order by k.position) as columns,
           array_agg(format('(%%I IS NOT NULL)', a.attname)) as not_null
    from unnest(f.conkey) with ordinality as k (attnum, position)
    join pg_attribute a on a.attrelid = f.conrelid and a.attnum = k.attnum
) r
where f.contype = 'f' and f.conparentid = 0
  and f.confrelid = format('%%I.users_sync', %(schema)s::text)::regclass
  and coalesce((to_jsonb(f)->>'conenforced')::boolean, true)
order by 1, 2, 4
"""

_ACTIONS = {"c": "cascade", "n": "set null", "d": "set default"}


def look_at_table(
    conn: Connection, schema: str, setting: str = USUAL_NAMES.schema
) -> list[Finding]:
    """Say what there is to say of users_sync. Raises Misconfigured if it cannot be used.

    `setting` is what to call the one of the schema.
    """
    require_table_rights(conn, schema)
    shape = detect_shape(conn, schema, setting)
    if shape is None:
        text = f"{schema}.users_sync is not there yet; `users-sync init` creates it"
        return [Finding("ok", "table", text)]
    return [
        Finding("ok", "table", f"{schema}.users_sync can be adopted: {shape.value}"),
        *find_unlogged(conn, schema),
        *find_index_troubles(conn, schema),
        *find_purge_rights(conn, schema),
        *find_foreign_keys(conn, schema),
        *find_writers(conn, schema),
        *find_refusals(conn, schema, shape),
    ]


def find_unlogged(conn: Connection, schema: str) -> list[Finding]:
    """Say that a crash of the server empties the table."""
    unlogged = [
        f"unlogged: a crash of the server empties it; run `{fix}`"
        for (fix,) in conn.execute(_UNLOGGED, {"target": schema})
    ]
    return alike("warn", "table", unlogged)


def find_index_troubles(conn: Connection, schema: str) -> list[Finding]:
    """Say which index is missing, and which one will refuse users."""
    [(table, indexed)] = conn.execute(_INDEXES, {"schema": schema})
    findings = []
    if not indexed:
        fix = f"create index concurrently users_sync_deleted_at_idx on {table} (deleted_at)"
        findings.append(Finding("warn", "table", f"deleted_at has no index: run `{fix}`"))
    unique = conn.execute(_UNIQUE_EMAILS, {"schema": schema}).fetchall()
    if unique:
        text = "email is unique: users who swap addresses stay in quarantine"
        findings.append(Finding("warn", "table", text))
    for keys, predicate, partitioned, drop in unique:
        if _LIVE_ONLY not in (predicate or ""):
            # On a partitioned table Postgres makes no index concurrently.
            how = "create unique index on" if partitioned else "create unique index concurrently on"
            rows = f"deleted_at is null and {predicate}" if predicate else "deleted_at is null"
            text = (
                "email is unique among deleted users, too: who signs up again with the address"
                f" of a deleted account stays in quarantine; run `{how} {table} using {keys}"
                f" where {rows}`, then `{drop}`"
            )
            findings.append(Finding("warn", "table", text))
    return findings


def find_purge_rights(conn: Connection, schema: str) -> list[Finding]:
    """Say what purging needs, and nothing else does."""
    grant = purge_grant(conn, schema)
    if grant is None:
        return []
    text = f"the worker's role may not delete, which only `users-sync purge` does: `{grant}`"
    return [Finding("note", "table", text)]


def find_foreign_keys(conn: Connection, schema: str) -> list[Finding]:
    """Say what becomes of the rows that refer to a user, and where finding them takes a scan."""
    effects, scans = [], []
    for name, columns, composite, action, partitioned, indexed in conn.execute(
        _FOREIGN_KEYS, {"schema": schema}
    ):
        key = f"{name} ({columns})" if composite else f"{name}.{columns}"
        if action in _ACTIONS:
            effect = f"{_ACTIONS[action]} acts only when the row goes: users-sync purge"
        else:
            effect = "users-sync purge keeps users as long as rows here refer to them"
        effects.append(f"{key}: {effect}")
        if not indexed:
            # On a partitioned table Postgres makes no index concurrently.
            how = "create index on" if partitioned else "create index concurrently on"
            fix = f"run `{how} {name} ({columns})`"
            scans.append(f"{key} has no index: a purge reads the table for each user; {fix}")
    return [*alike("note", "foreign key", effects), *alike("note", "foreign key", scans)]
