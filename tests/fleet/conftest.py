"""Fixtures around `FleetWorld`."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.support.fleet_world import FleetWorld, opened_fleet
from worker.sandbox.postgres import create_database, drop_database


@pytest.fixture
def second_url(postgres_url: str) -> Iterator[str]:
    """Return the URL of one more empty database."""
    url = create_database(postgres_url)
    yield url
    drop_database(postgres_url, str(conninfo_to_dict(url)["dbname"]))


@pytest.fixture
def fleet(database_url: str, second_url: str, tmp_path: Path) -> Iterator[FleetWorld]:
    """Return a fleet without projects; their tables go to the second database."""
    with opened_fleet(database_url, [second_url], tmp_path) as world:
        yield world
