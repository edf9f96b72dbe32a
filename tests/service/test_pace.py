"""The pauses between sweeps: work is paid with rest, an outage is no work."""

import pytest

from tests.support.worker_samples import Ticks
from worker.service.pace import Pace, longest_sweep_age
from worker.sync.api_time import ApiTime


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def pace(ticks: Ticks) -> Pace:
    return Pace(sweep_seconds=60, share=0.25, monotonic=ticks.monotonic)


def sweep(pace: Pace, ticks: Ticks, worked: float, *, outage: float = 0) -> None:
    """Sweep to the end, for so many seconds of work."""
    pace.begin()
    ticks.seconds += worked + outage
    pace.end(worked, worked)


def fail(pace: Pace, ticks: Ticks, worked: float) -> None:
    pace.begin()
    ticks.seconds += worked
    pace.end(worked)


# The usual pause


@pytest.mark.parametrize(
    ("worked", "pause"), [(0, 60), (5.7, 60), (20, 60), (64, 192), (150, 450), (10_440, 31_320)]
)
def test_pause_is_long_enough_for_the_share_and_for_the_schedule(
    pace: Pace, ticks: Ticks, worked: float, pause: float
) -> None:
    sweep(pace, ticks, worked)
    assert pace.pause == pytest.approx(pause)


def test_before_the_first_sweep_there_is_no_pause(pace: Pace) -> None:
    assert pace.pause == 0


def test_outage_during_a_sweep_makes_its_pause_no_longer(pace: Pace, ticks: Ticks) -> None:
    sweep(pace, ticks, 1.5, outage=340)
    assert pace.pause == pytest.approx(60)


# After an outage


def test_first_sweep_after_an_outage_begins_at_once(pace: Pace, ticks: Ticks) -> None:
    sweep(pace, ticks, 64)
    ticks.seconds += 50
    pace.hurry()
    assert pace.pause == 0


def test_outage_during_a_sweep_lets_the_next_one_begin_at_once(pace: Pace, ticks: Ticks) -> None:
    pace.begin()
    ticks.seconds += 400
    pace.hurry()
    pace.end(64, 64)
    assert pace.pause == 0


def test_early_sweep_is_paid_with_a_longer_pause(pace: Pace, ticks: Ticks) -> None:
    sweep(pace, ticks, 64)
    pace.hurry()
    sweep(pace, ticks, 64)
    assert pace.pause == pytest.approx(2 * 192)


def test_outages_again_and_again_cost_no_more_than_the_share(pace: Pace, ticks: Ticks) -> None:
    worked = 0
    for _ in range(200):
        sweep(pace, ticks, 64)
        worked += 64
        pace.hurry()
        ticks.seconds += pace.pause
    assert worked / ticks.seconds == pytest.approx(0.25, rel=0.02)


# Whatever happens


@pytest.mark.parametrize("worked", [0.0, 0.3, 64, 150, 10_440])
def test_no_pause_is_longer_than_status_and_readiness_allow(
    pace: Pace, ticks: Ticks, worked: float
) -> None:
    limit = longest_sweep_age(worked, 0.25, 60)
    sweep(pace, ticks, worked)
    assert pace.pause + worked < limit
    pace.hurry()
    sweep(pace, ticks, worked)
    assert pace.pause + worked < limit
    fail(pace, ticks, 100 * worked)
    assert pace.pause < limit


def test_failed_sweep_is_work_too(pace: Pace, ticks: Ticks) -> None:
    sweep(pace, ticks, 64)
    ticks.seconds += 1000
    fail(pace, ticks, 32)
    assert pace.rest == pytest.approx(96)


# The time in which the API worked


def test_only_what_was_answered_is_work(ticks: Ticks) -> None:
    time = ApiTime(ticks.monotonic)

    def answer() -> str:
        ticks.seconds += 2
        return "a page"

    def break_off() -> None:
        ticks.seconds += 60
        raise ConnectionError

    assert time.measured("sweep", answer) == "a page"
    with pytest.raises(ConnectionError):
        time.measured("sweep", break_off)
    time.measured("poll", answer)
    assert (time.of("sweep"), time.of("poll")) == (2, 2)


def test_poll_that_waits_behind_a_page_is_no_dearer(ticks: Ticks) -> None:
    time = ApiTime(ticks.monotonic)

    def page() -> None:
        ticks.seconds += 5

    def poll() -> None:
        ticks.seconds += 1
        time.measured("sweep", page)
        ticks.seconds += 0.2

    time.measured("poll", poll)
    assert time.of("poll") == pytest.approx(0.2)
    assert time.of("sweep") == 5
