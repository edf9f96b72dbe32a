"""What `check` finds in a database: each finding by itself, by a role that may read and no more."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import psycopg
import pytest
from psycopg import sql

from tests.support.store_target import PLAIN_COLUMNS, Target, people, person
from worker.cli.check.checks import judge_way
from worker.cli.check.other_writers import find_sessions, find_stale_rows, find_writers
from worker.cli.check.refused_users import find_refusable, find_refused
from worker.cli.check.result import Finding
from worker.cli.check.rights import require_own_rights, require_table_rights
from worker.cli.check.table import (
    find_foreign_keys,
    find_index_troubles,
    find_purge_rights,
    find_unlogged,
    look_at_table,
)
from worker.errors import DataRefused, Misconfigured
from worker.store.connection import Connection
from worker.store.database import connect
from worker.store.migrate import creation_sql, missing_migrations
from worker.store.quarantine import BadRecord, Quarantine, refused_record
from worker.store.table_shape import Shape

# Names of which nothing may be taken for a part of SQL, or for a placeholder.
ODD_ROLE = """ro{{l}}e %s "X" 'ü {number}"""
ODD_SCHEMA = """ab{sent} %s "X" ('ü"""

READ_ONLY = "set default_transaction_read_only = on"


@pytest.fixture(scope="module")
def conn(store_url: str) -> Iterator[Connection]:
    """Return the connection of the check: on this one nothing can be written."""
    with closing(connect(store_url)) as conn:
        conn.execute(READ_ONLY)
        yield conn


@pytest.fixture
def lone(connection: psycopg.Connection, database_url: str) -> Iterator[Target]:
    """Return a target in a database of its own, with the worker's tables in it, too."""
    connection.execute(creation_sql(ODD_SCHEMA).encode())
    path = sql.Identifier(ODD_SCHEMA).as_string()
    connection.execute("select set_config('search_path', %s, false)", (path,))
    with ExitStack() as ends:
        yield Target(database_url, ODD_SCHEMA, Shape.GENERATED, connection, ends)


@pytest.fixture
def role(connection: psycopg.Connection) -> Iterator[str]:
    """Return the quoted name of a role that may log in, and no more, in a database of its own."""
    name = sql.Identifier(ODD_ROLE.format(number=time.time_ns())).as_string()
    connection.execute(f"create role {name}; revoke create on schema public from public".encode())
    yield name
    connection.execute(f"drop owned by {name}; drop role {name}".encode())


@pytest.fixture
def few_rights(database_url: str, role: str) -> Iterator[Connection]:
    """Return the connection of a check by that role."""
    with closing(connect(database_url)) as conn:
        conn.execute(READ_ONLY)
        conn.execute(f"set role {role}".encode())
        yield conn


def lines(findings: list[Finding]) -> list[str]:
    return [f"{finding.verdict} {finding.text}" for finding in findings]


def fixes(text: str) -> list[str]:
    """Return what stands between backticks."""
    return text.split("`")[1::2]


# Foreign keys


def test_foreign_keys_say_when_their_action_is_due(generated: Target, conn: Connection) -> None:
    generated.query(
        """
        alter table users_sync add unique (id, email);
        create table a (u text primary key references users_sync on delete cascade);
        create table b (u text primary key references users_sync on delete set null);
        create table c (u text primary key references users_sync on delete set default);
        create table d (u text primary key references users_sync on delete restrict);
        create table e (u text primary key references users_sync);
        create table f ("user" text, mail text, primary key (mail, "user"),
                        foreign key ("user", mail) references users_sync (id, email));
        create table none (u text)
        """
    )
    schema = sql.Identifier(generated.schema).as_string()
    waits = "acts only when the row goes: users-sync purge"
    keeps = "users-sync purge keeps users as long as rows here refer to them"
    assert lines(find_foreign_keys(conn, generated.schema)) == [
        f"note {schema}.a.u: cascade {waits}",
        f"note {schema}.b.u: set null {waits}",
        f"note {schema}.c.u: set default {waits}",
        f"note {schema}.d.u: {keeps}",
        f"note {schema}.e.u: {keeps}",
        f"""note {schema}.f ("user", mail): {keeps}""",
    ]


