"""Measures a first load from an API that costs nothing, against `COPY` of the same rows."""

import time

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
    for name, limit in PAGES.items():
        with started_api(users, kind=KINDS[name]) as api:
            figures += _measured(conditions, databases, users, api, f"{name}, by {limit:,}", limit)
    return figures


def _measured(  # noqa: PLR0917
    conditions: Conditions,
    databases: Databases,
    users: int,
    api: RemoteApi,
    name: str,
    limit: int,
) -> list[Figure]:
    rows = ready_rows(api.call("bodies"))
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
        Figure(f"{name}: first load over COPY", found.ratio("load", "copy"), at_most=2),
        Figure(f"{name}: first load", users / found.median("load"), "users/s"),
        Figure(f"{name}: COPY alone", users / found.median("copy"), "users/s"),
        Figure(f"{name}: applying alone", users / found.median("apply"), "users/s"),
        Figure(f"{name}: bare reading alone", users / found.median("read"), "users/s"),
        Figure(f"{name}: the worker's processor time", min(processor) * 1e6 / users, "us a user"),
    ]
