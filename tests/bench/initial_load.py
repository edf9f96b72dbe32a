"""Measures a first load from an API that costs nothing, against `COPY` of the same rows."""

import time
from dataclasses import replace

from tests.bench.api import KINDS, RemoteApi, started_api
from tests.bench.bare import copy_rows, read_pages, ready_rows
from tests.bench.figures import Conditions, Figure, in_turns
from tests.bench.postgres import Databases
from tests.bench.workers import apply_alone, once, read_ahead

# What today's server gives at most, and what docs/settings.md advises for April's.
PAGES = {"today": 1_000, "April": 10_000}


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users = conditions.choose(20_000, 100_000)
    figures = []
    for kind, limit in PAGES.items():
        with started_api(users, kind=KINDS[kind]) as api:
            found = _measured(conditions, databases, api, limit)
        figures += [replace(each, name=f"{kind}, by {limit:,}: {each.name}") for each in found]
    return figures


def _measured(
    conditions: Conditions, databases: Databases, api: RemoteApi, limit: int
) -> list[Figure]:
    bodies = api.call("bodies")
    users, rows = len(bodies), ready_rows(bodies)
    with databases.fresh() as url:
        once(api, url, limit)
    pages = [page for page in api.call("pages") if "limit=" in page]
    ahead = read_ahead(api, limit)
    processor: list[float] = []

    def load() -> float:
        with databases.fresh() as url:
            before = time.process_time()
            seconds = once(api, url, limit).duration_seconds
            processor.append(time.process_time() - before)
            return seconds

    def copy() -> float:
        with databases.fresh(with_table=True) as url:
            return copy_rows(url, rows)

    def apply() -> float:
        with databases.fresh() as url:
            return apply_alone(api, url, ahead).duration_seconds

    def read() -> float:
        return read_pages(api, pages)

    found = in_turns(conditions.rounds, {"load": load, "copy": copy, "apply": apply, "read": read})
    return [
        Figure("first load over COPY", found.ratio("load", "copy"), at_most=2),
        Figure("first load", users / found.median("load"), "users/s"),
        Figure("COPY alone", users / found.median("copy"), "users/s"),
        Figure("applying alone", users / found.median("apply"), "users/s"),
        Figure("bare reading alone", users / found.median("read"), "users/s"),
        Figure("the worker's processor time", min(processor) * 1e6 / users, "us a user"),
    ]
