"""Measures what share of a server's time the worker takes, and which setting changes it."""

import time
from dataclasses import replace

from tests.bench.api import REAL_POLLS, Costs, RemoteApi, started_api
from tests.bench.figures import Conditions, Figure
from tests.bench.postgres import Databases
from tests.bench.workers import Process, running

SCHEDULE = "USERS_SYNC_SCHEDULE__"
# A server that is busy with others takes a second for a poll.
BUSY = replace(REAL_POLLS, newest_first=0.9)
CASES: dict[str, tuple[Costs, dict[str, str]]] = {
    "default schedule": (REAL_POLLS, {}),
    "sweep_share = 0.125": (REAL_POLLS, {"SWEEP_SHARE": "0.125"}),
    "poll_seconds = 2": (REAL_POLLS, {"POLL_SECONDS": "2"}),
    "a poll takes 1 s": (BUSY, {}),
    "a poll takes 1 s, poll_share = 0.1": (BUSY, {"POLL_SHARE": "0.1"}),
}


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    users = conditions.choose(10_000, 30_000)
    figures = [Figure("users in the project", users)]
    with started_api(users) as api:
        for name, (costs, schedule) in CASES.items():
            # The first load is not what is measured.
            api.call("spend", REAL_POLLS)
            variables = {f"{SCHEDULE}{key}": value for key, value in schedule.items()}
            with databases.fresh() as url, running(api, url, variables) as worker:
                worker.wait_for_sweeps(1)
                figures += _shares(api, worker, name, costs)
    return figures


def _shares(api: RemoteApi, worker: Process, name: str, costs: Costs) -> list[Figure]:
    """Measure from the end of one sweep to the end of the next: a pause and a sweep."""
    api.call("spend", costs)
    api.call("worked")
    began, done = time.perf_counter(), len(worker.sweeps())
    worker.wait_for_sweeps(done + 1)
    seconds = time.perf_counter() - began
    sweeps, polls = (100 * worked / seconds for worked in api.call("worked"))
    return [
        Figure(f"{name}: sweeps", sweeps, "% of a core"),
        Figure(f"{name}: polls", polls, "% of a core"),
    ]