def test_foreign_keys_of_other_schemas_and_to_other_tables(
    generated: Target, conn: Connection
) -> None:
    other = sql.Identifier(f"of {generated.schema}").as_string()
    generated.query(
        f"""
        create schema {other};
        create table {other}."To do" ("User" text primary key references users_sync);
        create table {other}.users_sync (id text primary key);
        create table {other}.theirs (u text references {other}.users_sync)
        """
    )
    [line] = lines(find_foreign_keys(conn, generated.schema))
    assert line.startswith(f'note {other}."To do"."User": ')


def test_unlogged_table_is_told_with_its_cure(target: Target, conn: Connection) -> None:
    assert find_unlogged(conn, target.schema) == []
    target.query("alter table users_sync set unlogged")
    [line] = lines(find_unlogged(conn, target.schema))
    assert line.startswith("warn unlogged: a crash of the server empties it")
    target.query(fixes(line)[0])
    assert find_unlogged(conn, target.schema) == []


def test_unlogged_partition_is_told_by_its_name(generated: Target, conn: Connection) -> None:
    generated.query(
        f"drop table users_sync; create table users_sync ({PLAIN_COLUMNS.format(id_type='text')})"
        " partition by hash (id);"
        'create unlogged table "A part" partition of users_sync'
        " for values with (modulus 1, remainder 0)"
    )
    [line] = lines(find_unlogged(conn, generated.schema))
    generated.query(fixes(line)[0])
    assert find_unlogged(conn, generated.schema) == []


def test_without_foreign_keys_nothing_is_said_of_them(target: Target, conn: Connection) -> None:
    assert find_foreign_keys(conn, target.schema) == []


def test_more_than_ten_foreign_keys_are_counted(generated: Target, conn: Connection) -> None:
    for number in range(12):
        generated.query(f"create table t{number:02} (u text references users_sync)")
    found = lines(find_foreign_keys(conn, generated.schema))
    assert len(found) == 22
    assert ".t09.u: " in found[9]
    assert found[10] == found[21] == "note … and 2 more"
    assert ".t00.u has no index: " in found[11]


def test_foreign_key_without_index_comes_with_one(generated: Target, conn: Connection) -> None:
    generated.query(
        """
        create table "To do" (u text references users_sync, number int, "of" text
                              references users_sync);
        create index on "To do" (number, u);
        create index on "To do" ("of") where number > 0;
        create table parts (u text references users_sync) partition by hash (u);
        create table part partition of parts for values with (modulus 1, remainder 0)
        """
    )
    found = lines(find_foreign_keys(conn, generated.schema))
    statements = [fix for line in found for fix in fixes(line)]
    assert len(found) == 6
    for statement in statements:
        generated.query(statement)
    assert ["concurrently" in statement for statement in statements] == [True, True, False]
    assert lines(find_foreign_keys(conn, generated.schema)) == found[:3]


@pytest.mark.parametrize(
    "index", ["using hash (u)", "(u, number)", "(u) where u is not null"], ids=str
)
def test_index_that_finds_rows_by_user_will_do(
    generated: Target, conn: Connection, index: str
) -> None:
    generated.query("create table t (u text references users_sync, number int)")
    generated.query(f"create index on t {index}")
    [line] = lines(find_foreign_keys(conn, generated.schema))
    assert "index" not in line


def test_foreign_key_that_is_not_enforced_is_none(generated: Target, conn: Connection) -> None:
    if conn.info.server_version < 180000:
        pytest.skip("came with PostgreSQL 18")
    generated.query("create table t (u text references users_sync not enforced)")
    assert find_foreign_keys(conn, generated.schema) == []


# Indexes of the table itself


def test_missing_index_comes_as_a_statement(target: Target, conn: Connection) -> None:
    [line] = lines(find_index_troubles(conn, target.schema))
    assert line.startswith("warn deleted_at has no index: ")
    [statement] = fixes(line)
    target.query(statement)
    assert find_index_troubles(conn, target.schema) == []


