"""Which tables are adopted, and that a table which is refused says which column is at fault."""

import psycopg
import pytest

from tests.support.store_target import PLAIN_COLUMNS, Target, person
from worker.errors import Misconfigured
from worker.store.table_shape import Shape, detect_shape

COLUMNS = {
    "id": "text primary key",
    "raw_json": "jsonb",
    "name": "text",
    "email": "text",
    "created_at": "timestamptz",
    "updated_at": "timestamptz",
    "deleted_at": "timestamptz",
}


def create(target: Target, **columns: str | None) -> None:
    """Create a plain table with other columns, or without those that are None."""
    kept = {name: kind for name, kind in {**COLUMNS, **columns}.items() if kind}
    target.query(f"create table users_sync ({', '.join(map(' '.join, kept.items()))})")


def refusal(target: Target) -> str:
    with pytest.raises(Misconfigured) as caught:
        detect_shape(target.conn, target.schema)
    return str(caught.value)


def test_each_known_shape_is_adopted(target: Target) -> None:
    assert target.shape == detect_shape(target.conn, target.schema)


def test_where_no_table_is_there_is_no_shape(empty_target: Target) -> None:
    assert detect_shape(empty_target.conn, empty_target.schema) is None
    assert detect_shape(empty_target.conn, "no such schema") is None


@pytest.mark.parametrize("name", COLUMNS)
def test_missing_column_is_refused(empty_target: Target, name: str) -> None:
    create(empty_target, **{name: None})
    assert f"column {name} is missing" in refusal(empty_target)


@pytest.mark.parametrize(
    ("name", "kind", "problem"),
    [
        ("raw_json", "json", "is json, not jsonb"),
        ("name", "varchar(80)", "is character varying(80), not text"),
        ("email", "uuid", "is uuid, not text"),
        ("created_at", "timestamp", "is timestamp without time zone, not timestamp with time zone"),
        ("created_at", "timestamptz(2)", "is timestamp(2) with time zone, not timestamp with"),
        ("deleted_at", "timestamptz(0)", "is timestamp(0) with time zone, not timestamp with"),
        ("updated_at", "bigint", "is bigint, not timestamp with time zone"),
        ("deleted_at", "boolean", "is boolean, not timestamp with time zone"),
        ("id", "bigint primary key", "is bigint, neither text nor uuid"),
        ("id", "varchar primary key", "is character varying, neither text nor uuid"),
    ],
)
def test_column_of_another_type_is_refused(
    empty_target: Target, name: str, kind: str, problem: str
) -> None:
    create(empty_target, **{name: kind})
    message = refusal(empty_target)
    assert f"column {name} {problem}" in message
    assert f"{empty_target.schema}.users_sync" in message


@pytest.mark.parametrize("digits", [3, 4, 5, 6])
def test_moments_to_the_millisecond_or_finer_are_adopted(empty_target: Target, digits: int) -> None:
    moments = ("created_at", "updated_at", "deleted_at")
    create(empty_target, **dict.fromkeys(moments, f"timestamptz({digits})"))
    assert detect_shape(empty_target.conn, empty_target.schema) is Shape.PLAIN
    empty_target.shape = Shape.PLAIN
    assert empty_target.apply([person(1), person(2)]) == "ii"
    assert empty_target.apply([person(1), person(2, display_name="New")]) == "=u"


@pytest.mark.parametrize(
    "index",
    [
        pytest.param("", id="no index"),
        pytest.param("create index on users_sync (id)", id="not unique"),
        pytest.param("create unique index on users_sync (id, email)", id="with another column"),
        pytest.param("create unique index on users_sync (lower(id))", id="of an expression"),
        pytest.param("create unique index on users_sync (id) where name = ''", id="partial"),
        pytest.param("alter table users_sync add unique (id) deferrable", id="deferrable"),
    ],
)
def test_id_that_is_not_unique_is_refused(empty_target: Target, index: str) -> None:
    create(empty_target, id="text not null")
    empty_target.query(index or "select")
    assert "column id is not unique" in refusal(empty_target)


def test_unique_index_that_failed_to_build_is_none(empty_target: Target) -> None:
    create(empty_target, id="text not null")
    empty_target.query("insert into users_sync (id) values ('a'), ('a')")
    with pytest.raises(psycopg.errors.UniqueViolation):
        empty_target.query("create unique index concurrently on users_sync (id)")
    assert "column id is not unique" in refusal(empty_target)


def test_unique_index_does_for_a_primary_key(empty_target: Target) -> None:
    create(empty_target, id="text not null unique")
    assert detect_shape(empty_target.conn, empty_target.schema) is Shape.PLAIN


def test_extra_column_that_nobody_would_fill_is_refused(empty_target: Target) -> None:
    create(empty_target, plan="text not null")
    assert "column plan is not ours" in refusal(empty_target)


@pytest.mark.parametrize(
    "kind",
    [
        "text",
        "text not null default 'free'",
        "bigint generated always as identity",
        "text generated always as (upper(name)) stored",
    ],
)
def test_other_extra_columns_are_left_alone(empty_target: Target, kind: str) -> None:
    create(empty_target, plan=kind)
    assert detect_shape(empty_target.conn, empty_target.schema) is Shape.PLAIN


@pytest.mark.parametrize("name", ["updated_at", "deleted_at"])
def test_column_that_must_be_null_for_live_users_but_may_not_is_refused(
    empty_target: Target, name: str
) -> None:
    create(empty_target, **{name: "timestamptz not null default now()"})
    assert f"column {name} does not allow null" in refusal(empty_target)


def test_generated_column_in_a_plain_table_is_refused(empty_target: Target) -> None:
    create(empty_target, email="text generated always as (raw_json->>'primary_email') stored")
    assert "column email is generated" in refusal(empty_target)


def test_dropped_column_is_forgotten(plain: Target) -> None:
    plain.query("alter table users_sync add column plan text not null")
    plain.query("alter table users_sync drop column plan")
    assert detect_shape(plain.conn, plain.schema) is Shape.PLAIN


@pytest.mark.parametrize(
    "statement",
    [
        "create view users_sync as select 1 as id",
        "create materialized view users_sync as select 1 as id",
        "create sequence users_sync",
    ],
)
def test_what_is_no_table_is_refused(empty_target: Target, statement: str) -> None:
    empty_target.query(statement)
    assert "users_sync is not a table" in refusal(empty_target)


def test_partitioned_table_is_adopted(empty_target: Target) -> None:
    columns = PLAIN_COLUMNS.format(id_type="text")
    empty_target.query(f"create table users_sync ({columns}) partition by hash (id)")
    assert detect_shape(empty_target.conn, empty_target.schema) is Shape.PLAIN


def test_row_level_security_that_hides_rows_is_refused(
    connection: psycopg.Connection, database_url: str, plain_role: str
) -> None:
    columns = PLAIN_COLUMNS.format(id_type="text")
    connection.execute(
        f"create schema neon_auth; create table neon_auth.users_sync ({columns});"
        f" grant usage on schema neon_auth to {plain_role}".encode()
    )
    with psycopg.connect(database_url, options=f"-c role={plain_role}") as conn:
        assert detect_shape(conn, "neon_auth") is Shape.PLAIN
        connection.execute("alter table neon_auth.users_sync enable row level security")
        with pytest.raises(Misconfigured, match="row-level security hides rows"):
            detect_shape(conn, "neon_auth")
    assert detect_shape(connection, "neon_auth") is Shape.PLAIN
