"""Whatever happens, in any order: nothing false is in the table, and in the end it is right."""

from collections.abc import Iterator
from functools import partial
from typing import cast

import psycopg
import pytest
import structlog
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from hypothesis.stateful import run_state_machine_as_test

from tests.faults.fake_world import Scene
from tests.faults.machine import Machine
from tests.faults.model_users import CONSTRAINTS
from tests.support.fake_time import FakeTime, installed
from tests.support.sweep_world import World
from worker.store.migrate import creation_sql


@pytest.fixture
def fake_time(shared_database: World) -> Iterator[FakeTime]:
    """Return the clock of a database with an empty table, which refuses some users."""
    conn = shared_database.conn
    conn.execute(creation_sql("neon_auth").encode())
    conn.execute(CONSTRAINTS)

    def query(text: str, *params: object) -> list[psycopg.rows.TupleRow]:
        cursor = conn.execute(text.encode(), params or None)
        return cursor.fetchall() if cursor.description else []

    with installed(query) as clock:
        yield clock


@pytest.fixture
def no_log() -> Iterator[None]:
    """Leave out what workers log: of thousands of sweeps nobody could read it."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())
    yield
    structlog.reset_defaults()


@pytest.mark.fault(
    "any of all these, in any order",
    held="nothing false in the table, and two sweeps make it right",
    quick=10,
    thorough=400,
)
@pytest.mark.usefixtures("no_log")
# psycopg's cursor is not closed when the connection breaks at the very statement that closes it.
@pytest.mark.filterwarnings("ignore:.*was deleted while still open:ResourceWarning")
def test_after_anything_in_any_order_the_table_is_right(
    shared_database: World, fake_time: FakeTime, tries: int
) -> None:
    machine = partial(Machine, shared_database.url, fake_time)
    run_state_machine_as_test(
        cast(type[Machine], machine),
        settings=hypothesis_settings(
            max_examples=tries,
            stateful_step_count=60,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
    print("\n".join(f"{count:7,} {what}" for what, count in sorted(Scene.happened.items())))  # noqa: T201
