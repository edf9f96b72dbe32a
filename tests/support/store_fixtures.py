"""Fixtures around `Target`."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from uuid import UUID

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.support.store_target import PLAIN_COLUMNS, Target
from worker.sandbox.postgres import create_database, drop_database
from worker.store import transaction
from worker.store.migrate import creation_sql
from worker.store.table_shape import Shape

# Every target has such a name: braces and percent signs mean something in templates of SQL.
ODD_NAME = """we{{i}}rd %s "X" 'ü {number}"""

_SCHEMA = "create schema {schema}; set search_path to {schema}"
_PLAIN = f"create table users_sync ({PLAIN_COLUMNS})"
_GENERATED = """
create table users_sync (
    raw_json jsonb not null,
    id text generated always as (raw_json->>'id') stored not null primary key,
    name text generated always as (raw_json->>'display_name') stored,
    email text generated always as (raw_json->>'primary_email') stored,
    created_at timestamptz generated always as (
        to_timestamp(trunc((raw_json->>'signed_up_at_millis')::bigint::double precision) / 1000)
    ) stored,
    updated_at timestamptz,
    deleted_at timestamptz
)
"""

_numbers = count()


@pytest.fixture(scope="session")
def store_url(postgres_url: str) -> Iterator[str]:
    """Return the URL of a database with the worker's own tables, for all targets together."""
    url = create_database(postgres_url)
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(creation_sql("neon_auth").encode())
    yield url
    drop_database(postgres_url, str(conninfo_to_dict(url)["dbname"]))


@pytest.fixture(scope="session")
def looking(store_url: str) -> Iterator[psycopg.Connection]:
    """Return the connection by which all targets are looked at: a new one takes its time."""
    with psycopg.connect(store_url, autocommit=True) as conn:
        yield conn


@pytest.fixture
def short_lock_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wait for a locked row no longer than a test likes; no other limit gets shorter by it.

    A short lease would do so as well, but then a slow machine could not keep the other ones.
    """
    monkeypatch.setattr(transaction, "LOCK_TIMEOUT_SECONDS", 0.15)


@pytest.fixture
def empty_target(store_url: str, looking: psycopg.Connection) -> Iterator[Target]:
    """Return a target whose schema has no table yet."""
    schema = ODD_NAME.format(number=next(_numbers))
    looking.execute(sql.SQL(_SCHEMA).format(schema=sql.Identifier(schema)))
    with ExitStack() as ends:
        yield Target(store_url, schema, Shape.GENERATED, looking, ends)


@pytest.fixture
def generated(empty_target: Target) -> Target:
    """Return a target with a table as Neon makes it."""
    empty_target.query(_GENERATED)
    return empty_target


@pytest.fixture
def plain(empty_target: Target) -> Target:
    """Return a target with a table as Neon's documentation prints it."""
    empty_target.query(_PLAIN.format(id_type="text"))
    empty_target.shape = Shape.PLAIN
    return empty_target


@pytest.fixture(params=list(Shape), ids=lambda shape: shape.value)
def target(request: pytest.FixtureRequest, empty_target: Target) -> Target:
    """Return a target of each shape in turn."""
    empty_target.shape = request.param
    id_type = "uuid" if request.param is Shape.PLAIN_UUID else "text"
    generated = request.param is Shape.GENERATED
    empty_target.query(_GENERATED if generated else _PLAIN.format(id_type=id_type))
    return empty_target


@pytest.fixture(params=[Shape.PLAIN, Shape.PLAIN_UUID], ids=lambda shape: shape.value)
def written(request: pytest.FixtureRequest, empty_target: Target) -> Target:
    """Return a target of each shape whose columns are all written by us."""
    empty_target.shape = request.param
    id_type = "uuid" if request.param is Shape.PLAIN_UUID else "text"
    empty_target.query(_PLAIN.format(id_type=id_type))
    return empty_target


@pytest.fixture
def background() -> Iterator[ThreadPoolExecutor]:
    """Return threads for what has to wait while the test goes on."""
    with ThreadPoolExecutor() as threads:
        yield threads


@pytest.fixture
def plain_role(connection: psycopg.Connection) -> Iterator[str]:
    """Return the name of a role without any rights, which is dropped afterwards."""
    name = f"users_sync_test_{UUID(int=time.time_ns()).hex[-12:]}"
    role = sql.Identifier(name)
    connection.execute(sql.SQL("create role {}").format(role))
    yield name
    connection.execute(sql.SQL("drop owned by {0}; drop role {0}").format(role))