@pytest.mark.parametrize(
    ("index", "warned"),
    [
        ("(email)", True),
        ("(lower(email)) where deleted_at is null", True),
        ("((raw_json->>'primary_email'))", True),
        ("(name, email)", True),
        ("(id, email)", False),
        ("(id) include (email)", False),
        ("(name) include (email)", False),
        ("(name) where email is null", False),
    ],
)
def test_only_an_index_that_may_refuse_a_user_is_warned_of(
    generated: Target, conn: Connection, index: str, *, warned: bool
) -> None:
    generated.query(f"create unique index on users_sync {index}")
    generated.query("create index on users_sync (deleted_at); create index on users_sync (email)")
    found = lines(find_index_troubles(conn, generated.schema))
    expected = ["warn email is unique: users who swap addresses stay in quarantine"]
    assert found[:1] == expected * warned


@pytest.mark.parametrize(
    ("unique", "rows"),
    [
        ('alter table users_sync add constraint "Mail %" unique (email)', "deleted_at is null"),
        ('create unique index "Mail %" on users_sync (email)', "deleted_at is null"),
        ("create unique index on users_sync (lower(email) desc, name) include (id)", "name"),
        ("create unique index on users_sync (email) where name is not null", "name IS NOT NULL"),
    ],
)
def test_unique_email_comes_with_an_index_of_live_users_alone(
    generated: Target, conn: Connection, unique: str, rows: str
) -> None:
    generated.query("create index on users_sync (deleted_at)")
    generated.query(unique)
    generated.apply([person(1)])
    generated.query("update users_sync set deleted_at = now()")
    _, line = lines(find_index_troubles(conn, generated.schema))
    create, drop = fixes(line)
    assert rows in create
    generated.query(create)
    generated.query(drop)
    assert len(find_index_troubles(conn, generated.schema)) == 1
    again = [person(2, primary_email="1@example.com"), person(3, primary_email="1@example.com")]
    assert generated.apply(again[:1]) == "i"
    with pytest.raises(psycopg.errors.UniqueViolation):
        generated.apply(
            [person(3, primary_email="1@example.com", display_name="User 2")],
        )


# Users whom the table refuses


@pytest.mark.parametrize(
    ("constraint", "named"),
    [
        ("add constraint \"po%lite\" check (email like '%@%' and email is not null)", '"po%lite"'),
        ("alter email set not null", "not null of column email"),
        ("add check (name <> 'Odd')", "users_sync_name_check"),
        ("add check (1 / (length(name) - 3) > 9)", None),
        ("add column plan text default 'free', add check (plan = 'free')", None),
        ("add check (id is not null)", None),
    ],
)
def test_users_whom_a_constraint_would_refuse_are_counted(
    target: Target, conn: Connection, constraint: str, named: str | None
) -> None:
    target.query(f"alter table users_sync {constraint}")
    odd = people(1, 2, display_name="Odd", primary_email=None)
    text = f"2 of the first 5 users would be refused by {named}"
    found = lines(find_refusable(conn, target.schema, [*odd, *people(3, 4, 5)]))
    assert [line.partition(":")[0] for line in found] == [f"warn {text}"] * bool(named)
    assert find_refusable(conn, target.schema, []) == []


def test_users_whom_the_database_refuses_are_counted_by_reason(
    generated: Target, conn: Connection
) -> None:
    generated.held_lease()
    assert find_refused(conn, generated.schema) == []
    quarantine = Quarantine(generated.schema)
    for number, error in enumerate(["23502", "23514 polite", "23514 polite"]):
        put = quarantine.put([refused_record(person(number), DataRefused("", *error.split()))])
        generated.conn.execute(put.query, put.params)
    put = quarantine.put([BadRecord("odd", "d", "{}", "unreadable")])
    generated.conn.execute(put.query, put.params)
    assert lines(find_refused(conn, generated.schema)) == [
        "warn 2 users refused by the database: 23514 polite; `users-sync quarantine` lists them",
        "warn 1 user refused by the database: 23502; `users-sync quarantine` lists them",
    ]


# Privileges


