"""Measures a sweep on both kinds of users API, over bare reading of the same list by cursor."""

from contextlib import ExitStack

from tests.bench.api import KINDS, REAL_SERVER, RemoteApi, started_api
from tests.bench.bare import read_list
from tests.bench.figures import Conditions, Figure, in_turns
from tests.bench.postgres import Databases
from tests.bench.workers import warmed
from worker.sandbox.api import Kind

PAGE_SIZE = 1_000


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users = conditions.choose(5_000, 20_000)
    figures = [Figure("users in the project", users), Figure("users a page", PAGE_SIZE)]
    for name, kind in KINDS.items():
        figures += _measured(conditions, databases, users, name, kind)
    return figures


def _measured(
    conditions: Conditions, databases: Databases, users: int, name: str, kind: Kind
) -> list[Figure]:
    with ExitStack() as opened:
        api: RemoteApi = opened.enter_context(started_api(users, kind=kind))
        url = opened.enter_context(databases.fresh())
        warm = opened.enter_context(warmed(api, url, PAGE_SIZE))
        api.call("spend", REAL_SERVER)
        turns = in_turns(
            conditions.rounds,
            {
                "bare": lambda: read_list(api, PAGE_SIZE),
                "sweep": lambda: warm.sweep().duration_seconds,
            },
        )
        api.call("pages")
        warm.sweep()
        requests = len(api.call("pages"))
    return [
        Figure(f"{name}: sweep over bare reading", turns.ratio("sweep", "bare"), at_most=1.05),
        Figure(f"{name}: bare reading", turns.median("bare"), "s"),
        Figure(f"{name}: requests of a sweep", requests),
    ]
