"""Measures how soon after a sign-up there is a row, while others sign up, edit and are swept."""

import time
from random import Random
from statistics import median

import psycopg

from tests.bench.api import REAL_SERVER, RemoteApi, started_api
from tests.bench.figures import Conditions, Figure
from tests.bench.postgres import Databases
from tests.bench.workers import EAGER, running
from tests.support.waiting import PATIENCE_SECONDS

USERS = 30_000
# Before each sign-up so many others are edited.
EDITS = 5
PAUSE_SECONDS = (0.05, 0.35)
LOOK_SECONDS = 0.004
SIGNED_UP = "select id from neon_auth.users_sync where id = any(%s)"
SCHEDULES: dict[str, dict[str, str]] = {"default schedule": {}, "sweeps all the time": EAGER}


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    sign_ups = conditions.choose(25, 200)
    figures = []
    with started_api(USERS, REAL_SERVER) as api:
        for name, variables in SCHEDULES.items():
            with databases.fresh() as url, running(api, url, variables) as worker:
                worker.wait_for_sweeps(1)
                delays = sorted(_delays(api, url, sign_ups))
            figures += [
                Figure(f"{name}: median", median(delays), "s", at_most=1),
                Figure(f"{name}: 95 of 100", _within(delays, 0.95), "s"),
                Figure(f"{name}: 99 of 100", _within(delays, 0.99), "s"),
                Figure(f"{name}: longest", delays[-1], "s"),
            ]
    return figures


def _within(delays: list[float], share: float) -> float:
    """Give the time within which this share of all were done."""
    return delays[max(0, round(len(delays) * share) - 1)]


def _delays(api: RemoteApi, url: str, count: int) -> list[float]:
    """Let users sign up and others be edited, at random moments, and see when each has a row."""
    chance, due, signed_up = Random(2), 0.0, 0
    waiting: dict[str, float] = {}
    delays: list[float] = []
    with psycopg.connect(url, autocommit=True) as conn:
        while len(delays) < count:
            if signed_up < count and time.perf_counter() >= due:
                api.call("edit_some", EDITS)
                began = time.perf_counter()
                waiting[api.call("sign_up")] = began
                signed_up += 1
                due = began + chance.uniform(*PAUSE_SECONDS)
            for (user_id,) in conn.execute(SIGNED_UP, (list(waiting),)).fetchall():
                delays.append(time.perf_counter() - waiting.pop(user_id))
            if waiting and time.perf_counter() - min(waiting.values()) > PATIENCE_SECONDS:
                raise TimeoutError(f"there is no row of {len(waiting)} who signed up")
            time.sleep(LOOK_SECONDS)
    return delays
