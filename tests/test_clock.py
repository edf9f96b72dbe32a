from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from worker.clock import Clock

START = datetime(2026, 11, 21, tzinfo=UTC)

# What a quartz of either machine may be off by.
PARTS_PER_MILLION = 100


class World:
    """The true time, and two machines that count it a little wrong; all in nanoseconds."""

    def __init__(self, our_drift: int = 0, database_drift: int = 0, up_for: int = 0) -> None:
        self.nanoseconds = 0
        self._our_drift, self._database_drift = our_drift, database_drift
        self._up_for = up_for

    def monotonic(self) -> float:
        return (self._up_for + _drifted(self.nanoseconds, self._our_drift)) / 1e9

    def database_nanoseconds(self) -> int:
        return _drifted(self.nanoseconds, self._database_drift)

    def database_time(self) -> datetime:
        """Tell what `clock_timestamp()` says, which knows whole microseconds."""
        return START + timedelta(microseconds=self.database_nanoseconds() // 1000)


def _drifted(nanoseconds: int, parts_per_million: int) -> int:
    return nanoseconds * (1_000_000 + parts_per_million) // 1_000_000


def nanoseconds_after_start(moment: datetime) -> int:
    return (moment - START) // timedelta(microseconds=1) * 1000


drifts = st.integers(-PARTS_PER_MILLION, PARTS_PER_MILLION)
delays = st.integers(0, 10**10)
ages = st.integers(0, 3000) | st.integers(0, 10**15)


@given(drifts, drifts, st.integers(0, 10**16), st.lists(st.tuples(delays, ages), min_size=1))
def test_never_later_than_the_true_moment(
    our_drift: int, database_drift: int, up_for: int, steps: list[tuple[int, int]]
) -> None:
    world = World(our_drift, database_drift, up_for)
    clock = Clock(world.monotonic)
    for delay, age in steps:
        said = world.database_time()
        world.nanoseconds += delay
        clock.learn(said)
        world.nanoseconds += age
        assert nanoseconds_after_start(clock.now()) <= world.database_nanoseconds()


def test_before_anything_is_learnt_no_answer_is_newer_than_a_row() -> None:
    world = World()
    clock = Clock(world.monotonic)
    world.nanoseconds += 10**15
    assert clock.now() < datetime(2000, 1, 1, tzinfo=UTC)


def test_time_just_learnt_is_told_as_it_came() -> None:
    clock = Clock(World().monotonic)
    clock.learn(START)
    assert clock.now() == START


def test_falls_behind_by_no_more_than_the_drift_it_allows_for() -> None:
    world = World()
    clock = Clock(world.monotonic)
    clock.learn(START)
    world.nanoseconds += 1000 * 10**9
    assert clock.now() == START + timedelta(seconds=1000 - 0.2)


def test_less_than_a_microsecond_is_rounded_to_the_past() -> None:
    world = World()
    clock = Clock(world.monotonic)
    clock.learn(START)
    world.nanoseconds += 900
    assert clock.now() == START


def test_what_is_learnt_last_counts() -> None:
    world = World()
    clock = Clock(world.monotonic)
    clock.learn(START + timedelta(hours=1))
    clock.learn(START)
    assert clock.now() == START
