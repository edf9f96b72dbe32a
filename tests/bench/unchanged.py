"""Measures what a sweep costs that finds everybody as they were."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

import orjson

from tests.bench.api import started_api
from tests.bench.bare import read_bodies
from tests.bench.figures import Conditions, Figure, in_turns
from tests.bench.postgres import Databases, Link, linked, written
from tests.bench.workers import Warm, warmed
from worker.model import Page
from worker.stack_auth.page_reader import read_page

IGNORED = ("last_active_at_millis",)

# Now and then the lease is renewed, or Postgres writes something of its own: the least counts.
LOOKS = 3


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users = conditions.choose(20_000, 100_000)
    with (
        started_api(users) as api,
        databases.fresh() as url,
        linked(url) as link,
        warmed(api, link.url) as warm,
    ):
        warm.sweep()
        api.call("pages")
        warm.sweep()
        bodies = read_bodies(api, api.call("pages"))
        seconds = in_turns(
            2 * conditions.rounds,
            {
                "sweep": lambda: _processor_seconds(warm.sweep),
                "parse": lambda: _processor_seconds(lambda: list(map(orjson.loads, bodies))),
                "look": lambda: _processor_seconds(lambda: list(map(_look, bodies))),
            },
        )
        wall = in_turns(conditions.rounds, {"wall": lambda: warm.sweep().duration_seconds})
        silent = [_left_by(warm, url, link, leaves_row=False) for _ in range(LOOKS)]
        with_row = [_left_by(warm, url, link, leaves_row=True) for _ in range(LOOKS)]
        pages = warm.sweep().counts["pages"]
    trips, wal = map(min, zip(*silent, strict=True))
    row_trips, row_wal = map(min, zip(*with_row, strict=True))
    return [
        Figure("speed", users / seconds.median("sweep"), "users/s per core", at_least=150_000),
        # The API's process is at work beside a sweep, on what may be the other half of one core.
        Figure("reading the same pages alone", users / seconds.median("look"), "users/s per core"),
        # What this machine's core is worth.
        Figure("orjson.loads alone", users / seconds.median("parse"), "users/s per core"),
        Figure("speed by the clock", users / wall.median("wall"), "users/s"),
        Figure("pages", pages),
        Figure("round trips to the database", trips, at_most=0),
        Figure("WAL", wal, "bytes", at_most=0),
        Figure("round trips for the sweep's own row", row_trips),
        Figure("WAL of the sweep's own row", row_wal, "bytes"),
    ]


def _look(body: bytes) -> Page | None:
    return read_page(body, datetime.now(UTC), IGNORED)


def _left_by(warm: Warm, url: str, link: Link, *, leaves_row: bool) -> tuple[int, int]:
    """Sweep, and say how often the database was spoken to, and how much WAL it wrote."""
    before, trips = written(url), link.trips
    warm.sweep(leaves_row=leaves_row)
    trips = link.trips - trips
    return trips, written(url).since(before).wal_bytes


def _processor_seconds(work: Callable[[], object]) -> float:
    before = time.process_time()
    work()
    return time.process_time() - before
