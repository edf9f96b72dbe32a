"""Measures how time and memory grow with the number of users."""

from dataclasses import dataclass
from statistics import mean, median

from tests.bench.api import started_api
from tests.bench.figures import Conditions, Figure
from tests.bench.postgres import Databases
from tests.bench.workers import EAGER, running
from worker.ids import unpack_id
from worker.model import User, Users
from worker.sync.mirror import Mirror

# Fewer later sweeps say little.
LEAST_SWEEPS = 3


@dataclass(frozen=True, slots=True)
class Grown:
    """One size: microseconds a user, of the clock and of the worker's processor, and MB."""

    users: int
    first: float
    later: float
    processor: float
    resident: float
    peak: float


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    sizes = (10_000, 50_000) if conditions.quick else (10_000, 100_000, 1_000_000)
    # The least once more in the end: a machine that became slower meanwhile is no growth.
    read = conditions.choose(100_000, 300_000)
    *grown, again = [
        _grow(databases, users, max(LEAST_SWEEPS, read // users)) for users in (*sizes, sizes[0])
    ]
    least, most = grown[0], grown[-1]
    later = most.later / mean([least.later, again.later])
    first = most.first / mean([least.first, again.first])
    processor = most.processor / mean([least.processor, again.processor])
    full = not conditions.quick
    ratio = f"{most.users:,} users over {least.users:,}"
    figures = [
        Figure("mirror", _mirror_bytes(sizes[-1]), "bytes a user", at_most=80),
        Figure(
            f"resident memory, {most.users:,} users",
            most.resident,
            "MB",
            at_most=250 if full else None,
        ),
        Figure(f"first sweep, time a user, {ratio}", first, at_most=1.15),
        Figure(f"later sweep, time a user, {ratio}", later, at_most=1.15),
        Figure(f"later sweep, processor time a user, {ratio}", processor, at_most=1.15),
    ]
    for each in grown:
        name = f"{each.users:,} users"
        figures += [
            Figure(f"{name}: first sweep", each.first, "us a user"),
            Figure(f"{name}: later sweep", each.later, "us a user"),
            Figure(f"{name}: later sweep, processor time", each.processor, "us a user"),
            Figure(f"{name}: resident memory", each.resident, "MB"),
            Figure(f"{name}: highest memory", each.peak, "MB"),
        ]
    return figures


def _grow(databases: Databases, users: int, later_sweeps: int) -> Grown:
    with (
        started_api(users, of_many=True) as api,
        databases.fresh() as url,
        running(api, url, EAGER) as worker,
    ):
        # By the first of the later ones it has settled: each form of a record is known.
        begun = len(worker.wait_for_sweeps(2))
        before = worker.processor_seconds()
        done = len(worker.wait_for_sweeps(begun + later_sweeps))
        processor = (worker.processor_seconds() - before) / (done - begun)
        first, _, *later = (sweep["duration_seconds"] for sweep in worker.sweeps()[:done])
        return Grown(
            users,
            first=first * 1e6 / users,
            later=median(later) * 1e6 / users,
            processor=processor * 1e6 / users,
            resident=worker.memory("VmRSS"),
            peak=worker.memory("VmHWM"),
        )


def _mirror_bytes(users: int) -> float:
    """Weigh the mirror after the users came in pages, with all that growing left over."""
    mirror = Mirror()
    for page in range(0, users, 10_000):
        mirror.accept(
            Users.of(
                User(unpack_id(number.to_bytes(16, "big")), number, b"hash....", b"")
                for number in range(page, page + 10_000)
            )
        )
    return mirror.size / users
