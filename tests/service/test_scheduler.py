"""When what runs: each job once at a time, and again when it arms itself, whatever clocks do."""

import logging
import time
from collections.abc import Iterator
from threading import Event

import pytest
from structlog.testing import capture_logs

from tests.support.waiting import until
from worker.service.scheduler import Scheduler

PATIENCE_SECONDS = 10
HOUR = 3600.0


class Clocks:
    """The machine's clocks, with a wall clock that can be set."""

    ahead = 0.0

    def wall(self) -> float:
        return time.time() + self.ahead


@pytest.fixture
def clocks() -> Clocks:
    return Clocks()


@pytest.fixture
def scheduler(clocks: Clocks) -> Iterator[Scheduler]:
    scheduler = Scheduler(wall=clocks.wall)
    scheduler.start()
    yield scheduler
    scheduler.stop()


def happened(event: Event) -> bool:
    return event.wait(PATIENCE_SECONDS)


def test_job_runs_as_often_as_it_arms_itself(scheduler: Scheduler) -> None:
    runs: list[int] = []
    over = Event()

    def work() -> None:
        runs.append(len(runs))
        if len(runs) < 100:
            scheduler.schedule("again", work, 0)
        else:
            over.set()

    scheduler.schedule("again", work, 0)
    assert happened(over)
    assert runs == list(range(100))


def test_job_armed_again_runs_instead_of_the_one_before(scheduler: Scheduler) -> None:
    first, second = Event(), Event()
    scheduler.schedule("one", first.set, 0.3)
    scheduler.schedule("one", second.set, 0)
    assert happened(second)
    scheduler.stop()
    assert not first.is_set()


def test_job_that_is_due_sooner_may_be_kept(scheduler: Scheduler) -> None:
    first, second = Event(), Event()
    scheduler.schedule("one", first.set, 0.02)
    scheduler.schedule("one", second.set, 0.3, keep_sooner=True)
    assert happened(first)
    scheduler.schedule("one", first.clear, 60)
    scheduler.schedule("one", second.set, 0, keep_sooner=True)
    assert happened(second)
    assert first.is_set()


def test_disarmed_job_does_not_run(scheduler: Scheduler) -> None:
    unwanted, later = Event(), Event()
    scheduler.schedule("unwanted", unwanted.set, 0.02)
    scheduler.schedule("later", later.set, 0.05)
    scheduler.cancel("unwanted", "unknown")
    assert happened(later)
    assert not unwanted.is_set()


def test_job_never_runs_beside_itself(scheduler: Scheduler) -> None:
    begun, go_on, again, other = Event(), Event(), Event(), Event()

    def work() -> None:
        begun.set()
        assert happened(go_on)

    scheduler.schedule("one", work, 0)
    assert happened(begun)
    scheduler.schedule("one", again.set, 0)
    scheduler.schedule("other", other.set, 0.02)
    assert happened(other)
    assert not again.is_set()
    go_on.set()
    assert happened(again)


def test_long_job_does_not_keep_others_waiting(scheduler: Scheduler) -> None:
    go_on, ended, other = Event(), Event(), Event()

    def work() -> None:
        assert happened(go_on)
        ended.set()

    scheduler.schedule("long", work, 0)
    scheduler.schedule("other", other.set, 0)
    assert happened(other)
    go_on.set()
    assert happened(ended)


@pytest.mark.parametrize("back", [HOUR, -HOUR])
def test_clock_that_is_set_changes_nothing(
    scheduler: Scheduler, clocks: Clocks, back: float
) -> None:
    clocks.ahead = back
    scheduler.mind_the_clock()
    ran = Event()
    scheduler.schedule("soon", ran.set, 0.05)
    clocks.ahead = 0
    scheduler.mind_the_clock()
    assert happened(ran)


def test_clock_set_forward_makes_nothing_run_early(scheduler: Scheduler, clocks: Clocks) -> None:
    early, soon = Event(), Event()
    scheduler.schedule("later", early.set, 600)
    clocks.ahead = HOUR
    scheduler.mind_the_clock()
    clocks.ahead = 0
    scheduler.mind_the_clock()
    scheduler.schedule("soon", soon.set, 0.02)
    assert happened(soon)
    assert not early.is_set()


def test_only_a_step_is_told_not_a_drift(scheduler: Scheduler, clocks: Clocks) -> None:
    with capture_logs() as logs:
        for clocks.ahead in (0, 1.0, 1.9):
            scheduler.mind_the_clock()
        assert logs == []
        clocks.ahead = HOUR
        scheduler.mind_the_clock()
    assert [(line["event"], line["seconds"]) for line in logs] == [("clock.stepped", HOUR)]


def test_nothing_runs_after_the_stop_which_waits_for_what_runs(scheduler: Scheduler) -> None:
    begun, go_on, ended, late = Event(), Event(), Event(), Event()

    def work() -> None:
        begun.set()
        go_on.wait(0.05)
        scheduler.schedule("late", late.set, 0)
        ended.set()

    scheduler.schedule("one", work, 0)
    assert happened(begun)
    scheduler.stop()
    scheduler.schedule("late", late.set, 0)
    assert (ended.is_set(), late.is_set()) == (True, False)


def test_stop_leaves_a_job_behind_that_does_not_end(scheduler: Scheduler) -> None:
    begun, go_on = Event(), Event()

    def work() -> None:
        begun.set()
        go_on.wait(PATIENCE_SECONDS)

    scheduler.schedule("stuck", work, 0)
    assert happened(begun)
    assert not scheduler.stop(0.05)
    assert scheduler.running() == ["stuck"]
    go_on.set()


def test_jobs_are_at_rest_while_none_runs_or_is_overdue(scheduler: Scheduler) -> None:
    begun, go_on, ended = Event(), Event(), Event()

    def work() -> None:
        begun.set()
        go_on.wait(PATIENCE_SECONDS)
        scheduler.schedule("later", ended.set, HOUR)
        scheduler.schedule("over", ended.set, 0)

    assert not scheduler.at_rest()
    scheduler.schedule("work", work, 0)
    assert happened(begun)
    assert not scheduler.at_rest("over")
    go_on.set()
    assert happened(ended)
    until("none runs", lambda: not scheduler.running())
    assert scheduler.at_rest()
    assert not scheduler.at_rest("later")


def test_error_that_nobody_caught_is_logged(
    scheduler: Scheduler, caplog: pytest.LogCaptureFixture
) -> None:
    after = Event()

    def work() -> None:
        scheduler.schedule("one", after.set, 0.02)
        raise ZeroDivisionError

    scheduler.schedule("one", work, 0)
    assert happened(after)
    assert [r.levelno for r in caplog.records if r.exc_info] == [logging.ERROR]


@pytest.mark.parametrize("zone", ["GMT-3", "UTC0", "EST5EDT,M3.2.0,M11.1.0", '"UTC"', "Nowhere"])
def test_local_time_zone_has_no_part_in_the_schedule(
    zone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler's library refuses some values of TZ that the C library takes."""
    monkeypatch.setenv("TZ", zone)
    scheduler, ran = Scheduler(), Event()
    scheduler.start()
    try:
        scheduler.schedule("job", ran.set, 0)
        assert ran.wait(10)
    finally:
        scheduler.stop()
