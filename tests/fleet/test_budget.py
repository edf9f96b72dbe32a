"""The budget of an API host: shared by all workers, hints first, kept to on one's own as well."""

import random
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from threading import Event, Thread, local

import pytest

from tests.support.fleet_world import FleetWorld
from worker.errors import DatabaseUnavailable, Stopped
from worker.fleet.budget import KEPT_RATE, MOST_AHEAD_SECONDS, HostBudget
from worker.fleet.control import Claim, Control

HOST = "api.example.com"


@pytest.fixture
def other(fleet: FleetWorld) -> Iterator[Control]:
    """Return the control database as another worker has it."""
    control = Control(fleet.control_url, Event())
    yield control
    control.close()


def test_moments_of_two_workers_are_one_after_the_other(fleet: FleetWorld, other: Control) -> None:
    claims = [each.claim(HOST, 10, 1.0, 3600.0) for each in (fleet.control, other, fleet.control)]
    assert [claim.granted for claim in claims] == [10, 10, 10]
    first = claims[0].now
    assert [round(claim.first_at - first) for claim in claims] == [0, 10, 20]


def test_what_can_wait_claims_nothing_far_ahead_so_that_a_hint_comes_first(
    fleet: FleetWorld,
) -> None:
    claim = fleet.control.claim
    first = claim(HOST, 100, 10.0, MOST_AHEAD_SECONDS)
    assert first.granted == MOST_AHEAD_SECONDS * 10 + 1
    assert claim(HOST, 100, 10.0, MOST_AHEAD_SECONDS).granted <= 1
    hinted = claim(HOST, 1, 10.0, 3600.0)
    assert hinted.granted == 1
    assert hinted.first_at - hinted.now <= MOST_AHEAD_SECONDS + 0.2


def test_unused_moments_are_not_saved_up(fleet: FleetWorld) -> None:
    fleet.control.claim(HOST, 1, 1000.0, 1.0)
    fleet.query("update users_sync_fleet.host set next_at = now() - interval '1 hour'")
    first, second = (fleet.control.claim(HOST, 1, 1.0, 9.0) for _ in range(2))
    assert [first.granted, second.granted] == [1, 1]
    assert first.first_at == first.now
    assert second.first_at == pytest.approx(first.first_at + 1, abs=1e-4)


class Drowsy(Event):
    """A stop that is not set, and whose waits end late now and then."""

    def __init__(self, dice: random.Random) -> None:
        super().__init__()
        self.dice = dice

    def wait(self, timeout: float | None = None) -> bool:
        return super().wait((timeout or 0) + self.dice.choice([0, 0, 0.1, 0.3]))


class Readings(local):
    """What a thread last read from the clock."""

    last = 0.0

    def monotonic(self) -> float:
        self.last = time.monotonic()
        return self.last


def test_in_no_second_more_is_sent_than_the_budget_though_threads_wake_up_late(
    fleet: FleetWorld, other: Control
) -> None:
    rate, each, sent, read = 20, 6, [], Readings()
    budgets = [HostBudget(c, HOST, rate, float, read.monotonic) for c in (fleet.control, other)]

    def ask(budget: HostBudget, seed: int) -> None:
        stop = Drowsy(random.Random(seed))
        for _ in range(each):
            budget.take_turn("poll", stop)
            sent.append(read.last)

    threads = [Thread(target=ask, args=(budgets[seed % 2], seed)) for seed in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent.sort()
    assert len(sent) == 10 * each
    assert min(later - first for first, later in zip(sent, sent[rate:], strict=False)) >= 1


def test_slow_answer_of_the_control_database_shifts_no_moment(fleet: FleetWorld) -> None:
    now = 100.0
    budget = HostBudget(fleet.control, HOST, 10.0, float, monotonic=lambda: now)
    # The control database's clock is 900 s ahead. One answer was quick, another took 3 s.
    assert budget._here(Claim(1, 1000.5, 1000.0), 99.9) == 100.5  # noqa: SLF001
    now = 103.0
    assert budget._here(Claim(1, 1001.0, 1000.2), 100.1) == 101.0  # noqa: SLF001
    # Then it is set back by 700 s.
    now = 104.0
    assert budget._here(Claim(1, 304.5, 304.0), 103.9) == 104.5  # noqa: SLF001


def test_stop_ends_the_wait(fleet: FleetWorld) -> None:
    budget = HostBudget(fleet.control, HOST, 0.001, lambda: 1.0)
    budget.take_turn("poll", Event())
    stop = Event()
    stop.set()
    with pytest.raises(Stopped):
        budget.take_turn("poll", stop)


@pytest.mark.parametrize(("workers", "apart"), [(1, 0.1), (3, 1 / 3), (20, 2.0)])
def test_without_the_control_database_a_worker_keeps_to_its_share(
    workers: int, apart: float
) -> None:
    away = Control("postgresql://127.0.0.1:1/none", Event(), retry_minutes=0)
    budget = HostBudget(away, HOST, 10.0, lambda: 1 / workers, monotonic=lambda: 0.0)
    moments = [budget._moment(hinted=False) for _ in range(3)]  # noqa: SLF001
    assert moments == [pytest.approx(n * apart / KEPT_RATE) for n in range(3)]


def test_without_the_control_database_those_who_claim_together_keep_to_it_as_well() -> None:
    away = Control("postgresql://127.0.0.1:1/none", Event(), retry_minutes=0)
    budget = HostBudget(away, HOST, 10.0, lambda: 0.5, monotonic=lambda: 0.0)
    budget._batches[False].size = 3  # noqa: SLF001
    budget._claim(together := budget._batches[False], 1.0)  # noqa: SLF001
    moments = [together.moment(place) for place in range(3)]
    assert moments == [pytest.approx(n * 0.2 / KEPT_RATE) for n in range(3)]


def test_all_threads_wait_for_the_same_attempt_at_a_control_database_that_is_away() -> None:
    attempts: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        url = f"postgresql://127.0.0.1:{server.getsockname()[1]}/none?sslmode=disable"
        control = Control(url, Event(), retry_minutes=0)
        told: list[str] = []

        def ask() -> None:
            with pytest.raises(DatabaseUnavailable) as caught:
                control.claim(HOST, 1, 1.0, 1.0)
            told.append(str(caught.value))

        threads = [Thread(target=ask) for _ in range(8)]
        for thread in threads:
            thread.start()
        attempts.append(server.accept()[0])
        time.sleep(1)  # all the others have come by now, or each will make an attempt
        server.settimeout(0.5)
        with suppress(TimeoutError):
            while True:
                attempts[-1].close()
                attempts.append(server.accept()[0])
        for thread in threads:
            thread.join()
    assert len(told) == 8
    assert len(attempts) < 8
