"""Users of an application see their own row of users_sync, and no other."""

import json
from collections.abc import Iterator

import psycopg
import pytest
from psycopg import sql

from tests.support.store_target import Target, people, person
from worker.store.row_security import row_security_sql
from worker.store.table_shape import detect_shape

IDS = "select id::text from users_sync order by id::text"


@pytest.fixture
def secured(target: Target) -> Iterator[Target]:
    """Return a target with five users, whose row-level security is on."""
    assert target.apply(people(*range(5))) == "iiiii"
    target.conn.execute(row_security_sql(target.schema).encode())
    yield target
    target.conn.execute("reset role; reset request.jwt.claims")


def become(target: Target, role: str, **claims: object) -> None:
    target.conn.execute("select set_config('request.jwt.claims', %s, false)", (json.dumps(claims),))
    target.conn.execute(sql.SQL("set role {}").format(sql.Identifier(role)))


def seen(target: Target) -> list[str]:
    return [row[0] for row in target.query(IDS)]


def test_signed_in_user_sees_the_own_row_and_no_other(secured: Target) -> None:
    become(secured, "authenticated", sub=person(3).id)
    assert seen(secured) == [person(3).id]


@pytest.mark.parametrize(
    "claims",
    ["", "{", "[]", "7", "null", "{}", '{"sub": null}', '{"sub": 7}', '{"sub": "\\u0000"}'],
)
def test_whoever_is_nobody_sees_nothing_and_no_error(secured: Target, claims: str) -> None:
    become(secured, "authenticated")
    secured.query("select set_config('request.jwt.claims', %s, false)", claims)
    assert seen(secured) == []


def test_before_any_claims_were_set_nothing_is_seen(secured: Target) -> None:
    conn = secured.connect()
    conn.execute("set role authenticated")
    assert conn.execute(IDS).fetchall() == []


def test_anonymous_sees_nothing_whatever_is_claimed(secured: Target) -> None:
    become(secured, "anonymous", sub=person(3).id)
    assert seen(secured) == []


@pytest.mark.parametrize("role", ["authenticated", "anonymous"])
@pytest.mark.parametrize(
    "write",
    [
        "update users_sync set updated_at = now()",
        "delete from users_sync",
        "insert into users_sync select * from users_sync",
        "select count(*) from users_sync_worker.quarantine",
    ],
)
def test_neither_of_them_writes_or_looks_behind_the_scenes(
    secured: Target, role: str, write: str
) -> None:
    become(secured, role, sub=person(3).id)
    with pytest.raises(psycopg.Error) as refused:
        secured.query(write)
    assert refused.value.sqlstate in {"42501", "428C9"}


def test_own_row_is_found_by_the_primary_key(secured: Target) -> None:
    become(secured, "authenticated", sub=person(3).id)
    secured.query("set enable_seqscan = off")
    plan = secured.query("explain (format json) select * from users_sync")[0][0][0]["Plan"]
    secured.query("reset enable_seqscan")
    assert plan["Node Type"] in {"Index Scan", "Bitmap Heap Scan"}
    assert "Filter" not in plan


def test_token_that_the_extension_read_is_believed_and_nothing_else(secured: Target) -> None:
    if secured.value("select to_regnamespace('auth') is not null"):
        pytest.skip("another test is at it")
    with secured.conn.transaction():
        # Seen by this transaction alone: other tests share the database.
        secured.query("create schema auth; grant usage on schema auth to authenticated")
        secured.query(
            "create function auth.user_id() returns text language sql"
            f" as $$ select '{person(1).id}' $$"
        )
        become(secured, "authenticated", sub=person(3).id)
        assert seen(secured) == [person(1).id]
        secured.query("reset role")
        secured.query(
            "create or replace function auth.user_id() returns text language sql as 'select null'"
        )
        become(secured, "authenticated", sub=person(3).id)
        assert seen(secured) == []
        secured.query("reset role")
        secured.query("drop schema auth cascade")


def test_user_sees_the_own_row_where_functions_are_not_everybodys(target: Target) -> None:
    assert target.apply(people(1, 2)) == "ii"
    with target.conn.transaction(force_rollback=True):
        target.query("alter default privileges revoke execute on functions from public")
        target.conn.execute(row_security_sql(target.schema).replace("begin;", "", 1).encode())
        become(target, "authenticated", sub=person(2).id)
        assert seen(target) == [person(2).id]
        target.query("reset role; reset request.jwt.claims")


def test_owner_goes_on_writing(secured: Target) -> None:
    assert secured.apply([person(1, display_name="New"), person(9)]) == "ui"
    assert len(seen(secured)) == 6


def test_worker_that_does_not_own_the_table_goes_on_writing(
    target: Target, connection: psycopg.Connection, plain_role: str
) -> None:
    names = {"role": sql.Identifier(plain_role), "schema": sql.Identifier(target.schema)}
    grants = sql.SQL(
        "grant usage on schema {schema} to {role};"
        "grant select, insert, update on {schema}.users_sync to {role}"
    )
    target.conn.execute(grants.format(**names))
    target.apply([person(1)])
    for _ in range(2):
        target.conn.execute(row_security_sql(target.schema).encode())
    try:
        target.conn.execute(sql.SQL("set role {role}").format(**names))
        assert detect_shape(target.conn, target.schema) is target.shape
        assert target.apply([person(1, display_name="New"), person(2)]) == "ui"
        assert len(seen(target)) == 2
    finally:
        target.conn.execute("reset role")
        target.conn.execute(sql.SQL("drop owned by {role}").format(**names))


def test_foreign_keys_on_the_table_still_hold(secured: Target) -> None:
    # The application's own policies say who may write what; the reference is checked for everybody.
    secured.query(
        "create table posts as select id as author_id from users_sync where false;"
        " alter table posts add foreign key (author_id) references users_sync on delete cascade;"
        " grant all on posts to authenticated"
    )
    become(secured, "authenticated", sub=person(3).id)
    insert = "insert into posts select '{}'::" + (
        "uuid" if "uuid" in secured.shape.value else "text"
    )
    secured.query(insert.format(person(1).id))
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        secured.query(insert.format(person(8).id))
    secured.query("reset role")
    secured.query("delete from users_sync where id::text = %s", person(1).id)
    assert secured.query("select * from posts") == []
