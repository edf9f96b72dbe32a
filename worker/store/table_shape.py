"""Which of the known shapes a users_sync table has; a table of no known shape is refused."""

from dataclasses import dataclass
from enum import Enum

from psycopg import sql

from worker.errors import Misconfigured
from worker.settings.names import USUAL_NAMES
from worker.store.connection import Connection

TABLE = "users_sync"

_COLUMNS = """
select a.attname, format_type(a.atttypid, a.atttypmod), a.attgenerated <> '', a.attnotnull,
       a.atthasdef or a.attidentity <> '', a.attname = 'id' and exists (
           select from pg_index i
           where i.indrelid = c.oid and i.indisunique and i.indimmediate and i.indisvalid
             and i.indpred is null
             and i.indnkeyatts = 1 and i.indkey[0] = a.attnum)
from pg_class c
join pg_namespace n on n.oid = c.relnamespace
join pg_attribute a on a.attrelid = c.oid
where n.nspname = %s and c.relname = 'users_sync' and c.relkind in ('r', 'p')
  and a.attnum > 0 and not a.attisdropped
"""

# Another kind of relation may have our name, a view say.
_RELATION_KIND = """
select c.relkind::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname = %s and c.relname = 'users_sync'
"""

# What an owner has to run, if row-level security is active for our role, and its policies don't let
# us read, insert and update every row. Only those that plainly say `true` are believed to.
_POLICY_LACKING = """
with applying as (
    select polcmd, polpermissive, pg_get_expr(polqual, polrelid) as visible,
           coalesce(pg_get_expr(polwithcheck, polrelid), pg_get_expr(polqual, polrelid)) as allowed
    from pg_policy
    where polrelid = format('%%I.users_sync', %(schema)s::text)::regclass and polcmd <> 'd'
      and exists (
          select from unnest(polroles) r (role) where role = 0 or pg_has_role(role, 'usage'))
)
select format('create policy users_sync_worker on %%I.users_sync for all to %%I'
              ' using (true) with check (true)', %(schema)s::text, current_user)
where row_security_active(format('%%I.users_sync', %(schema)s::text)::regclass)
  and (exists (select from applying where not polpermissive) or exists (
      select from unnest(array['r', 'a', 'w']) c (command) where not exists (
          select from applying
          where polpermissive and polcmd::text in ('*', command)
            and (command = 'a' or visible = 'true') and (command = 'r' or allowed = 'true'))))
"""


class Shape(Enum):
    """The shapes of users_sync found in the field."""

    GENERATED = "generated"
    PLAIN = "plain"
    PLAIN_UUID = "plain, id uuid"

    @property
    def id_type(self) -> sql.SQL:
        return sql.SQL("uuid") if self is Shape.PLAIN_UUID else sql.SQL("text")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of the table as the catalog describes it."""

    name: str
    type: str
    generated: bool
    not_null: bool
    has_default: bool
    unique: bool


# Moments are compared to the millisecond, so an ORM may ask for 3 digits or more.
_MOMENT = ("timestamp with time zone", *(f"timestamp({n}) with time zone" for n in range(3, 7)))

# Which types will do; the first one is the usual one.
_TYPES = {
    "raw_json": ("jsonb",),
    "name": ("text",),
    "email": ("text",),
    "created_at": _MOMENT,
    "updated_at": _MOMENT,
    "deleted_at": _MOMENT,
}
_GENERATED = {"id", "name", "email", "created_at"}


def detect_shape(conn: Connection, schema: str, setting: str = USUAL_NAMES.schema) -> Shape | None:
    """Tell the shape of `schema`.users_sync; None if there is no such table.

    Raises Misconfigured, naming the column, for a table that cannot be adopted. `setting` is what
    to call the one of the schema.
    """
    if not _table_exists(conn, schema, setting):
        return None
    rows = conn.execute(_COLUMNS, (schema,)).fetchall()
    table = f"{schema}.{TABLE}"
    shape = _fit(table, {row[0]: Column(*row) for row in rows})
    _refuse_filtered_rows(conn, schema)
    return shape


def _refuse_filtered_rows(conn: Connection, schema: str) -> None:
    row = conn.execute(_POLICY_LACKING, {"schema": schema}).fetchone()
    if row is not None:
        raise Misconfigured(
            f"row-level security hides rows of {schema}.{TABLE} from the worker's role: let its"
            f" owner run `{row[0]}`; where a restrictive policy applies, only BYPASSRLS helps"
        )


def _table_exists(conn: Connection, schema: str, setting: str) -> bool:
    row = conn.execute(_RELATION_KIND, (schema,)).fetchone()
    if row is not None and row[0] not in {"r", "p"}:
        raise Misconfigured(
            f"{schema}.{TABLE} is not a table; rename it, or set {setting} to another schema"
        )
    return row is not None


def _fit(table: str, columns: dict[str, Column]) -> Shape:
    for name, usable in {"id": (), **_TYPES}.items():
        if name not in columns:
            raise _unfit(table, name, "is missing")
        if usable and columns[name].type not in usable:
            raise _unfit(table, name, f"is {columns[name].type}, not {usable[0]}")
    for name in ("updated_at", "deleted_at"):
        if columns[name].not_null:
            raise _unfit(table, name, "does not allow null, which a live user's row must have")
    for column in columns.values():
        if column.name not in {"id", *_TYPES}:
            _check_extra(table, column)
    if not columns["id"].unique:
        raise _unfit(table, "id", "is not unique: make it the primary key")
    return _shape_of(table, columns)


def _check_extra(table: str, column: Column) -> None:
    if column.not_null and not column.has_default:
        raise _unfit(table, column.name, "is not ours, and has neither a default nor allows null")


def _shape_of(table: str, columns: dict[str, Column]) -> Shape:
    generated = {name for name in ("id", *_TYPES) if columns[name].generated}
    id_type = columns["id"].type
    if generated == _GENERATED and id_type == "text":
        return Shape.GENERATED
    for name in sorted(generated):
        raise _unfit(table, name, "is generated, which only Neon's own shape may have")
    if id_type == "text":
        return Shape.PLAIN
    if id_type == "uuid":
        return Shape.PLAIN_UUID
    raise _unfit(table, "id", f"is {id_type}, neither text nor uuid")


def _unfit(table: str, column: str, problem: str) -> Misconfigured:
    return Misconfigured(
        f"{table} cannot be used: column {column} {problem}; change it, or rename the table and let"
        " `users-sync init` create a new one"
    )
