"""Measures how near to the best fixed page size `auto` comes."""

from tests.bench.api import FLAT, REAL_SERVER, SLOW_LINK, RemoteApi, started_api
from tests.bench.figures import Conditions, Figure, in_turns
from tests.bench.postgres import Databases
from tests.bench.workers import once, warmed

MODELS = {"flat": FLAT, "real server": REAL_SERVER, "slow link": SLOW_LINK}
SIZES = (1_000, 2_000, 5_000, 10_000)

# All costs of a model alike: what `auto` does depends on their ratios, and an hour is saved.
SCALE = 0.2


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users = conditions.choose(20_000, 60_000)
    figures: list[Figure] = []
    with started_api(users) as api, databases.fresh() as url:
        once(api, url)
        for name, costs in MODELS.items():
            api.call("spend", costs.times(SCALE))
            figures += _compared(api, url, name)
        api.call("spend", REAL_SERVER)
        if not conditions.quick:
            figures += _with_fresh_polls(api, url)
    return figures


def _compared(api: RemoteApi, url: str, name: str) -> list[Figure]:
    def sweep(size: int | str) -> float:
        return once(api, url, size).duration_seconds

    sizes: tuple[int | str, ...] = ("auto", *SIZES)
    # Nearly all of it is waiting, which takes as long each time.
    found = in_turns(1, {str(size): (lambda size=size: sweep(size)) for size in sizes})  # type: ignore[misc]
    auto = found.pop("auto")
    best = min(found, key=lambda size: found[size])
    return [
        Figure(f"{name}: auto over the best fixed size", auto / found[best], at_most=1.10),
        Figure(f"{name}: best fixed size", int(best), "users"),
        Figure(f"{name}: sweep with the best fixed size", found[best], "s"),
        Figure(f"{name}: sweep with the worst fixed size", max(found.values()), "s"),
    ]


def _with_fresh_polls(api: RemoteApi, url: str) -> list[Figure]:
    """Say what the long-running worker gives up, whose pages must not keep polls waiting."""
    best = once(api, url, max(SIZES)).duration_seconds
    with warmed(api, url) as warm:
        warm.source.page_size.keep_polls_fresh = True
        for _ in range(2):
            report = warm.sweep()
    return [
        Figure("real server, fresh polls: sweep", report.duration_seconds, "s"),
        Figure("real server, fresh polls: over pages of 10,000", report.duration_seconds / best),
        Figure(
            "real server, fresh polls: users a page",
            report.counts["users"] / report.counts["pages"],
        ),
    ]
