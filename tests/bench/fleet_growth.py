"""What a worker of the fleet costs while nothing changes, with ever more projects."""

import os
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg.conninfo import conninfo_to_dict

from tests.bench.figures import Conditions, Figure
from tests.bench.fleet_world import Bench, opened_bench
from tests.bench.postgres import Databases

USERS = 5
# As long as it takes until the means of requests, and with them the pace of visits, settle.
SETTLING_SECONDS = 15.0
MEASURED_SECONDS = 40.0
LOADING_SECONDS = 480.0

_CALLS = "select xact_commit from pg_stat_database where datname = current_database()"
# Each visit updates its row twice.
_VISITS = "select sum(n_tup_upd) / 2.0 from pg_stat_user_tables where relname = 'visit'"
_CONNECTIONS = """
select count(*) from pg_stat_activity
where application_name = 'users-sync' and datname = current_database()
"""


@dataclass(frozen=True, slots=True)
class Idle:
    """What one worker with so many projects costs: of a visit, but for memory and connections."""

    projects: int
    visits_per_second: float
    statements: float
    worker_cpu: float
    control_cpu: float
    memory: float
    connections: int


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    """Measure one worker that is given ever more projects: some ten minutes."""
    sizes = conditions.choose(20, 100), conditions.choose(40, 1_000), conditions.choose(60, 2_000)
    with opened_bench(databases) as bench:
        worker, found = bench.start(), list[Idle]()
        for size in sizes:
            while len(bench.ids) < size:
                bench.add(USERS)
            bench.await_all(LOADING_SECONDS)
            found.append(_measure(bench, worker, databases))
    return _figures(*found)


def _measure(bench: Bench, worker: subprocess.Popen[bytes], databases: Databases) -> Idle:
    time.sleep(SETTLING_SECONDS)
    # What the loading left to write is not the visits'.
    databases.execute("checkpoint")
    control = str(conninfo_to_dict(bench.control_url)["dbname"])

    def counted() -> list[float]:
        queried = [float(bench.query(each)[0][0]) for each in (_VISITS, _CALLS)]
        return [*queried, _cpu([worker.pid]), _cpu(_backends(control))]

    before, began = counted(), time.monotonic()
    time.sleep(MEASURED_SECONDS)
    after, seconds = counted(), time.monotonic() - began
    made, *costs = (now - then for now, then in zip(after, before, strict=True))
    statements, worker_cpu, control_cpu = (cost / made for cost in costs)
    return Idle(
        len(bench.ids),
        made / seconds,
        statements,
        worker_cpu,
        control_cpu,
        bench.memory(worker),
        max(_connections(url) for url in bench.target_urls),
    )


def _figures(few: Idle, more: Idle, most: Idle) -> list[Figure]:
    """Compare a worker with itself, as it has more projects; `most` is what is told."""
    ratio = f"of {most.projects:,} projects to {few.projects:,}"
    first = (more.memory - few.memory) / (more.projects - few.projects)
    then = (most.memory - more.memory) / (most.projects - more.projects)
    costs = [
        ("statements on the control database per visit", "", 1.0, "statements"),
        ("processor of the worker per visit", "ms", 1e3, "worker_cpu"),
        ("processor of the control database per visit", "ms", 1e3, "control_cpu"),
    ]
    found = [
        Figure(f"visits a second, {n.projects:,} projects", n.visits_per_second)
        for n in (few, more, most)
    ]
    for name, unit, scale, attribute in costs:
        small, middle, large = (getattr(each, attribute) for each in (few, more, most))
        found.append(Figure(f"{name}, {few.projects:,} projects", small * scale, unit))
        found.append(Figure(f"the same, {more.projects:,} projects", middle * scale, unit))
        found.append(Figure(f"the same, {most.projects:,} projects", large * scale, unit))
        found.append(Figure(f"the same, {ratio}", large / small, "", at_most=1.15))
    return [
        *found,
        Figure(f"memory of the worker, {most.projects:,} projects", most.memory / 1e6, "MB"),
        Figure(f"memory per project, to {more.projects:,}", first / 1e3, "kB"),
        Figure(f"memory per project, to {most.projects:,}", then / 1e3, "kB"),
        Figure("the same, the second by the first", then / first, "", at_most=1.15),
        Figure("connections to an idle target", most.connections, "", at_most=0),
    ]


def _connections(url: str) -> int:
    with psycopg.connect(url) as conn:
        [(number,)] = conn.execute(_CONNECTIONS).fetchall()
        return int(number)


def _cpu(pids: Sequence[int]) -> float:
    """Add up the processor time of processes, in seconds."""
    ticks = 0
    for pid in pids:
        with suppress(OSError):  # it ended just now
            fields = Path(f"/proc/{pid}/stat").read_text("utf-8").rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def _backends(database: str) -> list[int]:
    """Find the server's processes for one database, by their titles."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it ended just now
            title = path.read_bytes()
            if title.startswith(b"postgres:") and database.encode() in title:
                found.append(int(path.parent.name))
    return found
