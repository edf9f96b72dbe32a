"""A fleet of 100,000 projects on N machines, with measured costs: what breaks first.

`python -m tests.bench.simulation` prints a table; it takes no machine but this one, and no minute.
Each visit is followed through its queue, its worker and the control database, in simulated time.
"""

import heapq
import random
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds and bytes as measured by `python -m tests.bench fleet-growth`, on two processors.

    `visit_cpu` is what a visit takes of a worker's processor, `control_cpu` what it takes of the
    control database's; `api` is how long the API takes to answer.
    """

    visit_cpu: float
    control_cpu: float
    api: float
    requests: float = 1.1
    site_bytes: float = 65_000.0
    user_bytes: float = 80.0


@dataclass(frozen=True, slots=True)
class Fleet:
    """How many projects and users there are, and what they are given."""

    projects: int
    users: int
    machines: int
    workers_a_machine: int = 8
    visits: int = 16
    hosts: int = 1
    budget: float = 1_000.0
    control_processors: int = 8
    poll_seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Result:
    """The seconds between two visits to a project, and how busy each part is, 1 being all of it."""

    cycle: float
    median: float
    requests: float
    worker: float
    control: float
    megabytes: float

    @property
    def first_to_break(self) -> str:
        busy = {"a worker's processor": self.worker, "the control database": self.control}
        name, most = max(busy.items(), key=lambda each: each[1])
        return name if most > 0.9 else "the API's budget"


def simulate(fleet: Fleet, costs: Costs, seconds: float = 60.0) -> Result:
    """Let visits fall due, wait for a worker and the control database, and be made."""
    dice = random.Random(1)
    # A sample of the projects stands for all of them: every part is made smaller alike.
    scale = min(1.0, 2_000 / fleet.projects)
    workers = max(1, round(fleet.machines * fleet.workers_a_machine * scale))
    # A part of a worker is a slow one.
    slower = workers / (fleet.machines * fleet.workers_a_machine * scale)
    budget = fleet.hosts * fleet.budget
    cycle = max(fleet.poll_seconds, fleet.projects * costs.requests / (0.9 * budget))
    count = round(fleet.projects * scale)
    due = [(dice.uniform(0, cycle), project) for project in range(count)]
    heapq.heapify(due)
    # When each worker's processor, and the control database, are free again.
    free, control_free = [0.0] * workers, 0.0
    busy, control_busy, latencies, made = 0.0, 0.0, list[float](), 0
    last = dict[int, float]()
    horizon = seconds + 3 * cycle
    while due and due[0][0] < horizon:
        at, project = heapq.heappop(due)
        control_cost = costs.control_cpu / (fleet.control_processors * scale)
        control_free = max(control_free, at) + control_cost
        worker = project % workers
        begins = max(free[worker], control_free)
        free[worker] = begins + costs.visit_cpu * slower
        ends = free[worker] + costs.api
        busy, control_busy = busy + costs.visit_cpu * slower, control_busy + control_cost
        if project in last:
            latencies.append(ends - last[project])
        last[project] = ends
        made += 1
        heapq.heappush(due, (max(at + cycle, ends), project))
    memory = fleet.projects * costs.site_bytes + fleet.users * costs.user_bytes
    return Result(
        cycle,
        statistics.median(latencies) / 2,
        made / scale / horizon * costs.requests,
        busy / horizon / workers,
        control_busy / horizon,
        memory / fleet.machines / fleet.workers_a_machine / 1e6,
    )


def rows(costs: Costs) -> Iterator[tuple[str, Result]]:
    """Give what is worth a line: one cluster that grows, and one that is split."""
    base = Fleet(projects=100_000, users=50_000_000, machines=4)
    for machines in (1, 2, 4, 8):
        yield f"{machines} machines", simulate(replace(base, machines=machines), costs)
    for hosts in (5, 10):
        yield f"8 machines, {hosts} hosts", simulate(replace(base, machines=8, hosts=hosts), costs)
    yield (
        "10,000 projects, 1 machine",
        simulate(replace(base, projects=10_000, users=5_000_000, machines=1), costs),
    )


def main() -> None:
    tell = sys.stdout.write
    names = ("visit every", "sign-up, median", "requests/s", "worker", "control", "memory", "first")
    tell(f"| fleet | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}\n")
    for name, seen in rows(MEASURED):
        tell(
            f"| {name} | {seen.cycle:.0f} s | {seen.median:.0f} s | {seen.requests:,.0f} |"
            f" {seen.worker:.0%} | {seen.control:.0%} | {seen.megabytes:,.0f} MB |"
            f" {seen.first_to_break} |\n"
        )


MEASURED = Costs(visit_cpu=0.0078, control_cpu=0.0033, api=0.05, site_bytes=33_000)

if __name__ == "__main__":
    main()
