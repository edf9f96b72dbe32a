"""What the worker's role may not do, and all that an owner has to run to change that."""

from worker.errors import Misconfigured
from worker.store.connection import Connection
from worker.store.migrate import OWN_SCHEMA
from worker.store.table_shape import TABLE

# By the catalog alone: to name a table of a schema takes the right to use it. Without a row there
# is no such schema.
_SCHEMA = """
select has_schema_privilege(n.oid, 'create'), exists (
    select from pg_class c where c.relnamespace = n.oid and c.relname = %(table)s)
from pg_namespace n where n.nspname = %(schema)s
"""

_NO_SCHEMA = "select has_database_privilege(current_database(), 'create'), false"

_USAGE_LACKING = """
select format('grant usage on schema %%I to %%I', nspname, current_user)
from pg_namespace where nspname = %(schema)s and not has_schema_privilege(oid, 'usage')
"""

_TABLE_LACKING = """
select format('grant %%s on %%I.%%I to %%I', string_agg(right_name, ', ' order by position),
              n.nspname, c.relname, current_user)
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
cross join unnest(%(rights)s::text[]) with ordinality as r (right_name, position)
where n.nspname = %(schema)s and c.relname = 'users_sync' and c.relkind in ('r', 'p')
  and not has_table_privilege(c.oid, right_name)
group by n.nspname, c.relname
"""

# What the view `status` calls is run with the rights of the role that reads the view.
_EXECUTE_LACKING = """
select format('grant execute on all functions in schema %%I to %%I', n.nspname, current_user)
from pg_namespace n
where n.nspname = %(schema)s and exists (
    select from pg_proc p
    where p.pronamespace = n.oid and not has_function_privilege(p.oid, 'execute'))
"""

_OWN_LACKING = """
select format('grant select, insert, update, delete on all tables in schema %%I to %%I',
              n.nspname, current_user)
from pg_namespace n
where n.nspname = %(schema)s and exists (
    select from pg_class c
    where c.relnamespace = n.oid and c.relkind = 'r'
      and not (has_table_privilege(c.oid, 'select') and (c.relname = 'migration' or (
          has_table_privilege(c.oid, 'insert') and has_table_privilege(c.oid, 'update')
          and has_table_privilege(c.oid, 'delete')))))
"""

_ALL_OF_TABLE = """
select format('grant usage on schema %%1$I to %%2$I;'
              ' grant select, insert, update on %%1$I.users_sync to %%2$I',
              %(schema)s::text, current_user)
"""

_ALL_OF_OWN = """
select format('grant usage on schema %%1$I to %%2$I;'
              ' grant select, insert, update, delete on all tables in schema %%1$I to %%2$I;'
              ' grant execute on all functions in schema %%1$I to %%2$I',
              %(schema)s::text, current_user)
"""


def require_table_rights(conn: Connection, schema: str) -> None:
    """Raise Misconfigured, with the fix, unless our role may write users_sync, or create it."""
    may_create, there = _look(conn, schema, TABLE)
    if not there:
        require_creation(conn, schema, may_create=may_create)
    wanted = {"schema": schema, "rights": ["select", "insert", "update"]}
    rows = [*conn.execute(_USAGE_LACKING, wanted), *conn.execute(_TABLE_LACKING, wanted)]
    _require_none([row[0] for row in rows], f"use {schema}.{TABLE} as it must")


def require_own_rights(conn: Connection) -> bool:
    """Do the same for the worker's own tables; tells whether our role may create more of them."""
    may_create, there = _look(conn, OWN_SCHEMA, "migration")
    if not there:
        require_creation(conn, OWN_SCHEMA, may_create=may_create)
    own = {"schema": OWN_SCHEMA}
    rows = [*conn.execute(_USAGE_LACKING, own), *conn.execute(_OWN_LACKING, own)]
    _require_none([row[0] for row in rows], f"use the tables of {OWN_SCHEMA} as it must")
    return may_create


def require_creation(conn: Connection, schema: str, *, may_create: bool) -> None:
    """Raise Misconfigured, with the fix, where something is missing that we may not create."""
    if may_create:
        return
    query = _ALL_OF_OWN if schema == OWN_SCHEMA else _ALL_OF_TABLE
    [(grants,)] = conn.execute(query, {"schema": schema})
    raise Misconfigured(
        f"the worker's role may not create what is missing in {schema}: let an owner run the"
        f" output of `users-sync init --print-sql`, and then `{grants}`"
    )


def purge_grant(conn: Connection, schema: str) -> str | None:
    """Give what an owner has to run before `users-sync purge`; None if nothing is lacking."""
    row = conn.execute(_TABLE_LACKING, {"schema": schema, "rights": ["delete"]}).fetchone()
    return None if row is None else str(row[0])


def status_grant(conn: Connection) -> str | None:
    """Give what an owner has to run before `users-sync status`; None if nothing is lacking."""
    row = conn.execute(_EXECUTE_LACKING, {"schema": OWN_SCHEMA}).fetchone()
    return None if row is None else str(row[0])


def _look(conn: Connection, schema: str, table: str) -> tuple[bool, bool]:
    """Whether our role may create tables in `schema`, and whether that one is there."""
    row = conn.execute(_SCHEMA, {"schema": schema, "table": table}).fetchone()
    [(may_create, there)] = [row] if row else conn.execute(_NO_SCHEMA)
    return may_create, there


def _require_none(grants: list[str], lacking: str) -> None:
    if grants:
        raise Misconfigured(
            f"the worker's role may not {lacking}: let its owner run `{'; '.join(grants)}`"
        )
