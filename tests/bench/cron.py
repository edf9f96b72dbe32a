"""Measures what `--once` writes and takes, warm and cold, against what others do instead."""

import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from unittest.mock import patch

import psycopg
from psycopg.types.json import Jsonb

from tests.bench import bare
from tests.bench.api import RemoteApi, started_api
from tests.bench.figures import Conditions, Figure, in_turns
from tests.bench.postgres import Databases, Written, linked, written
from tests.bench.workers import once
from worker.sync.cache import Cache

PAGE = 1_000
LINK_SECONDS = 0.002
SHARES = {"unchanged": 0.0, "1 % changed": 0.01, "100 % changed": 1.0}

UPSERT = """
insert into neon_auth.users_sync (raw_json, updated_at) {rows}
on conflict (id) do update set raw_json = excluded.raw_json, updated_at = excluded.updated_at
"""
ONE = UPSERT.format(rows="values (%s, now())")
MANY = UPSERT.format(rows="select value, now() from jsonb_array_elements(%s)")

DELETE_SNAPSHOT = "delete from users_sync_worker.snapshot"
SNAPSHOT_BYTES = "select pg_total_relation_size('users_sync_worker.snapshot_chunk')"

# Names a Python with dlt, which is compared only then.
DLT_PYTHON = "BENCH_DLT_PYTHON"

Way = Callable[[RemoteApi, str], object]


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users = conditions.choose(3_000, 60_000)
    with started_api(users) as api:
        figures = [_round_trips(api, databases), *_first_load(conditions, databases, api, users)]
        for name, share in SHARES.items():
            figures += _compared(conditions, databases, api, name, share)
    with started_api(conditions.choose(300, 2_000)) as api:
        for name, share in SHARES.items():
            figures += _behind_a_link(databases, api, name, share)
    return figures


def _row_by_row(api: RemoteApi, url: str) -> None:
    with psycopg.connect(url) as conn:
        for page in bare.pages(api, PAGE):
            for record in page:
                conn.execute(ONE, (Jsonb(record),))
            conn.commit()


def _many_rows(api: RemoteApi, url: str) -> None:
    with psycopg.connect(url) as conn:
        for page in bare.pages(api, PAGE):
            conn.execute(MANY, (Jsonb(page),))
            conn.commit()


def _warm(api: RemoteApi, url: str) -> None:
    once(api, url, PAGE)


def _cold(api: RemoteApi, url: str) -> None:
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(DELETE_SNAPSHOT)
    once(api, url, PAGE)


def _bare(api: RemoteApi, url: str) -> None:
    bare.read_list(api, PAGE)


def _dlt(api: RemoteApi, url: str) -> None:
    script = Path(__file__).with_name("dlt_merge.py")
    # It wants a host and a password.
    with linked(url) as link:
        address = link.url.replace("@", ":none@")
        arguments = [api.url, api.project_id, api.secret_server_key, address]
        subprocess.run([os.environ[DLT_PYTHON], script, *arguments], check=True)


WAYS: dict[str, Way] = {"warm": _warm, "cold": _cold, "many rows": _many_rows}
SLOW_WAYS: dict[str, Way] = {"bare reading": _bare, "row by row": _row_by_row}
LINKED_WAYS: dict[str, Way] = {"warm": _warm, "many rows": _many_rows, "row by row": _row_by_row}

# Over the warm run: time, and WAL.
LEAST_TIME = {"unchanged": 3.0, "1 % changed": 2.0}
LEAST_WAL = {"1 % changed": 50.0}


def _changed(api: RemoteApi, share: float, versions: Iterator[int]) -> None:
    if share:
        api.call("edit_share", share, f"Version {next(versions)}")


def _first_load(
    conditions: Conditions, databases: Databases, api: RemoteApi, users: int
) -> list[Figure]:
    """Load an empty table with the snapshot, and without: what does not compare cannot save."""
    wal: dict[str, list[int]] = {"with": [], "without": []}
    size: list[int] = []

    def load(way: str) -> float:
        with databases.fresh(with_table=True) as url:
            began = time.perf_counter()
            with patched_saving(saves=way == "with"):
                once(api, url, PAGE)
            seconds = time.perf_counter() - began
            wal[way].append(written(url, by_leavers=True).wal_bytes)
            with psycopg.connect(url) as conn:
                size.extend(row[0] for row in conn.execute(SNAPSHOT_BYTES))
            return seconds

    found = in_turns(
        conditions.rounds, {"with": lambda: load("with"), "without": lambda: load("without")}
    )
    return [
        Figure(
            "first load, with the snapshot over without",
            found.ratio("with", "without"),
            at_most=1.1,
        ),
        Figure("first load", found.median("with"), "s"),
        Figure("snapshot", max(size) / users, "bytes a user", at_most=40),
    ]