def test_all_grants_are_given_at_once(lone: Target, role: str, few_rights: Connection) -> None:
    for required in (
        lambda: look_at_table(few_rights, lone.schema),
        lambda: require_own_rights(few_rights),
    ):
        with pytest.raises(Misconfigured) as caught:
            required()
        [grants] = fixes(str(caught.value))
        lone.query(grants)
        required()
    [line] = lines(find_purge_rights(few_rights, lone.schema))
    assert line.startswith("note the worker's role may not delete")
    worker = lone.connect()
    worker.execute(f"set role {role}".encode())
    assert lone.apply(people(1, 2), conn=worker) == "ii"
    assert missing_migrations(worker) == set()

    lone.query(*fixes(line)[1:])
    assert find_purge_rights(few_rights, lone.schema) == []


def test_only_what_is_lacking_is_granted(lone: Target, role: str, few_rights: Connection) -> None:
    lone.query(f"grant usage on schema {sql.Identifier(lone.schema).as_string()} to {role}")
    lone.query(f"grant select, update on users_sync to {role}")
    with pytest.raises(Misconfigured, match="`grant insert on ") as caught:
        require_table_rights(few_rights, lone.schema)
    assert fixes(str(caught.value))[0].count("grant ") == 1


def test_migrations_need_only_be_read(lone: Target, role: str, few_rights: Connection) -> None:
    lone.query(f"grant usage on schema users_sync_worker to {role}")
    lone.query(f"grant all on all tables in schema users_sync_worker to {role}")
    lone.query(f"revoke insert, update, delete on users_sync_worker.migration from {role}")
    assert not require_own_rights(few_rights)


def test_role_that_may_create_nothing_has_an_owner_do_it(
    connection: psycopg.Connection, role: str, few_rights: Connection
) -> None:
    demands = []
    for required in (
        lambda: require_table_rights(few_rights, ODD_SCHEMA),
        lambda: require_own_rights(few_rights),
    ):
        with pytest.raises(Misconfigured) as caught:
            required()
        command, grants = fixes(str(caught.value))
        assert command == "users-sync init --print-sql"
        demands.append((required, grants))
    connection.execute(creation_sql(ODD_SCHEMA).encode())
    for required, grants in demands:
        connection.execute(grants.encode())
        required()
    assert find_purge_rights(few_rights, ODD_SCHEMA) != []


def test_role_that_may_create_what_is_missing_needs_no_grant(
    connection: psycopg.Connection, role: str, few_rights: Connection
) -> None:
    database = sql.Identifier(connection.info.dbname).as_string()
    connection.execute(f"grant create on database {database} to {role}".encode())
    assert lines(look_at_table(few_rights, "neon_auth")) == [
        "ok neon_auth.users_sync is not there yet; `users-sync init` creates it"
    ]
    assert require_own_rights(few_rights)


# Row-level security


@pytest.fixture
def guarded(lone: Target, role: str) -> Target:
    """Return a target with row-level security, which our role may otherwise write."""
    schema = sql.Identifier(lone.schema).as_string()
    lone.query(f"grant usage on schema {schema} to {role}; grant all on users_sync to {role}")
    lone.query("alter table users_sync enable row level security")
    return lone


@pytest.mark.parametrize("forced", [False, True], ids=["another role", "the owner"])
def test_policy_that_is_asked_for_lets_the_worker_write(
    guarded: Target, role: str, few_rights: Connection, *, forced: bool
) -> None:
    if forced:
        guarded.query(f"alter table users_sync force row level security, owner to {role}")
    with pytest.raises(Misconfigured, match="row-level security hides rows") as caught:
        look_at_table(few_rights, guarded.schema)
    [policy] = fixes(str(caught.value))
    guarded.query(policy)
    assert look_at_table(few_rights, guarded.schema)[0].verdict == "ok"
    worker = guarded.connect()
    worker.execute(f"set role {role}".encode())
    assert guarded.apply(people(1), conn=worker) == "i"
    assert guarded.apply(people(1, 2, display_name="X"), conn=worker) == "ui"


@pytest.mark.parametrize(
    "policies",
    [
        "for select to public using (true)",
        "for all to public with check (true)",
        "for all to public using (deleted_at is null) with check (true)",
        "for all to public using (true) with check (email is not null)",
        "for all to pg_monitor using (true)",
        "for all to public using (true); create policy q on users_sync as restrictive using (true)",
    ],
)
def test_policy_that_leaves_out_some_rows_will_not_do(
    guarded: Target, few_rights: Connection, policies: str
) -> None:
    guarded.query(f"create policy p on users_sync {policies}")
    with pytest.raises(Misconfigured, match="row-level security hides rows"):
        look_at_table(few_rights, guarded.schema)


