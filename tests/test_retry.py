import math
from collections.abc import Callable
from threading import Event

import pytest
from structlog.testing import capture_logs

from worker.errors import Misconfigured, SourceUnavailable, Stopped, Transient
from worker.retry import (
    FIRST_PAUSE_SECONDS,
    LONGEST_ASKED_SECONDS,
    LONGEST_PAUSE_SECONDS,
    Retry,
)


class Pauses(Event):
    """A stop that notes how long it was waited for, and waits no time at all."""

    def __init__(self, stop_in_pause: int | None = None) -> None:
        super().__init__()
        self.seconds: list[float] = []
        self._stop_in_pause = stop_in_pause

    def wait(self, timeout: float | None = None) -> bool:
        self.seconds.append(timeout or 0.0)
        if len(self.seconds) == self._stop_in_pause:
            self.set()
        return self.is_set()


def failing(*errors: Exception) -> Callable[[], str]:
    """Make an attempt that raises one after the other and then succeeds."""
    left = list(errors)

    def attempt() -> str:
        if left:
            raise left.pop(0)
        return "done"

    return attempt


def retry(stop: Event, minutes: float = 5) -> Retry:
    return Retry("Stack Auth", minutes, stop, SourceUnavailable)


def test_success_needs_no_pause() -> None:
    pauses = Pauses()
    assert retry(pauses).call(failing()) == "done"
    assert pauses.seconds == []


def test_transient_is_tried_again() -> None:
    pauses = Pauses()
    assert retry(pauses).call(failing(Transient("a"), Transient("b"))) == "done"
    assert len(pauses.seconds) == 2


def test_pause_is_as_long_as_the_server_asks() -> None:
    pauses = Pauses()
    retry(pauses).call(failing(Transient("busy", retry_after=42.5), Transient("x")))
    assert pauses.seconds[0] == 42.5
    assert pauses.seconds[1] < 1


def test_server_that_asks_for_days_is_asked_again_after_minutes() -> None:
    pauses = Pauses()
    endless = retry(pauses, minutes=math.inf)
    endless.call(
        failing(Transient("busy", retry_after=1_000_000), Transient("b", retry_after=9e300))
    )
    assert pauses.seconds == [LONGEST_ASKED_SECONDS] * 2


@pytest.mark.parametrize(("minutes", "asked"), [(5, 3600), (5, 300), (0.5, 42)])
def test_pause_beyond_the_patience_is_told(minutes: float, asked: float) -> None:
    busy = [Transient("api.example.com answered 429", retry_after=asked)] * 20
    told = f"Stack Auth asks for a pause of {asked} s (Retry-After), which ends beyond the"
    with pytest.raises(SourceUnavailable) as caught:
        retry(Pauses(), minutes=minutes).call(failing(*busy))
    assert str(caught.value).startswith(told)


def test_outage_that_changes_is_told_once_in_other_words() -> None:
    class Watch:
        def failed(self, service: str, error: str) -> None: ...
        def succeeded(self, service: str) -> None: ...
        def answered(self, status: str, seconds: float) -> None: ...
        def took(self, service: str, seconds: float) -> None: ...
        def moved(self) -> None: ...
        def stalled(self) -> bool:
            return False

    errors = [Transient(text) for text in ("refused", "refused", "no such tenant") * 3]
    watched = Retry("the database", math.inf, Pauses(), SourceUnavailable, Watch())
    with capture_logs() as logs:
        watched.call(failing(*errors))
    told = [line["error"] for line in logs if line["log_level"] == "warning"]
    assert told == ["no such tenant"]


def test_single_attempt_tells_its_error_alone() -> None:
    with pytest.raises(SourceUnavailable) as caught:
        retry(Pauses(), minutes=0).call(failing(Transient("api.example.com answered 503")))
    assert str(caught.value) == "Stack Auth could not be used: api.example.com answered 503"


def test_server_that_asks_for_no_pause_still_gets_one() -> None:
    pauses = Pauses()
    retry(pauses).call(failing(*[Transient("busy", retry_after=0)] * 20))
    assert min(pauses.seconds) >= FIRST_PAUSE_SECONDS


def test_pauses_grow_with_jitter_up_to_a_bound() -> None:
    pauses = Pauses()
    retry(pauses, minutes=60).call(failing(*[Transient("down")] * 300))
    bounds = [FIRST_PAUSE_SECONDS * 2**attempt for attempt in range(6)]
    early, late = pauses.seconds[: len(bounds)], pauses.seconds[10:]
    assert all(pause <= bound for pause, bound in zip(early, bounds, strict=True))
    assert max(pauses.seconds) <= LONGEST_PAUSE_SECONDS
    assert max(late) > 0.8 * LONGEST_PAUSE_SECONDS  # of 290 random ones
    assert len(set(late)) == len(late)


def test_stop_ends_a_pause() -> None:
    pauses = Pauses(stop_in_pause=1)
    with pytest.raises(Stopped):
        retry(pauses).call(failing(Transient("down", retry_after=200)))
    assert pauses.seconds == [200]


def test_stop_ends_a_real_pause() -> None:
    stop = Event()

    def attempt() -> None:
        stop.set()
        raise Transient("down", retry_after=200)

    with pytest.raises(Stopped):
        retry(stop).call(attempt)


def test_what_succeeds_at_once_is_finished_after_a_stop() -> None:
    pauses = Pauses()
    pauses.set()
    assert retry(pauses).call(failing()) == "done"


def test_nothing_is_tried_twice_after_a_stop() -> None:
    pauses = Pauses()
    pauses.set()
    with pytest.raises(Stopped):
        retry(pauses).call(failing(Transient("down")))


def test_gives_up_when_the_next_pause_would_end_too_late() -> None:
    pauses = Pauses()
    last = Transient("api.example.com answered 503", retry_after=61)
    with pytest.raises(SourceUnavailable) as caught:
        retry(pauses, minutes=1).call(failing(Transient("busy", retry_after=59), last))
    expected = (
        "Stack Auth asks for a pause of 61 s (Retry-After), which ends beyond the 1 minutes of"
        " retry_minutes: api.example.com answered 503"
    )
    assert str(caught.value) == expected
    assert caught.value.__cause__ is last
    assert pauses.seconds == [59]


def test_without_minutes_there_is_one_attempt() -> None:
    pauses = Pauses()
    with pytest.raises(SourceUnavailable):
        retry(pauses, minutes=0).call(failing(Transient("down")))
    assert pauses.seconds == []


@pytest.mark.parametrize("error", [Misconfigured("wrong key"), KeyError("a bug")])
def test_what_no_retry_cures_passes_through_at_once(error: Exception) -> None:
    pauses = Pauses()
    with pytest.raises(type(error)) as caught:
        retry(pauses).call(failing(error))
    assert caught.value is error
    assert pauses.seconds == []