@contextmanager
def patched_saving(*, saves: bool) -> Iterator[None]:
    """Run with a cache that saves nothing, unless it `saves`."""
    if saves:
        yield
        return
    with patch.object(Cache, "save"):
        yield


def _compared(
    conditions: Conditions, databases: Databases, api: RemoteApi, name: str, share: float
) -> list[Figure]:
    """Let each way bring a table of its own up to date, after the same share of users changed."""
    ways = dict(WAYS)
    if not share:
        ways |= SLOW_WAYS | ({"dlt": _dlt} if os.environ.get(DLT_PYTHON) else {})
    left: dict[str, list[Written]] = {way: [] for way in ways}
    versions = iter(range(10_000))
    with ExitStack() as opened:
        urls = {way: opened.enter_context(databases.fresh()) for way in ways}
        for way, url in urls.items():
            ways[way](api, url) if way == "dlt" else once(api, url, PAGE)

        def turn(way: str) -> float:
            if way == "warm":
                _changed(api, share, versions)
            before = written(urls[way], by_leavers=True)
            began = time.perf_counter()
            ways[way](api, urls[way])
            seconds = time.perf_counter() - began
            left[way].append(written(urls[way], by_leavers=True).since(before))
            return seconds

        found = in_turns(
            conditions.rounds,
            {way: (lambda way=way: turn(way)) for way in ways},  # type: ignore[misc]
        )
    wal = {way: median(each.wal_bytes for each in left[way]) for way in ways}
    figures = [
        Figure(
            f"{name}, many rows over warm: time",
            found.ratio("many rows", "warm"),
            at_least=LEAST_TIME.get(name),
        ),
        Figure(
            f"{name}, many rows over warm: WAL",
            wal["many rows"] / wal["warm"],
            at_least=LEAST_WAL.get(name),
        ),
    ]
    if not share:
        figures.append(
            Figure(
                f"{name}, warm over bare reading: time",
                found.ratio("warm", "bare reading"),
                at_most=1.5,
            )
        )
    if "dlt" in ways:
        figures.append(
            Figure(f"{name}, dlt over warm: time", found.ratio("dlt", "warm"), at_least=10)
        )
    for way in ways:
        figures += [
            Figure(f"{name}, {way}: time", found.median(way), "s"),
            Figure(f"{name}, {way}: rows written", median(each.rows for each in left[way])),
            Figure(f"{name}, {way}: WAL", wal[way] / 1e6, "MB"),
        ]
    return figures


def _behind_a_link(databases: Databases, api: RemoteApi, name: str, share: float) -> list[Figure]:
    figures = []
    versions = iter(range(10_000))
    for way, bring in LINKED_WAYS.items():
        with databases.fresh() as url, linked(url, LINK_SECONDS) as link:
            once(api, url, PAGE)
            _changed(api, share, versions)
            trips, began = link.trips, time.perf_counter()
            bring(api, link.url)
            seconds = time.perf_counter() - began
            figures += [
                Figure(f"{name}, {way}, 2 ms away: time", seconds, "s"),
                Figure(f"{name}, {way}, 2 ms away: round trips", link.trips - trips),
            ]
    return figures


def _round_trips(api: RemoteApi, databases: Databases) -> Figure:
    """Count what each page more costs, when all of its users changed."""
    trips: list[int] = []
    pages: list[int] = []
    for size in (PAGE, PAGE // 4):
        with databases.fresh() as url, linked(url) as link:
            once(api, url, PAGE)
            api.call("edit_share", 1.0, f"In pages of {size}")
            before = link.trips
            pages.append(once(api, link.url, size).counts["pages"])
            trips.append(link.trips - before)
    each = (trips[1] - trips[0]) / (pages[1] - pages[0])
    return Figure("round trips for each changed page", each, at_most=3)
