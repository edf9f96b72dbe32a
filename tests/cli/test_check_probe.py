"""What `check` finds out by writing a made-up user, of which nothing is left."""

from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest
from psycopg import sql

from tests.support.store_target import PLAIN_COLUMNS, Target, people
from worker.cli.check.probe import find_refusals
from worker.cli.check.result import Finding
from worker.cli.check.table import look_at_table
from worker.store.connection import Connection
from worker.store.database import connect
from worker.store.table_shape import Shape


@pytest.fixture(scope="module")
def conn(store_url: str) -> Iterator[Connection]:
    with closing(connect(store_url)) as conn:
        yield conn


@pytest.fixture
def worker(plain: Target, store_url: str) -> Iterator[Connection]:
    """Return the connection of a role that has the documented rights to the plain table alone."""
    role = f"probing {plain.schema[-6:]}"
    names = {"role": sql.Identifier(role), "schema": sql.Identifier(plain.schema)}
    plain.conn.execute(
        sql.SQL(
            "create role {role}; grant usage on schema {schema} to {role};"
            " grant select, insert, update on {schema}.users_sync to {role}"
        ).format(**names)
    )
    with closing(connect(store_url)) as conn:
        conn.execute(sql.SQL("set role {role}").format(**names))
        yield conn
    plain.conn.execute(sql.SQL("drop owned by {role}; drop role {role}").format(**names))


def tried(conn: Connection, target: Target) -> list[str]:
    found = find_refusals(conn, target.schema, target.shape)
    return [f"{finding.verdict} {finding.text}" for finding in found]


def fixes(found: list[Finding]) -> list[str]:
    return [fix for each in found for fix in each.text.split("`")[1::2]]


TRIGGER = """
create function meddle() returns trigger language plpgsql as $$ begin {body} end $$;
create trigger "Meddler" before {when} on users_sync for each row execute function meddle()
"""


def meddle(target: Target, body: str, when: str = "insert or update") -> None:
    target.query(TRIGGER.format(body=body, when=when))


def test_table_in_order_has_nothing_said_of_it_and_nothing_left(
    target: Target, conn: Connection
) -> None:
    target.apply(people(1, 2))
    before = target.query("select *, xmin, ctid from users_sync order by id")
    assert tried(conn, target) == []
    assert target.query("select *, xmin, ctid from users_sync order by id") == before


def test_moments_rounded_to_the_millisecond_will_do(plain: Target, conn: Connection) -> None:
    for column in ("created_at", "updated_at", "deleted_at"):
        plain.query(f"alter table users_sync alter {column} type timestamptz(3)")
    assert tried(conn, plain) == []


def test_nothing_is_tried_where_nothing_may_be_written(plain: Target, conn: Connection) -> None:
    meddle(plain, "return null;")
    with conn.transaction():
        conn.execute("set transaction read only")
        assert tried(conn, plain) == []


def test_sequence_that_may_not_be_used_is_named(plain: Target, worker: Connection) -> None:
    plain.query("alter table users_sync add number serial")
    [line] = tried(worker, plain)
    refused = "permission denied for sequence users_sync_number_seq (42501)"
    assert line.startswith(f"FAIL an insert of a made-up user is refused: {refused}; let its owner")
    role = worker.execute("select quote_ident(current_user)").fetchall()[0][0]
    plain.query(f"grant usage on sequence users_sync_number_seq to {role}")
    assert tried(worker, plain) == []


@pytest.mark.parametrize(
    "use",
    [
        "create unique index on users_sync (shout(id))",
        "alter table users_sync add check (shout(id) <> '')",
        "alter table users_sync add loud text generated always as (shout(name)) stored",
    ],
)
def test_function_that_may_not_be_executed_is_named(
    plain: Target, worker: Connection, use: str
) -> None:
    plain.query(
        "create function shout(text) returns text language plpgsql immutable"
        " as 'begin return upper($1); end'; revoke execute on function shout from public"
    )
    plain.query(use)
    [line] = tried(worker, plain)
    assert "refused: permission denied for function shout (42501); let its owner grant" in line


def test_table_that_a_trigger_may_not_write_is_named_with_the_trigger(
    plain: Target, worker: Connection
) -> None:
    plain.query("create table log (id text)")
    meddle(plain, "insert into log values (new.id); return new;")
    schema = sql.Identifier(plain.schema).as_string()
    role = worker.execute("select quote_ident(current_user)").fetchall()[0][0]
    worker.execute("select set_config('search_path', %s, false)", (schema,))
    [line] = tried(worker, plain)
    assert "permission denied for table log (42501) in the function meddle();" in line
    plain.query(f"grant insert on log to {role}")
    assert tried(worker, plain) == []
    assert plain.query("select * from log") == []


