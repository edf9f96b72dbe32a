"""What users_sync promises to applications: the examples of Neon's documentation, after sweeps."""

from contextlib import AbstractContextManager
from threading import Event

import httpx
import psycopg
import pytest

from tests.support.sweep_world import PLAIN, World, settings
from worker.cli.purge import Purge
from worker.cli.session import Session, opened_session

APPLICATION = """
create table todos (
    id serial primary key,
    task text not null,
    user_id {id_type} not null references neon_auth.users_sync (id) on delete cascade,
    created_at timestamptz default current_timestamp
);
create table posts (
    id serial primary key,
    title text not null,
    author_id {id_type} references neon_auth.users_sync (id) on delete set null
)
"""
NEW_TODO = "insert into todos (task, user_id) values ('Buy milk', %s)"
NEW_POST = "insert into posts (title, author_id) values (%s, %s)"
POSTS = """
select title, name from posts left join neon_auth.users_sync u on author_id = u.id
where deleted_at is null order by posts.id
"""
COLUMNS = """
select column_name::text, data_type::text, is_nullable::text from information_schema.columns
where table_schema = 'neon_auth' and table_name = 'users_sync'
"""
PRIMARY_KEY = """
select a.attname::text from pg_index i
join pg_attribute a on a.attrelid = i.indrelid and a.attnum = any(i.indkey)
where i.indrelid = 'neon_auth.users_sync'::regclass and i.indisprimary
"""


@pytest.fixture(params=["generated", "text", "uuid"])
def application(request: pytest.FixtureRequest, world: World) -> World:
    """Return a world with an application on a table of each shape, after a sweep."""
    if request.param != "generated":
        world.conn.execute(PLAIN.format(id_type=request.param).encode())
    world.project.populate(3)
    world.sweep()
    id_type = "uuid" if request.param == "uuid" else "text"
    world.conn.execute(APPLICATION.format(id_type=id_type).encode())
    return world


def session(world: World) -> AbstractContextManager[Session]:
    transport = httpx.WSGITransport(world.api)
    return opened_session(settings(world.project), world.url, Event(), transport)


def somebody(world: World) -> str:
    return min(world.project.ids())


def titles(world: World) -> list[str]:
    return [row[0] for row in world.conn.execute(POSTS)]


def count(world: World, table: str) -> int:
    return int(world.query(f"select count(*) from {table}")[0][0])  # noqa: S608


def leave(world: World, user_id: str) -> None:
    world.project.delete(user_id)
    world.sweep()
    assert user_id in world.deleted()


def test_row_of_a_user_can_be_referred_to_as_soon_as_it_is_there(application: World) -> None:
    created = application.project.create(display_name="Ada")
    with pytest.raises(psycopg.errors.ForeignKeyViolation):
        application.query(NEW_TODO, created)
    application.sweep()
    application.query(NEW_TODO, created)
    assert count(application, "todos") == 1


def test_insert_right_after_the_sign_up_need_not_wait_for_a_sweep(application: World) -> None:
    created = application.project.create()
    with session(application) as opened:
        assert opened.sync(created).became == "inserted"
    application.query(NEW_TODO, created)


def test_left_join_keeps_orphans_and_leaves_deleted_users_out(application: World) -> None:
    stays, leaves = sorted(application.project.ids())[:2]
    application.query(NEW_POST, "of who stays", stays)
    application.query(NEW_POST, "of who leaves", leaves)
    application.query(NEW_POST, "of nobody", None)
    assert titles(application) == ["of who stays", "of who leaves", "of nobody"]
    leave(application, leaves)
    assert titles(application) == ["of who stays", "of nobody"]


def test_soft_delete_keeps_the_children(application: World) -> None:
    user_id = somebody(application)
    application.query(NEW_TODO, user_id)
    application.query(NEW_POST, "kept", user_id)
    leave(application, user_id)
    assert (count(application, "todos"), count(application, "posts")) == (1, 1)
    assert application.query("select author_id::text from posts") == [(user_id,)]


def test_purge_lets_cascade_and_set_null_act(application: World) -> None:
    user_id, other = sorted(application.project.ids())[:2]
    for one in (user_id, other):
        application.query(NEW_TODO, one)
        application.query(NEW_POST, "title", one)
    leave(application, user_id)
    application.query(
        "update neon_auth.users_sync set deleted_at = now() - interval '2 h'"
        " where deleted_at is not null"
    )
    with session(application) as opened:
        assert Purge(opened, seconds=3600, dry_run=False).run().users == 1
    assert application.query("select user_id::text from todos") == [(other,)]
    assert application.query("select author_id::text from posts order by id") == [(None,), (other,)]


def test_restored_user_keeps_its_children(application: World) -> None:
    user_id = somebody(application)
    record = application.project.users()[user_id]
    application.query(NEW_TODO, user_id)
    application.query(NEW_POST, "kept", user_id)
    leave(application, user_id)
    application.project.create(**record)
    application.sweep()
    assert user_id in application.live()
    assert (count(application, "todos"), titles(application)) == (1, ["kept"])


def test_drizzle_and_prisma_find_the_columns_they_expect(application: World) -> None:
    columns = {name: (type_, nullable) for name, type_, nullable in application.query(COLUMNS)}
    moment = "timestamp with time zone"
    types = {name: type_ for name, (type_, _) in columns.items()}
    assert types.pop("id") in {"text", "uuid"}
    assert types == {
        "raw_json": "jsonb",
        "name": "text",
        "email": "text",
        "created_at": moment,
        "updated_at": moment,
        "deleted_at": moment,
    }
    assert columns["id"][1] == "NO"
    assert application.query(PRIMARY_KEY) == [("id",)]


def test_table_the_worker_creates_is_the_one_of_drizzles_helper(world: World) -> None:
    world.sweep()
    assert set(world.query(COLUMNS)) == {
        ("raw_json", "jsonb", "NO"),
        ("id", "text", "NO"),
        ("name", "text", "YES"),
        ("email", "text", "YES"),
        ("created_at", "timestamp with time zone", "YES"),
        ("updated_at", "timestamp with time zone", "YES"),
        ("deleted_at", "timestamp with time zone", "YES"),
    }
