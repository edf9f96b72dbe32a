import pytest

from worker.sync.guard import Guard

GUARD = Guard(max_count=500, max_fraction=0.2)


def held(*, gone: int, live: int, deleted_today: int = 0, list_was_empty: bool = False) -> bool:
    return GUARD.exceeded(
        gone=gone, deleted_today=deleted_today, live=live, list_was_empty=list_was_empty
    )


@pytest.mark.parametrize("live", [0, 1, 9, 10, 1_000_000])
def test_nobody_gone_is_not_too_many(live: int) -> None:
    assert not held(gone=0, live=live)


@pytest.mark.parametrize(
    ("gone", "live", "expected"),
    [
        (500, 1_000_000, False),
        (501, 1_000_000, True),
        (1, 1, False),
        (9, 9, False),
        (9, 12, False),
        (10, 10, True),
        (10, 49, True),
        (10, 50, False),
        (10, 51, False),
        (11, 54, True),
        (11, 55, False),
        (200, 1_000, False),
        (201, 1_000, True),
        (500, 2_500, False),
        (500, 2_499, True),
    ],
)
def test_too_many_is_a_number_or_from_ten_on_a_fraction(
    gone: int, live: int, *, expected: bool
) -> None:
    assert held(gone=gone, live=live) == expected


@pytest.mark.parametrize(
    ("gone", "deleted_today", "live", "expected"),
    [
        (1, 499, 1_000_000, False),
        (1, 500, 1_000_000, True),
        (500, 1, 1_000_000, True),
        (1, 8, 3, False),
        (1, 9, 40, True),
        (1, 9, 41, False),
        (5, 5, 44, True),
        (5, 5, 45, False),
    ],
)
def test_what_was_deleted_within_the_day_counts_in_both_limits(
    gone: int, deleted_today: int, live: int, *, expected: bool
) -> None:
    assert held(gone=gone, deleted_today=deleted_today, live=live) == expected


def test_many_small_sweeps_delete_no_more_than_one_large_one() -> None:
    live, deleted = 1_000, 0
    while not held(gone=1, live=live, deleted_today=deleted):
        live, deleted = live - 1, deleted + 1
    assert deleted == 200


@pytest.mark.parametrize(
    ("live", "expected"), [(0, False), (1, False), (9, False), (10, True), (100_000, True)]
)
def test_empty_list_is_held_if_ten_or_more_were_live(live: int, *, expected: bool) -> None:
    assert held(gone=min(live, 501), live=live, list_was_empty=True) == expected


def test_limits_of_nothing_hold_the_first_deletion() -> None:
    assert Guard(max_count=0, max_fraction=1).exceeded(
        gone=1, deleted_today=0, live=1_000, list_was_empty=False
    )


def test_fraction_of_one_leaves_the_number_alone_to_judge() -> None:
    assert not Guard(max_count=500, max_fraction=1).exceeded(
        gone=500, deleted_today=0, live=500, list_was_empty=False
    )


def test_enough_proofs_are_those_that_hold_in_any_table() -> None:
    assert held(gone=GUARD.probe_limit, live=10**9)
    assert not held(gone=GUARD.probe_limit - 1, live=10**9)
