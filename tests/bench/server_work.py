"""Measures what a sweep outwards from the middle spares the server, against one from the start."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

from tests.bench.api import FREE, REAL_SERVER, RemoteApi, started_api
from tests.bench.figures import Conditions, Figure, in_turns
from tests.bench.postgres import Databases
from tests.bench.workers import Warm, warmed
from worker.sync import walk

PAGE_SIZE = 1_000
# The true costs would take a quarter of an hour each time.
SCALE = 50
SCALED = replace(
    REAL_SERVER,
    request=REAL_SERVER.request / SCALE,
    user=REAL_SERVER.user / SCALE,
    row_behind_cursor=REAL_SERVER.row_behind_cursor / SCALE,
)
NEVER = 10**9


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    figures = []
    for users in (20_000,) if conditions.quick else (20_000, 100_000, 1_000_000):
        with started_api(users, of_many=users > 100_000) as api:
            figures += _rows(databases, api, users)
    users = conditions.choose(10_000, 300_000)
    with (
        started_api(users, of_many=True) as api,
        databases.fresh() as url,
        warmed(api, url, PAGE_SIZE) as warm,
    ):
        api.call("spend", SCALED)
        turns = in_turns(
            1,
            {
                "outwards": lambda: warm.sweep().duration_seconds,
                "forwards": lambda: _forwards(warm),
            },
        )
        api.call("spend", FREE)
    return [
        *figures,
        Figure(
            f"{users:,} users: time of a sweep, outwards over forwards",
            turns.ratio("outwards", "forwards"),
            at_most=0.62,
        ),
        Figure(f"{users:,} users: forwards, costs over {SCALE}", turns.median("forwards"), "s"),
        Figure(f"{users:,} users: outwards, costs over {SCALE}", turns.median("outwards"), "s"),
    ]


def _rows(databases: Databases, api: RemoteApi, users: int) -> list[Figure]:
    with databases.fresh() as url, warmed(api, url, PAGE_SIZE) as warm:
        api.call("rows_read")
        warm.sweep()
        outwards = api.call("rows_read")
        _forwards(warm)
        forwards = api.call("rows_read")
    return [
        Figure(
            f"{users:,} users: rows the server reads, outwards over forwards",
            outwards / forwards,
            at_most=0.55 if users >= 100_000 else None,
        ),
        Figure(f"{users:,} users: rows read forwards", forwards),
    ]


def _forwards(warm: Warm) -> float:
    with _from_the_start():
        return warm.sweep().duration_seconds


@contextmanager
def _from_the_start() -> Iterator[None]:
    with patch.object(walk, "OUTWARDS_PAGES", NEVER):
        yield
