"""The budget of an API host: shared by all workers, hints first, kept to on one's own as well."""

from collections.abc import Iterator
from threading import Event, Thread

import pytest

from tests.support.fleet_world import FleetWorld
from worker.errors import Stopped
from worker.fleet.budget import MOST_AHEAD_SECONDS, HostBudget
from worker.fleet.control import Control

HOST = "api.example.com"


@pytest.fixture
def other(fleet: FleetWorld) -> Iterator[Control]:
    """Return the control database as another worker has it."""
    control = Control(fleet.control_url, Event())
    yield control
    control.close()


def test_moments_of_two_workers_are_one_after_the_other(fleet: FleetWorld, other: Control) -> None:
    claims = [each.claim(HOST, 10, 1.0, 3600.0) for each in (fleet.control, other, fleet.control)]
    assert [granted for granted, _ in claims] == [10, 10, 10]
    assert [round(wait) for _, wait in claims] == [0, 10, 20]


def test_what_can_wait_claims_nothing_far_ahead_so_that_a_hint_comes_first(
    fleet: FleetWorld,
) -> None:
    claim = fleet.control.claim
    granted, _ = claim(HOST, 100, 10.0, MOST_AHEAD_SECONDS)
    assert granted == MOST_AHEAD_SECONDS * 10 + 1
    assert claim(HOST, 100, 10.0, MOST_AHEAD_SECONDS)[0] <= 1
    granted, wait = claim(HOST, 1, 10.0, 3600.0)
    assert granted == 1
    assert wait <= MOST_AHEAD_SECONDS + 0.2


def test_unused_moments_are_not_saved_up(fleet: FleetWorld) -> None:
    fleet.control.claim(HOST, 1, 1000.0, 1.0)
    fleet.query("update users_sync_fleet.host set next_at = now() - interval '1 hour'")
    assert [fleet.control.claim(HOST, 1, 1.0, 9.0) for _ in range(2)] == [
        (1, 0.0),
        (1, pytest.approx(1.0, abs=0.5)),
    ]


def test_many_threads_claim_together_and_none_too_soon(fleet: FleetWorld) -> None:
    budget = HostBudget(fleet.control, HOST, 100.0, lambda: 1.0)
    sent: list[float] = []

    def ask() -> None:
        for _ in range(5):
            budget.take_turn("poll", Event())
            sent.append(budget.monotonic())

    threads = [Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    sent.sort()
    # The first goes at once, each other one a hundredth of a second later.
    assert sent[-1] - sent[0] >= 39 / 100 - 0.05


def test_stop_ends_the_wait(fleet: FleetWorld) -> None:
    budget = HostBudget(fleet.control, HOST, 0.001, lambda: 1.0)
    budget.take_turn("poll", Event())
    stop = Event()
    stop.set()
    with pytest.raises(Stopped):
        budget.take_turn("poll", stop)


def test_without_the_control_database_a_worker_keeps_to_its_share() -> None:
    away = Control("postgresql://127.0.0.1:1/none", Event(), retry_minutes=0)
    now = 0.0
    budget = HostBudget(away, HOST, 10.0, lambda: 0.5, monotonic=lambda: now)
    moments = [budget._moment(hinted=False) for _ in range(3)]  # noqa: SLF001
    assert moments == [0.0, pytest.approx(0.2), pytest.approx(0.4)]