@pytest.mark.parametrize(
    ("rule", "problem"),
    [
        ("insert to users_sync do also select 1", "an update of a made-up user is refused: INSERT"),
        ("insert to users_sync do instead nothing", "an insert leaves no row"),
        ("update to users_sync do instead nothing", "an update of a made-up user is refused: "),
        (
            "update to users_sync do also notify x",
            "an update of a made-up user is refused: DO ALSO",
        ),
    ],
)
def test_rule_that_is_in_the_way_is_named(
    target: Target, conn: Connection, rule: str, problem: str
) -> None:
    target.query(f'create rule "Ruler" as on {rule}')
    [line] = tried(conn, target)
    assert line.startswith(f"FAIL {problem}")
    assert line.endswith('; see rule "Ruler"')


@pytest.mark.parametrize(
    ("when", "body", "problem"),
    [
        ("insert", "return null;", "an insert leaves no row"),
        ("update", "return null;", "an update leaves the row as it was"),
        (
            "update",
            "new.deleted_at := null; return new;",
            "a soft delete leaves the row live",
        ),
    ],
)
def test_trigger_that_keeps_rows_from_changing_is_named(
    target: Target, conn: Connection, when: str, body: str, problem: str
) -> None:
    meddle(target, body, when)
    assert tried(conn, target) == [f'FAIL {problem}; see trigger "Meddler"']


def test_trigger_that_normalises_is_warned_of_with_the_columns(
    written: Target, conn: Connection
) -> None:
    meddle(written, "new.email := lower(new.email); new.name := upper(new.name); return new;")
    [line] = tried(conn, written)
    assert line.startswith("warn name, email of a row differ from what was written: each `--once`")
    assert line.endswith('; see trigger "Meddler"')


def test_trigger_that_normalises_the_record_is_warned_of(
    generated: Target, conn: Connection
) -> None:
    meddle(generated, "new.raw_json := new.raw_json - 'server_metadata'; return new;")
    [line] = tried(conn, generated)
    assert line.startswith("warn raw_json of a row differ")


@pytest.mark.parametrize(
    ("id_", "created", "problem"),
    [
        ("upper(raw_json->>'id')", "to_timestamp(0)", "a search by the id that was written"),
        ("raw_json->>'id'", "to_timestamp(0)", "created_at does not hold the sign-up"),
        (
            "raw_json->>'id'",
            "to_timestamp((raw_json->>'signed_up_at_millis')::bigint / 1000)",
            "created_at does not hold the sign-up",
        ),
    ],
)
def test_column_that_is_generated_otherwise_is_told(
    empty_target: Target, conn: Connection, id_: str, created: str, problem: str
) -> None:
    empty_target.query(
        f"""
        create table users_sync (raw_json jsonb,
            id text generated always as ({id_}) stored primary key,
            name text generated always as (raw_json->>'display_name') stored,
            email text generated always as (raw_json->>'primary_email') stored,
            created_at timestamptz generated always as ({created}) stored,
            updated_at timestamptz, deleted_at timestamptz)
        """
    )
    [line] = tried(conn, empty_target)
    assert line.startswith(f"FAIL {problem}")


def test_collation_that_cannot_be_searched_is_told(plain: Target, conn: Connection) -> None:
    try:
        plain.query("create collation ci (provider = icu, locale = 'und', deterministic = false)")
    except psycopg.Error:
        pytest.skip("this server was built without ICU")
    plain.query("alter table users_sync alter id type text collate ci")
    [line] = tried(conn, plain)
    assert line.startswith(
        "FAIL a search of a made-up user is refused: nondeterministic collations"
    )


def test_constraint_is_warned_of_also_if_it_is_deferred(plain: Target, conn: Connection) -> None:
    plain.query(
        "create table members (email text primary key); alter table users_sync add constraint"
        " members_only foreign key (email) references members deferrable initially deferred"
    )
    [line] = tried(conn, plain)
    assert line.startswith("warn an insert of a made-up user is refused: ")
    assert '"members_only" (23503); users like it go to quarantine' in line


def test_lock_is_waited_for_in_vain_and_no_longer_than_that(
    plain: Target, conn: Connection
) -> None:
    with plain.connect() as other, other.transaction():
        other.execute("lock table users_sync in share mode")
        [line] = tried(conn, plain)
    assert line.startswith("warn an insert of a made-up user is refused: canceling statement due")
    assert line.endswith("; run the check again later")


