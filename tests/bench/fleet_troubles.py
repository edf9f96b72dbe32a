"""The fleet in trouble: databases that are away, projects that fail, and many that come and go."""

import os
import random
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.bench.figures import Conditions, Figure
from tests.bench.fleet_world import BUDGET, Bench, SignUps, most_within, opened_bench
from tests.bench.postgres import Databases, linked
from tests.support.pgbouncer import running_pgbouncer
from tests.support.waiting import until

WORKERS = 3
# A first load of so many pages is under way when the control database goes.
LONG_USERS, PAGE_SECONDS = 5_000, 0.7

_FRESH = """
select count(*) from users_sync_fleet.visit where fresh_at > to_timestamp(%s) and name = any(%s)
"""
_STATES = "select state from users_sync_fleet.status where name = any(%s) order by name"
_FAILURES = "select sum(failures) from users_sync_fleet.visit where name = any(%s)"
_STRAY = """
select count(*) from procrastinate_jobs j
where not exists (select from users_sync_fleet.project p where p.name = j.lock and p.enabled)
"""


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    """Measure three workers with a hundred projects: several minutes."""
    projects, seconds = conditions.choose(30, 100), conditions.choose(15, 40)
    found = []
    with _at_work(databases, projects) as bench:
        found += _failing(bench, seconds)
        found += _coming_and_going(bench, projects // 5, seconds)
    with _at_work(databases, projects) as bench:
        found += _without_control(bench, conditions.choose(15, 60))
    with _pooler(databases) as way, _at_work(databases, projects, way) as bench:
        found += _pooled(bench, seconds)
    return found


@contextmanager
def _at_work(
    databases: Databases, projects: int, way: Callable[[str], str] = lambda url: url
) -> Iterator[Bench]:
    dice = random.Random(1)
    with opened_bench(databases, way=way) as bench:
        for _ in range(projects):
            bench.add(dice.randint(50, 300))
        for _ in range(WORKERS):
            bench.start()
        bench.await_all()
        time.sleep(15)  # the means of requests settle, and the cycle with them
        yield bench


def _failing(bench: Bench, seconds: float) -> list[Figure]:
    """Break four projects in four ways, each with work to do, and look at all others."""
    well, dice = list(bench.ids), random.Random(2)
    expected = [("failing",), ("failing",), ("needs a person",), ("held",)]
    with linked(bench.target_urls[0]) as link:
        away, broken, revoked = (bench.add(100, url) for url in (link.url, None, None))
        held = bench.add(100)
        bench.await_step()
        names = [away, broken, revoked, held]
        sign_ups = SignUps(bench, well, dice)
        before, every = _paced(sign_ups, seconds)
        os.kill(link.pid, signal.SIGSTOP)  # it answers nothing, and refuses nothing
        bench.apis.do("fail", bench.ids[broken])
        bench.apis.do("revoke", bench.ids[revoked])
        bench.apis.do("delete", bench.ids[held], 40)
        bench.apis.do("create", bench.ids[away])
        during, then_every = _paced(sign_ups, seconds)
        failures = sum(bench.query(_FAILURES, names)[0])
        until("they are told of", lambda: bench.query(_STATES, names) == expected)
        os.kill(link.pid, signal.SIGCONT)
    bench.control.remove(names)
    for name in names:
        del bench.ids[name]
    return [
        Figure("all well, each asked for once in", every, "s"),
        Figure("all well, sign-up to row: median", statistics.median(before), "s"),
        Figure("all well, sign-up to row: 95 of 100", _nearly_all(before), "s"),
        Figure("four fail, each other asked for once in", then_every, "s"),
        Figure("the same by that before", then_every / every, "", at_most=1.15),
        Figure("four fail, sign-up of others to row: median", statistics.median(during), "s"),
        Figure("four fail, sign-up of others to row: 95 of 100", _nearly_all(during), "s"),
        Figure("visits of the four that failed meanwhile", failures),
    ]


def _paced(sign_ups: SignUps, seconds: float) -> tuple[list[float], float]:
    """Let users sign up; tells how long they took, and the seconds between two requests to each."""
    bench, began = sign_ups.bench, time.monotonic()
    bench.apis.do("asked_each")
    took = sign_ups.go_on(seconds)
    times, passed = bench.apis.do("asked_each"), time.monotonic() - began
    asked = sum(times[bench.ids[name]] for name in sign_ups.names)
    return took, passed * len(sign_ups.names) / asked


def _coming_and_going(bench: Bench, some: int, seconds: float) -> list[Figure]:
    """Add, pause and remove projects while users sign up in all others."""
    names, dice = list(bench.ids), random.Random(3)
    dice.shuffle(names)
    paused, removed, rest = names[:some], names[some : 2 * some], names[2 * some :]
    sign_ups = SignUps(bench, rest, dice)
    at, added = bench.now(), list[str]()
    for number in range(some):
        added.append(bench.add(dice.randint(50, 300)))
        bench.control.enable([paused[number]], enabled=False)
        bench.control.remove([removed[number]])
        sign_ups.one()
        sign_ups.look()
    took = bench.now() - at
    time.sleep(2)  # visits that were under way come to their end
    changed = bench.now()
    for name in (*paused, *removed):
        bench.apis.do("create", bench.ids[name])
    in_step = bench.await_step(added)
    sign_ups.go_on(seconds)
    late = [name for name, fresh in bench.fresh_at().items() if name in paused and fresh > changed]
    wrong = bench.out_of_step([*rest, *added])
    written = [name for name in (*paused, *removed) if not bench.out_of_step([name])]
    bench.control.enable(paused, enabled=True)
    resumed = bench.await_step(paused)
    [(stray,)] = bench.query(_STRAY)
    for name in removed:
        del bench.ids[name]
    return [
        Figure("projects added, paused and removed, each", some),
        Figure("within", took, "s"),
        Figure("2 s later, until those that were added were in step", in_step, "s"),
        Figure("paused ones that were visited afterwards", len(late), "", at_most=0),
        Figure("paused or removed ones that were written", len(written), "", at_most=0),
        Figure("sign-up to row of the others: median", statistics.median(sign_ups.seconds), "s"),
        Figure("resumed until in step", resumed, "s"),
        Figure("the others and the added, out of step", len(wrong), "", at_most=0),
        Figure("visits that wait for none of them", stray, "", at_most=0),
    ]


def _without_control(bench: Bench, seconds: float) -> list[Figure]:
    """Take the control database away, in the middle of a first load."""
    dice = random.Random(4)
    long = bench.add(LONG_USERS, page_seconds=PAGE_SECONDS)
    until("the long load is under way", lambda: bench.live(long), look_seconds=0.1)
    began = len(bench.live(long))
    sign_ups = SignUps(bench, [name for name in bench.ids if name != long], dice)
    bench.apis.do("asked")
    with _away(bench.control_url, bench.target_urls[0]):
        ends_at = time.monotonic() + seconds
        while time.monotonic() < ends_at:
            sign_ups.one()
            time.sleep(0.5)
        loaded = len(bench.live(long))
        alive = sum(worker.poll() is None for worker in bench.workers)
    at = bench.now()
    others = len(sign_ups.names)
    until(
        "all are visited again",
        lambda: bench.query(_FRESH, at, list(sign_ups.names)) == [(others,)],
    )
    again = bench.now() - at
    sign_ups.go_on(0)
    asked = bench.apis.do("asked")
    bench.await_step()
    failed = bench.warnings().count("visit.failed")
    return [
        Figure("control database away", seconds, "s"),
        Figure("rows of a long load when it went", began),
        Figure("rows of it before the control database was back", loaded, "", at_least=LONG_USERS),
        Figure("visits that failed for it", failed, "", at_most=0),
        Figure("workers that still ran", alive, "", at_least=WORKERS),
        Figure("back until every project was visited", again, "s"),
        Figure(
            "requests in any one second, all the while", most_within(asked, 1.0), "", at_most=BUDGET
        ),
        Figure("out of step in the end", len(bench.out_of_step()), "", at_most=0),
    ]


def _pooled(bench: Bench, seconds: float) -> list[Figure]:
    sign_ups = SignUps(bench, list(bench.ids), random.Random(5))
    fresh, every = _paced(sign_ups, seconds)
    failed = len(bench.warnings())
    return [
        Figure("behind PgBouncer, each asked for once in", every, "s"),
        Figure("behind PgBouncer, sign-up to row: median", statistics.median(fresh), "s"),
        Figure("behind PgBouncer, sign-up to row: 95 of 100", _nearly_all(fresh), "s"),
        Figure("warnings in the log", failed, "", at_most=0),
        Figure("projects out of step in the end", len(bench.out_of_step()), "", at_most=0),
    ]


@contextmanager
def _away(url: str, other_url: str) -> Iterator[None]:
    """Let nobody into a database, and end who is there; `other_url` is on the same server."""
    name = str(conninfo_to_dict(url)["dbname"])
    allowing = sql.SQL("alter database {} allow_connections ").format(sql.Identifier(name))
    with psycopg.connect(other_url, autocommit=True) as conn:
        conn.execute(allowing + sql.SQL("false"))
        conn.execute(
            "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s", (name,)
        )
        try:
            yield
        finally:
            conn.execute(allowing + sql.SQL("true"))


@contextmanager
def _pooler(databases: Databases) -> Iterator[Callable[[str], str]]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # it runs as another user
        with running_pgbouncer(databases.url, Path(folder)) as way:
            yield way


def _nearly_all(seconds: Sequence[float]) -> float:
    return statistics.quantiles(seconds, n=20)[-1]
