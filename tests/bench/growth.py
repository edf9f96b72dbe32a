"""Measures how time and memory grow with the number of users."""

from dataclasses import dataclass

from tests.bench.api import started_api
from tests.bench.figures import Conditions, Figure
from tests.bench.postgres import Databases
from tests.bench.workers import EAGER, running
from worker.mirror import Mirror
from worker.model import User, unpack_id

SWEEPS = 4


@dataclass(frozen=True, slots=True)
class Grown:
    """One size: microseconds a user, and MB of memory."""

    users: int
    first: float
    later: float
    resident: float
    peak: float


def run(conditions: Conditions, databases: Databases) -> list[Figure]:
    sizes = (10_000, 50_000) if conditions.quick else (10_000, 100_000, 1_000_000)
    grown = [_grow(databases, users) for users in sizes]
    least, most = grown[0], grown[-1]
    full = not conditions.quick
    figures = [
        Figure("mirror", _mirror_bytes(sizes[-1]), "bytes a user", at_most=80),
        Figure(
            f"resident memory, {most.users:,} users",
            most.resident,
            "MB",
            at_most=250 if full else None,
        ),
        Figure("later sweep, time a user, most over least", most.later / least.later, at_most=1.15),
        Figure("first sweep, time a user, most over least", most.first / least.first, at_most=1.15),
    ]
    for each in grown:
        name = f"{each.users:,} users"
        figures += [
            Figure(f"{name}: first sweep", each.first, "us a user"),
            Figure(f"{name}: later sweep", each.later, "us a user"),
            Figure(f"{name}: resident memory", each.resident, "MB"),
            Figure(f"{name}: highest memory", each.peak, "MB"),
        ]
    return figures


def _grow(databases: Databases, users: int) -> Grown:
    with started_api(users) as api, databases.fresh() as url, running(api, url, **EAGER) as worker:
        sweeps = worker.wait_for_sweeps(SWEEPS)
        first, *later = (sweep["duration_seconds"] * 1e6 / users for sweep in sweeps[:SWEEPS])
        return Grown(users, first, min(later), worker.memory("VmRSS"), worker.memory("VmHWM"))


def _mirror_bytes(users: int) -> float:
    """Weigh the mirror after the users came in pages, with all that growing left over."""
    mirror = Mirror()
    for page in range(0, users, 10_000):
        mirror.accept(
            [
                User(unpack_id(number.to_bytes(16, "big")), number, b"digest..", b"", b"mark....")
                for number in range(page, page + 10_000)
            ]
        )
    return mirror.size / users