@pytest.mark.parametrize(
    "body",
    [
        "raise exception 'no %', (select max(email) from users_sync);",
        "perform (select max(email) from users_sync)::int;",
        "execute 'select ' || (select max(email) from users_sync);",
    ],
)
def test_what_a_function_says_of_users_is_not_repeated(
    plain: Target, conn: Connection, body: str
) -> None:
    plain.apply(people(1))
    meddle(plain, body)
    conn.execute(
        "select set_config('search_path', %s, false)",
        (plain.conn.execute("show search_path").fetchall()[0][0],),
    )
    [line] = tried(conn, plain)
    assert "1@example.com" not in line
    assert " in the function " in line


@pytest.fixture
def published(database_url: str, connection: psycopg.Connection) -> Iterator[Connection]:
    """Return the check's connection to a database of its own, all of which may be published."""
    with closing(connect(database_url)) as conn:
        yield conn


GENERATED = """
create schema s; create table s.users_sync (raw_json jsonb not null,
    id text generated always as (raw_json->>'id') stored primary key,
    name text generated always as (raw_json->>'display_name') stored,
    email text generated always as (raw_json->>'primary_email') stored,
    created_at timestamptz generated always as (
        to_timestamp(trunc((raw_json->>'signed_up_at_millis')::bigint::double precision) / 1000)
    ) stored, updated_at timestamptz, deleted_at timestamptz)
"""
PLAIN = f"create schema s; create table s.users_sync ({PLAIN_COLUMNS.format(id_type='text')})"


ALL = 'create publication "All" for all tables'
SCHEMA = 'create publication "All" for tables in schema s'
FILTERED = 'create publication "All" for table s.users_sync where (deleted_at is null)'
LISTED = 'create publication "All" for table s.users_sync (raw_json)'
IDENTITY = "alter table s.users_sync replica identity"


@pytest.mark.parametrize(
    ("table", "publication", "oldest"),
    [
        (GENERATED, ALL, 180000),
        (GENERATED, SCHEMA, 180000),
        (GENERATED, FILTERED, 150000),
        (GENERATED, LISTED, 150000),
        (PLAIN, FILTERED, 150000),
        (PLAIN, LISTED, 150000),
        (PLAIN.replace("primary key", "unique not null"), ALL, 0),
        (f"{PLAIN}; {IDENTITY} nothing", ALL, 0),
        (f"{GENERATED}; {IDENTITY} full", ALL, 180000),
        (f"{GENERATED}; {IDENTITY} nothing", ALL, 0),
    ],
)
def test_publication_that_keeps_rows_from_being_updated_is_named_with_the_fix(
    connection: psycopg.Connection, published: Connection, table: str, publication: str, oldest: int
) -> None:
    if published.info.server_version < oldest:
        pytest.skip("came with a later PostgreSQL")
    connection.execute(table.encode())
    connection.execute(b"create publication harmless for all tables with (publish = 'insert')")
    connection.execute(publication.encode())
    shape = Shape.GENERATED if GENERATED in table else Shape.PLAIN
    refused, *named = find_refusals(published, "s", shape)
    assert refused.text.startswith("an update of a made-up user is refused: cannot update table")
    assert [found.verdict for found in named] == ["FAIL"]
    assert named[0].text.startswith('the publication "All" keeps the table from being updated: run')
    for fix in fixes(named):
        connection.execute(fix.encode())
    assert find_refusals(published, "s", shape) == []


def test_generated_column_outside_the_key_need_not_be_published(
    connection: psycopg.Connection, published: Connection
) -> None:
    generated = "alter table s.users_sync add other text generated always as (name) stored"
    connection.execute(f"{PLAIN}; {generated}; {IDENTITY} nothing; {ALL}".encode())
    _, *named = find_refusals(published, "s", Shape.PLAIN)
    assert fixes(named) == ["alter table s.users_sync replica identity default"]
    connection.execute(fixes(named)[0].encode())
    assert find_refusals(published, "s", Shape.PLAIN) == []


def test_check_of_a_table_tries_it(plain: Target, conn: Connection) -> None:
    plain.query("create index on users_sync (deleted_at)")
    assert [found.verdict for found in look_at_table(conn, plain.schema)] == ["ok"]
    meddle(plain, "return null;")
    found = look_at_table(conn, plain.schema)
    assert [each.verdict for each in found] == ["ok", "note", "FAIL"]
    assert found[-1].exit_code == 2
