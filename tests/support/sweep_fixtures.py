"""Fixtures around `World`."""

from collections.abc import Iterator
from contextlib import ExitStack

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.support.sweep_world import World
from worker.sandbox.postgres import create_database, drop_database


@pytest.fixture
def world(database_url: str, users_api: str) -> Iterator[World]:
    """Return a world of its own: empty project, empty database."""
    with psycopg.connect(database_url, autocommit=True) as conn:
        yield World(database_url, conn, users_api=users_api)


@pytest.fixture(scope="module")
def shared_database(postgres_url: str) -> Iterator[World]:
    """Make one database for all tests of a module, with the worker's tables in it."""
    url = create_database(postgres_url)
    with ExitStack() as end:
        end.callback(drop_database, postgres_url, str(conninfo_to_dict(url)["dbname"]))
        conn = end.enter_context(psycopg.connect(url, autocommit=True))
        yield World(url, conn)


@pytest.fixture
def quick_world(shared_database: World, users_api: str) -> World:
    """Return the world that the tests of a module share, emptied."""
    shared_database.users_api = users_api
    shared_database.forget_everything()
    return shared_database
