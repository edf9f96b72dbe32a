"""The SQL that lets users of an application see their own row of users_sync, and no other."""

from psycopg import sql

from worker.store.table_shape import TABLE

# The policies are put together where the table is, because they depend on it. An own row is found
# by the primary key: another permissive policy for the same role would make that a scan of all.
_SCRIPT = """begin;

-- Signed-in users, and all others. The application's server changes to one of them.
do $roles$
begin
    if to_regrole('authenticated') is null then
        create role authenticated nologin;
    end if;
    if to_regrole('anonymous') is null then
        create role anonymous nologin;
    end if;
exception when duplicate_object or unique_violation then
    null;  -- created by another session just now
end
$roles$;

-- The id of the user who is signed in; null if none is. With the extension pg_session_jwt it is
-- what auth.user_id() read from the token, and nothing else is believed. Without it, it is "sub" of
-- the setting request.jwt.claims, which the application's server sets in each of its transactions,
-- from a token that it has checked. A user who can run SQL can set that, too: give such
-- users pg_session_jwt.
create or replace function {schema}.user_id() returns text
language plpgsql stable set search_path = pg_catalog as $user_id$
declare
    found text;
begin
    if to_regprocedure('auth.user_id()') is not null then
        execute 'select auth.user_id()::text' into found;
        return nullif(found, '');
    end if;
    return nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub';
exception when invalid_text_representation or untranslatable_character then
    return null;
end
$user_id$;

alter table {table} enable row level security;

drop policy if exists users_sync_own_row on {table};
drop policy if exists users_sync_writers on {table};

do $policies$
declare
    own_id text := 'select {schema_in_text}.user_id()';
    writers text;
begin
    if (select atttypid = 'uuid'::regtype from pg_attribute
        where attrelid = {name}::regclass and attname = 'id') then
        own_id := format('select case when id ~ %L then id::uuid end from %s as id',
                         '^[0-9a-f]{{8}}(-[0-9a-f]{{4}}){{3}}-[0-9a-f]{{12}}$',
                         '{schema_in_text}.user_id()');
    end if;
    execute format('create policy users_sync_own_row on %s for select to authenticated'
                   ' using (id = (%s))', {name}, own_id);

    -- Roles besides the owner that may update the table, such as a worker that does not own it.
    select string_agg(distinct r.rolname::regrole::text, ', ') into writers
    from pg_class c cross join aclexplode(c.relacl) a join pg_roles r on r.oid = a.grantee
    where c.oid = {name}::regclass and a.privilege_type = 'UPDATE' and a.grantee <> c.relowner;
    if writers is not null then
        execute format('create policy users_sync_writers on %s for all to %s'
                       ' using (true) with check (true)', {name}, writers);
    end if;
end
$policies$;

-- Any other role that reads the table, such as an application's backend, now sees nothing, unless
-- it owns the table or has bypassrls. Let it read with:
--   create policy backend_reads on {table} for select to backend using (true);

grant usage on schema {schema} to authenticated, anonymous;
grant execute on function {schema}.user_id() to authenticated, anonymous;
grant select on {table} to authenticated, anonymous;

commit;
"""


def row_security_sql(schema: str) -> str:
    """Write the SQL, for a person to read and run as the table's owner; once more does no harm."""
    table = sql.Identifier(schema, TABLE)
    script = sql.SQL(_SCRIPT).format(
        schema=sql.Identifier(schema),
        schema_in_text=sql.SQL(sql.Identifier(schema).as_string().replace("'", "''")),
        table=table,
        name=sql.Literal(table.as_string()),
    )
    return script.as_string()
