"""Measures what the worker adds to the time that the API takes."""

from contextlib import ExitStack

from tests.bench.api import FREE, REAL_SERVER, Costs, RemoteApi, started_api
from tests.bench.bare import read_pages
from tests.bench.figures import Conditions, Figure, Turns, in_turns
from tests.bench.postgres import Databases
from tests.bench.workers import once, warmed


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users, page = conditions.choose(8_000, 30_000), 1_000
    with started_api(users) as api:
        slow = _seconds(conditions, databases, api, REAL_SERVER, page)
        fast = _seconds(conditions, databases, api, FREE, page)
    return [
        Figure("first sweep over bare reading", slow.ratio("first", "bare first"), at_most=1.05),
        Figure("later sweep over bare reading", slow.ratio("later", "bare later"), at_most=1.05),
        Figure("users in the project", users),
        Figure("first sweep", slow.median("first"), "s"),
        Figure("bare reading of its pages", slow.median("bare first"), "s"),
        Figure("later sweep", slow.median("later"), "s"),
        Figure("bare reading of its pages, outwards", slow.median("bare later"), "s"),
        Figure("no cost: first sweep over bare reading", fast.ratio("first", "bare first")),
        Figure("no cost: later sweep over bare reading", fast.ratio("later", "bare later")),
    ]


def _seconds(
    conditions: Conditions, databases: Databases, api: RemoteApi, costs: Costs, page: int
) -> Turns:
    with ExitStack() as opened:
        url = opened.enter_context(databases.fresh())
        api.call("pages")  # what was asked for before is of no concern
        warm = opened.enter_context(warmed(api, url, page))
        # A later sweep goes outwards: its pages cost the API fewer rows.
        first_pages = api.call("pages")
        warm.sweep()
        later_pages = api.call("pages")
        api.call("spend", costs)

        def first() -> float:
            with databases.fresh() as empty:
                return once(api, empty, page).duration_seconds

        return in_turns(
            conditions.rounds,
            {
                "bare first": lambda: read_pages(api, first_pages),
                "first": first,
                "bare later": lambda: read_pages(api, later_pages),
                "later": lambda: warm.sweep().duration_seconds,
            },
        )
