"""What makes the long-running worker ready, alive, and worth a warning."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.worker_samples import Ticks, sample_sweep, sample_vitals
from worker.service.health import KEPT_SWEEPS, LONGEST_STEP_SECONDS, Health, State


@pytest.fixture
def ticks() -> Ticks:
    return Ticks()


@pytest.fixture
def health(ticks: Ticks) -> Health:
    health = sample_vitals(ticks)
    health.enter("working")
    return health


def not_ready(health: Health) -> tuple[str, ...]:
    return health.read().not_ready


def test_worker_that_did_nothing_yet_knows_nothing(ticks: Ticks) -> None:
    seen = sample_vitals(ticks).read()
    ages = (seen.seconds_since_sweep, seen.seconds_since_poll, seen.oldest_candidate_seconds)
    assert (seen.state, seen.users, seen.page_size) == ("starting", None, None)
    assert (*ages, seen.trouble_seconds) == (None, None, None, None)
    assert (seen.started_at, seen.now, seen.sweeps) == (ticks.now(), ticks.now(), ())


def test_version_is_the_installed_one_unless_given() -> None:
    health = Health(target="neon_auth", api_host="localhost", sweep_seconds=60)
    assert health.read().version


def test_worker_without_a_complete_sweep_is_not_ready(health: Health) -> None:
    health.sweep_finished(sample_sweep(outcome="incomplete"))
    health.poll_finished()
    assert not_ready(health) == ("no sweep was completed yet",)


@pytest.mark.parametrize("outcome", ["complete", "held"])
def test_sweep_over_the_whole_list_makes_ready(health: Health, outcome: str) -> None:
    health.sweep_finished(sample_sweep(outcome=outcome))
    assert not_ready(health) == ()


def test_poll_that_saw_the_whole_list_makes_ready(health: Health) -> None:
    health.poll_finished(whole_list=True)
    assert not_ready(health) == ()


def test_sweep_that_lies_too_far_back_is_told_with_its_age(health: Health, ticks: Ticks) -> None:
    health.sweep_finished(sample_sweep())
    ticks.seconds = 300
    assert not_ready(health) == ()
    ticks.seconds = 412
    health.poll_finished()
    expected = "the last complete sweep ended 412 s ago (longer than 300 s)"
    assert not_ready(health) == (expected,)


@pytest.mark.parametrize(
    ("sweep_seconds", "took", "longest"),
    [
        (60, 1, 300),  # never less than five minutes
        (600, 5, 3 * (600 + 5)),
        (60, 400, 3 * (1200 + 400)),  # a quarter of the time for sweeps: a pause of 1200 s
    ],
)
def test_longest_age_follows_the_pause_between_sweeps(
    ticks: Ticks, sweep_seconds: float, took: float, longest: float
) -> None:
    health = Health(
        target="neon_auth",
        api_host="localhost",
        sweep_seconds=sweep_seconds,
        monotonic=ticks.monotonic,
    )
    health.sweep_finished(sample_sweep(took=took))
    assert health.read().longest_sweep_age == pytest.approx(longest)


def test_one_failed_sweep_is_an_accident_and_two_are_told(health: Health) -> None:
    health.sweep_finished(sample_sweep())
    health.sweep_failed("the list has no end")
    assert not_ready(health) == ()
    health.sweep_failed("the key is refused")
    assert not_ready(health) == ("the last 2 sweeps failed: the key is refused",)
    health.sweep_finished(sample_sweep(outcome="held"))
    assert not_ready(health) == ()


def test_poll_that_saw_the_whole_list_ends_a_row_of_failed_sweeps(health: Health) -> None:
    for _ in range(2):
        health.sweep_failed("the list has no end")
    health.poll_finished(whole_list=True)
    assert not_ready(health) == ()


@pytest.mark.parametrize(
    ("state", "reasons"),
    [
        ("starting", ("no sweep was completed yet", "37 deletions are held: users-sync deletions")),
        ("working", ("no sweep was completed yet", "37 deletions are held: users-sync deletions")),
        ("quiet", ("37 deletions are held: users-sync deletions",)),
        ("standing by", ()),
    ],
)
def test_what_counts_depends_on_the_state(
    health: Health, state: State, reasons: tuple[str, ...]
) -> None:
    health.enter(state)
    health.set_deletions(held=37, candidates=0, oldest_candidate_since=None)
    assert not_ready(health) == reasons


@pytest.mark.parametrize(("state", "reasons"), [("quiet", 1), ("standing by", 0)])
def test_silent_stall_is_found_in_quiet_mode_too(
    health: Health, ticks: Ticks, state: State, reasons: int
) -> None:
    health.sweep_finished(sample_sweep())
    health.enter(state)
    ticks.seconds = 5000
    assert len(not_ready(health)) == reasons


def test_one_held_deletion_is_told_as_one(health: Health) -> None:
    health.poll_finished(whole_list=True)
    health.set_deletions(held=1, candidates=0, oldest_candidate_since=None)
    assert not_ready(health) == ("1 deletion is held: users-sync deletions",)


def test_passing_trouble_leaves_ready(health: Health) -> None:
    health.poll_finished(whole_list=True)
    health.trouble("Stack Auth answers 500")
    assert not_ready(health) == ()


@pytest.mark.parametrize("state", ["working", "standing by", "quiet"])
def test_wrong_credentials_are_never_ready(health: Health, state: State) -> None:
    health.poll_finished(whole_list=True)
    health.enter(state)
    health.trouble("the key is refused", fatal=True)
    assert not_ready(health) == ("the key is refused",)


def test_trouble_is_told_once_and_once_more_if_fatal(health: Health) -> None:
    told = [
        health.trouble("the database is away"),
        health.trouble("Stack Auth is away"),
        health.trouble("the key is refused", fatal=True),
        health.trouble("the database is away"),
        health.trouble("the key is refused", fatal=True),
    ]
    assert told == [True, False, True, False, False]


def test_newest_trouble_stands(health: Health) -> None:
    health.trouble("the key is refused", fatal=True)
    health.trouble("the database is away")
    seen = health.read()
    assert (seen.trouble, seen.trouble_is_fatal) == ("the database is away", False)


def test_trouble_lasts_from_its_first_sign_to_its_end(health: Health, ticks: Ticks) -> None:
    health.trouble("the database is away")
    ticks.seconds = 30
    health.trouble("Stack Auth is away")
    assert health.read().trouble_seconds == 30
    ticks.seconds = 42
    assert [health.trouble_ended(), health.trouble_ended()] == [42, None]
    assert health.trouble("the database is away")


def test_silent_main_loop_is_not_alive(health: Health, ticks: Ticks) -> None:
    ticks.seconds = 30
    assert list(health.not_alive) == []
    ticks.seconds = 31
    assert list(health.not_alive) == ["the main loop stands still"]
    health.beat()
    assert list(health.not_alive) == []


def test_worker_whose_jobs_do_not_move_is_not_alive(health: Health, ticks: Ticks) -> None:
    for ticks.seconds in (30, LONGEST_STEP_SECONDS):
        health.beat()
        assert not health.stalled()
    ticks.seconds = LONGEST_STEP_SECONDS + 1
    assert health.stalled()
    assert list(health.not_alive) == ["no job has moved for 660 s"]
    health.moved()
    assert list(health.not_alive) == []


def test_snapshot_holds_what_was_set(health: Health, ticks: Ticks) -> None:
    health.set_rows(users=30_000)
    health.set_deletions(held=2, candidates=3, oldest_candidate_since=ticks.monotonic())
    health.set_quarantined(4)
    health.set_lease(True)
    health.set_page_size(5_000)
    health.poll_finished()
    ticks.seconds = 8
    seen = health.read()
    assert (seen.users, seen.held, seen.candidates, seen.quarantined) == (30_000, 2, 3, 4)
    assert (seen.lease_held, seen.page_size) == (True, 5_000)
    assert (seen.oldest_candidate_seconds, seen.seconds_since_poll) == (8, 8)


def test_newest_sweeps_are_kept(health: Health) -> None:
    for number in range(1, 61):
        health.sweep_finished(sample_sweep(number))
    numbers = [sweep.number for sweep in health.read().sweeps]
    assert numbers == list(range(60, 60 - KEPT_SWEEPS, -1))


def test_snapshot_taken_between_two_writes_is_of_one_piece(health: Health) -> None:
    def write(number: int) -> None:
        since = 1000.0 - number
        health.set_deletions(held=number, candidates=number, oldest_candidate_since=since)

    def is_of_one_piece(_: int) -> bool:
        seen = health.read()
        return seen.held == seen.candidates == (seen.oldest_candidate_seconds or 0)

    with ThreadPoolExecutor(8) as pool:
        writes = [pool.submit(write, number) for number in range(500)]
        assert all(pool.map(is_of_one_piece, range(500)))
    assert not any(write.exception() for write in writes)
