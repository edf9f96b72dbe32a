"""Measures how soon after a sign-up there is a row, while others sign up, edit and are swept."""

import statistics
import time
from random import Random

import psycopg

from tests.bench.api import FLAT, RemoteApi, started_api
from tests.bench.figures import Conditions, Figure
from tests.bench.postgres import Databases
from tests.bench.workers import running

USERS = 30_000
EDITS = 5
LOOK_SECONDS = 0.004
SIGNED_UP = "select 1 from neon_auth.users_sync where id = %s"
SCHEDULES = {
    "default schedule": {},
    "sweeps all the time": {
        "USERS_SYNC_SCHEDULE__SWEEP_SECONDS": "0.1",
        "USERS_SYNC_SCHEDULE__SWEEP_SHARE": "1",
    },
}


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    sign_ups = conditions.choose(10, 60)
    figures = []
    with started_api(USERS, FLAT) as api:
        for name, variables in SCHEDULES.items():
            with databases.fresh() as url, running(api, url, **variables) as worker:
                worker.wait_for_sweeps(1)
                delays = sorted(_delays(api, url, sign_ups))
            figures += [
                Figure(f"{name}: median", statistics.median(delays), "s", at_most=1),
                Figure(f"{name}: 95 of 100", delays[int(len(delays) * 0.95) - 1], "s"),
                Figure(f"{name}: longest", delays[-1], "s"),
            ]
    return figures


def _delays(api: RemoteApi, url: str, count: int) -> list[float]:
    """Let users sign up and others be edited, at random moments, and wait for each row."""
    chance, delays = Random(2), []
    with psycopg.connect(url, autocommit=True) as conn:
        for _ in range(count):
            time.sleep(chance.uniform(0.1, 1.1))
            api.call("edit_some", EDITS)
            user_id = api.call("sign_up")
            began = time.perf_counter()
            while conn.execute(SIGNED_UP, (user_id,)).fetchone() is None:
                time.sleep(LOOK_SECONDS)
            delays.append(time.perf_counter() - began)
    return delays