def test_policies_for_each_command_will_do(guarded: Target, few_rights: Connection) -> None:
    guarded.query(
        """
        create policy r on users_sync for select to public using (true);
        create policy a on users_sync for insert to public with check (true);
        create policy w on users_sync for update to public using (true);
        create policy d on users_sync as restrictive for delete to public using (false)
        """
    )
    assert look_at_table(few_rights, guarded.schema)[0].verdict == "ok"


def test_row_level_security_for_others_is_none_for_the_owner(
    guarded: Target, role: str, few_rights: Connection
) -> None:
    guarded.query(f"alter table users_sync owner to {role}")
    assert look_at_table(few_rights, guarded.schema)[0].verdict == "ok"


# Other writers


SWEEP = """
insert into users_sync_worker.sweep
select (jsonb_populate_record(null::users_sync_worker.sweep, zeros || jsonb_build_object(
    'target', %s::text, 'number', %s::int, 'kind', 'sweep', 'started', now() - %s::interval,
    'stale', %s::int))).*
from (select jsonb_object_agg(attname, 0) as zeros from pg_attribute
      where attrelid = 'users_sync_worker.sweep'::regclass and atttypid = 'bigint'::regtype) z
"""


def test_stale_rows_of_the_last_day_are_counted(generated: Target, conn: Connection) -> None:
    ours, theirs = generated.schema, f"not {generated.schema}"
    for target in (ours, theirs):
        generated.query("insert into users_sync_worker.lease (target) values (%s)", target)
    generated.query(SWEEP, theirs, 1, "1 hour", 500)
    generated.query(SWEEP, ours, 1, "2 days", 100)
    generated.query(SWEEP, ours, 2, "1 hour", 0)
    assert find_stale_rows(conn, ours) == []
    generated.query(SWEEP, ours, 3, "2 hours", 4)
    generated.query(SWEEP, ours, 4, "1 hour", 3)
    [line] = lines(find_stale_rows(conn, ours))
    assert line.startswith("warn in a day 7 rows were newer than Stack Auth's answer")


WRITES = [
    "update {table} set deleted_at = null where id = 'jane@example.com'",
    "INSERT  INTO {table}(raw_json) select raw_json from {table} where false",
    "with gone as (delete from only {table} where false returning id) select * from gone",
    "merge into {table} u using (select 1) x on false when matched then do nothing",
]  # fmt: skip


@pytest.mark.parametrize("write", WRITES)
def test_session_that_wrote_the_table_is_seen(
    generated: Target, conn: Connection, write: str
) -> None:
    if write.startswith("merge") and conn.info.server_version < 150000:
        pytest.skip("came with PostgreSQL 15")
    with generated.connect() as other:
        other.execute(
            write.format(table=sql.Identifier(generated.schema, "users_sync").as_string()).encode()
        )
        [line] = lines(find_writers(conn, generated.schema))
        assert line.startswith("warn sessions of others write the table, too")
        assert f"pid {other.info.backend_pid})" in line
        assert "jane" not in line


def test_sessions_that_read_or_write_elsewhere_are_let_be(
    generated: Target, conn: Connection
) -> None:
    """Another target's table has the same name, and a statement may leave out the schema."""
    log = sql.Identifier(generated.schema, "users_sync_log").as_string()
    harmless = (
        "select * from users_sync -- update",
        "create table users_sync_log (id text)",
        f"delete from {log}",  # noqa: S608
        "update users_sync set deleted_at = null",
    )
    with generated.connect() as other:
        generated.query(
            'create schema if not exists "other"; create table if not exists'
            ' "other".users_sync (id text)'
        )
        for statement in (*harmless, "delete from other.users_sync"):
            other.execute(statement.encode())
            assert find_sessions(conn, generated.schema) == []


def test_statement_without_a_schema_counts_where_it_can_only_be_ours(
    lone: Target, database_url: str
) -> None:
    with closing(connect(database_url)) as conn:
        assert find_sessions(conn, lone.schema) == []
        lone.query("delete from users_sync")
        assert len(find_sessions(conn, lone.schema)) == 1


