"""Measures how near to the best fixed page size `auto` comes."""

from dataclasses import dataclass

from tests.bench.api import FLAT, REAL_SERVER, SLOW_LINK, Costs, RemoteApi, started_api
from tests.bench.figures import Conditions, Figure
from tests.bench.postgres import Databases
from tests.bench.workers import once, warmed

# Of larger pages a server's memory is at risk, and `auto` asks for none.
SIZES = (1_000, 2_000, 5_000, 10_000)


@dataclass(frozen=True, slots=True)
class Server:
    """A server, and a project on it: where all users cost the same, fewer of them say as much."""

    name: str
    costs: Costs
    users: int


# The list of the real server is as long as the one that was measured. The costs are not scaled
# down: `auto` goes by seconds, too.
REAL = Server("real server", REAL_SERVER, 60_000)
SERVERS = (Server("flat", FLAT, 30_000), Server("slow link", SLOW_LINK, 30_000), REAL)
QUICK_USERS = 5_000


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    figures: list[Figure] = []
    for server in SERVERS:
        users = conditions.choose(QUICK_USERS, server.users)
        with started_api(users) as api, databases.fresh() as url:
            once(api, url)
            api.call("spend", server.costs)
            auto = once(api, url).duration_seconds
            # Nearly all of it is waiting, which takes as long each time.
            fixed = {size: once(api, url, size).duration_seconds for size in SIZES}
            figures += _compared(conditions, server, auto, fixed)
            if server is REAL and not conditions.quick:
                figures += _with_fresh_polls(api, url, min(fixed.values()))
    return figures


def _compared(
    conditions: Conditions, server: Server, auto: float, fixed: dict[int, float]
) -> list[Figure]:
    best = min(fixed, key=lambda size: fixed[size])
    # A short list ends before `auto` has found its size.
    at_most = None if conditions.quick else 1.10
    return [
        Figure(
            f"{server.name}: auto over the best fixed size", auto / fixed[best], at_most=at_most
        ),
        Figure(f"{server.name}: best fixed size", best, "users"),
        Figure(f"{server.name}: sweep with the best fixed size", fixed[best], "s"),
        Figure(f"{server.name}: sweep with the worst fixed size", max(fixed.values()), "s"),
    ]


def _with_fresh_polls(api: RemoteApi, url: str, best: float) -> list[Figure]:
    """Say what the long-running worker gives up, whose pages must not keep polls waiting."""
    with warmed(api, url) as warm:
        warm.source.page_size.keep_polls_fresh = True
        for _ in range(2):
            report = warm.sweep()
    seconds, pages = report.duration_seconds, report.counts["pages"]
    return [
        Figure("real server, fresh polls: sweep", seconds, "s"),
        Figure("real server, fresh polls: over the best fixed size", seconds / best),
        Figure("real server, fresh polls: users a page", report.counts["users"] / pages),
        Figure("real server, fresh polls: seconds a page", seconds / pages, "s"),
    ]
