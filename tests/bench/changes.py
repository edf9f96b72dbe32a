"""Measures what a cold sweep writes and takes, against upserts row by row and of many rows."""

import time
from collections.abc import Callable, Iterator
from statistics import median

import psycopg
from psycopg.types.json import Jsonb

from tests.bench import bare
from tests.bench.api import RemoteApi, started_api
from tests.bench.figures import Conditions, Figure, in_turns
from tests.bench.postgres import Databases, Written, linked, written
from tests.bench.workers import once

PAGE = 1_000
LINK_SECONDS = 0.002
SHARES = {"unchanged": 0.0, "1 % changed": 0.01, "100 % changed": 1.0}

UPSERT = """
insert into neon_auth.users_sync (raw_json, updated_at) {rows}
on conflict (id) do update set raw_json = excluded.raw_json, updated_at = excluded.updated_at
"""
ONE = UPSERT.format(rows="values (%s, now())")
MANY = UPSERT.format(rows="select value, now() from jsonb_array_elements(%s)")

Way = Callable[[RemoteApi, str], object]


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users = conditions.choose(3_000, 10_000)
    with started_api(users) as api:
        figures = [_round_trips(api, databases)]
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


def _ours(api: RemoteApi, url: str) -> None:
    once(api, url, PAGE)


WAYS: dict[str, Way] = {"ours": _ours, "row by row": _row_by_row, "many rows": _many_rows}


def _changed(api: RemoteApi, share: float, versions: Iterator[int]) -> None:
    if share:
        api.call("edit_share", share, f"Version {next(versions)}")


def _compared(
    conditions: Conditions, databases: Databases, api: RemoteApi, name: str, share: float
) -> list[Figure]:
    """Let each way bring a table of its own up to date, after the same share of users changed."""
    left: dict[str, list[Written]] = {way: [] for way in WAYS}
    versions = iter(range(10_000))
    with databases.fresh() as a, databases.fresh() as b, databases.fresh() as c:
        urls = dict(zip(WAYS, (a, b, c), strict=True))
        for url in urls.values():
            once(api, url, PAGE)

        def turn(way: str) -> float:
            if way == "ours":
                _changed(api, share, versions)
            before = written(urls[way], by_leavers=True)
            began = time.perf_counter()
            WAYS[way](api, urls[way])
            seconds = time.perf_counter() - began
            left[way].append(written(urls[way], by_leavers=True).since(before))
            return seconds

        found = in_turns(
            conditions.rounds,
            {way: (lambda way=way: turn(way)) for way in WAYS},  # type: ignore[misc]
        )
    figures = []
    for way in WAYS:
        figures += [
            Figure(f"{name}, {way}: time", found.median(way), "s"),
            Figure(f"{name}, {way}: rows written", median(each.rows for each in left[way])),
            Figure(f"{name}, {way}: WAL", median(each.wal_bytes for each in left[way]) / 1e6, "MB"),
        ]
    return figures


def _behind_a_link(databases: Databases, api: RemoteApi, name: str, share: float) -> list[Figure]:
    figures = []
    versions = iter(range(10_000))
    for way, bring in WAYS.items():
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