def test_the_worker_itself_is_no_other_writer(generated: Target, conn: Connection) -> None:
    with closing(connect(generated.url)) as worker:
        assert generated.apply(people(1), conn=worker) == "i"
        assert find_sessions(conn, generated.schema) == []


def test_triggers_of_applications_are_named(generated: Target, conn: Connection) -> None:
    generated.query(
        """
        create table t (u text primary key references users_sync);
        create function f() returns trigger language plpgsql as 'begin return new; end';
        create trigger "Audit" before insert on users_sync for each row execute function f();
        create trigger off before insert on users_sync for each row execute function f();
        alter table users_sync disable trigger off
        """
    )
    assert lines(find_writers(conn, generated.schema)) == [
        'note the trigger "Audit" may refuse or change what the worker writes'
    ]


def test_subscription_to_the_table_is_named(generated: Target) -> None:
    """In a transaction that comes to nothing: a database with a subscription cannot be dropped."""
    with closing(connect(generated.url)) as conn, conn.transaction(force_rollback=True):
        conn.execute(
            "create subscription \"From Neon\" connection 'host=nowhere' publication p"
            " with (connect = false)"
        )
        conn.execute(
            "insert into pg_subscription_rel select s.oid, c.oid, 'r' from pg_subscription s"
            " join pg_class c on c.relname = 'users_sync'"
            " where c.relnamespace = quote_ident(%s)::regnamespace",
            (generated.schema,),
        )
        assert find_writers(conn, generated.schema) == []
        conn.execute("update pg_subscription set subenabled = true")
        [line] = lines(find_writers(conn, generated.schema))
    assert line.startswith('warn the subscription "From Neon" writes the table, too')


# The way to the server


@pytest.mark.parametrize(
    ("host", "address", "tls", "warned"),
    [
        ("db.example.com", "203.0.113.5", False, True),
        ("db.example.com", "203.0.113.5", True, False),
        ("localhost", "127.0.0.1", False, False),
        ("pooler", "::1", False, False),
        ("/var/run/postgresql", "", False, False),
    ],
)
def test_way_without_tls_is_warned_of_unless_it_is_local(
    host: str, address: str, *, tls: bool, warned: bool
) -> None:
    found = lines(judge_way(host, address, tls=tls, url="database.url"))
    assert [line.startswith(f"warn no TLS on the way to {host}: ") for line in found] == (
        [True] * warned
    )


def test_connection_of_the_check_tells_its_way(conn: Connection) -> None:
    info = conn.info
    assert judge_way(info.host, info.hostaddr, tls=conn.pgconn.ssl_in_use, url="") == []


# As a whole


def test_role_with_few_rights_is_told_everything(
    lone: Target, role: str, few_rights: Connection
) -> None:
    """A foreign key may come from a schema that the worker's role may not even use."""
    schema = sql.Identifier(lone.schema).as_string()
    lone.query(f"grant usage on schema {schema} to {role}")
    lone.query(f"grant select, insert, update on users_sync to {role}")
    lone.query(
        """
        create schema app;
        create table app.todos (user_id text references users_sync on delete cascade);
        create function app.f() returns trigger language plpgsql as 'begin return new; end';
        create trigger audit before insert on users_sync for each row execute function app.f();
        delete from users_sync
        """
    )
    found = look_at_table(few_rights, lone.schema)
    assert [(finding.verdict, finding.subject) for finding in found] == [
        ("ok", "table"),
        ("note", "table"),
        ("note", "foreign key"),
        ("note", "foreign key"),
        ("note", "other writers"),
    ]
    assert not any(finding.exit_code for finding in found)


def test_pooler_gives_the_same_answers(lone: Target, pgbouncer_url: str) -> None:
    lone.query("create table t (u text references users_sync)")
    with closing(connect(pgbouncer_url)) as pooled, closing(connect(lone.url)) as direct:
        assert look_at_table(pooled, lone.schema) == look_at_table(direct, lone.schema)
        assert len(look_at_table(pooled, lone.schema)) == 3
        assert judge_way(pooled.info.host, pooled.info.hostaddr, tls=False, url="") == []
