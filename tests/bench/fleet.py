"""The fleet: freshness within a budget, and workers that are killed."""

import random
import statistics
import time

import psycopg

from tests.bench.figures import Conditions, Figure
from tests.bench.fleet_world import BUDGET, Bench, SignUps, most_within, opened_bench
from tests.bench.postgres import Databases

KILL_EVERY_SECONDS = 20.0

_CHANGED = "select id::text, extract(epoch from updated_at)::float from {} where id::text = any(%s)"
_LEAVE = "insert into users_sync_worker.hint (target, user_id) values (%s, %s)"


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    """Measure three workers: several minutes."""
    projects = conditions.choose(30, 300)
    with opened_bench(databases) as bench:
        dice = random.Random(1)
        for number in range(projects):
            bench.add(5_000 if number % 30 == 29 else dice.randint(50, 500))
        for _ in range(3):
            bench.start()
        found = [Figure(f"{projects} projects, first loads", bench.await_all(), "s")]
        found += _freshness(bench, conditions.choose(20, 60))
        found += _killed(bench, conditions.choose(40, 180), dice)
        found.append(Figure("SIGTERM until the end of all workers", bench.stop(), "s", at_most=5))
    return found


def _freshness(bench: Bench, seconds: int) -> list[Figure]:
    """Sign up, and hint, in projects by chance, while nothing else goes on."""
    time.sleep(15)  # the means of requests settle, and the cycle with them
    dice, names = random.Random(2), list(bench.ids)
    hinted = dice.sample(names, len(names) // 3)
    sign_ups = SignUps(bench, [name for name in names if name not in {*hinted}], dice)
    bench.apis.do("asked")
    edited: dict[str, tuple[str, float]] = {}
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        name = dice.choice(names)
        if name in hinted and name not in edited:
            edited[name] = _hint(bench, name)
        else:
            sign_ups.one()
        for _ in range(4):
            time.sleep(dice.uniform(0.02, 0.1))
            sign_ups.look()
    [(cycle,)] = bench.query("select max(cycle_seconds) from users_sync_fleet.host")
    asked = bench.apis.do("asked")
    sign_ups.go_on(0)
    delays = []
    for name, (user_id, at) in edited.items():
        [(_, updated)] = bench.rows(name, _CHANGED, [user_id])
        delays.append(updated - at)
    # Nor is any project visited more often than it asks for.
    every = max(1.0, cycle)
    fresh, projects = sign_ups.seconds, len(names)
    median = statistics.median(fresh)
    return [
        Figure("budget, requests a second", BUDGET),
        Figure("visits to each project, one every", every, "s"),
        Figure("sign-up to row: median", median, "s"),
        Figure("the same by half of that", median / (every / 2), "", at_most=1.3),
        Figure("sign-up to row: 95 of 100", statistics.quantiles(fresh, n=20)[-1], "s"),
        Figure("projects by budget", projects / BUDGET, "s"),
        Figure("hint to row: median", statistics.median(delays), "s", at_most=2),
        Figure("requests a second, mean", len(asked) / seconds, "", at_most=BUDGET),
        Figure("requests in any one second", most_within(asked, 1.0), "", at_most=BUDGET),
    ]


def _hint(bench: Bench, name: str) -> tuple[str, float]:
    user_id, at = str(bench.apis.do("edit", bench.ids[name], "hinted")), time.time()
    with psycopg.connect(bench.urls[name], autocommit=True) as conn:
        conn.execute(_LEAVE, (f"of_{name}", user_id))
    bench.control.hint(name)
    return user_id, at


def _killed(bench: Bench, seconds: int, dice: random.Random) -> list[Figure]:
    """Kill one worker after the other while users come, change and go."""
    began, kills, again = time.monotonic(), 0, [0.0]
    waiting: dict[str, float] = {}
    names = list(bench.ids)
    bench.apis.do("asked")
    while time.monotonic() - began < seconds or waiting:
        due = time.monotonic() - began > kills * KILL_EVERY_SECONDS
        if due and time.monotonic() - began < seconds:
            victim = bench.workers.pop(0)
            victim.kill()
            victim.wait()
            now = bench.now()
            waiting.update((name, now) for name in names if name not in waiting)
            bench.start()
            kills += 1
        project_id = bench.ids[dice.choice(names)]
        order = dice.choice(["create", "edit", "delete"])
        bench.apis.do(order, project_id, *([str(kills)] if order == "edit" else []))
        # A visit that was begun before the kill, or that found the lease taken, does not count.
        now = bench.now()
        for name, at in bench.fresh_at().items():
            if at > waiting.get(name, at):
                again.append(now - waiting.pop(name))
        time.sleep(0.2)
    asked = bench.apis.do("asked")
    bench.await_step()
    return [
        Figure("workers killed", kills),
        Figure("kill until every project was visited again", max(again), "s", at_most=45),
        Figure("requests in any one second meanwhile", most_within(asked, 1.0), "", at_most=BUDGET),
        Figure("projects out of step in the end", len(bench.out_of_step()), "", at_most=0),
    ]
