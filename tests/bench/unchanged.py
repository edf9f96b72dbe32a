"""Measures what a sweep costs that finds everybody as they were."""

import time
from collections.abc import Callable

from tests.bench.api import started_api
from tests.bench.figures import Conditions, Figure, in_turns
from tests.bench.postgres import Databases, Written, written
from tests.bench.workers import Warm, warmed


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users = conditions.choose(20_000, 100_000)
    with started_api(users) as api, databases.fresh() as url, warmed(api, url) as warm:
        for _ in range(2):  # each record is sent in two forms; both are known then
            warm.sweep()
        seconds = in_turns(2 * conditions.rounds, {"cpu": lambda: _processor_seconds(warm)})
        wall = in_turns(conditions.rounds, {"wall": lambda: warm.sweep().duration_seconds})
        looking = _written_by(url, lambda: None)
        silent = _written_by(url, lambda: warm.sweep(trace=False))
        traced = _written_by(url, warm.sweep)
        pages = warm.sweep().counts["pages"]
    return [
        Figure("speed", users / seconds["cpu"], "users/s per core", at_least=150_000),
        Figure("speed by the clock", users / wall["wall"], "users/s"),
        Figure("pages", pages),
        # To look is a transaction, too.
        Figure("transactions", silent.transactions - looking.transactions, at_most=0),
        Figure("WAL", silent.wal_bytes, "bytes", at_most=0),
        Figure("WAL of the sweep's own row", traced.wal_bytes, "bytes"),
    ]


def _written_by(url: str, work: Callable[[], object]) -> Written:
    before = written(url)
    work()
    return written(url).since(before)


def _processor_seconds(warm: Warm) -> float:
    before = time.process_time()
    warm.sweep()
    return time.process_time() - before
