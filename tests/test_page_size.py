"""How the page size tunes itself, against servers that are a formula for how long a page takes."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from worker.walk import PageSize

BYTES_A_USER = 800

Seconds = Callable[[int, int], float]
"""How long a page of so many users takes with so many rows from its cursor to the list's end."""


def flat(users: int, behind: int) -> float:
    """Cost the same for each user, whatever the page: a larger one gains nothing."""
    return users / 5_000


def quadratic(users: int, behind: int) -> float:
    """Read every row behind the cursor, as the real server does; figures of the real server."""
    return 4.3e-6 * behind + 175e-6 * users


def slow_link(users: int, behind: int) -> float:
    """Wait for a request as long as for 150 users, which then come at 3,000 a second."""
    return 0.05 + users / 3_000


def sweep(
    size: PageSize, users: int, seconds: Seconds, bytes_a_user: int = BYTES_A_USER
) -> list[int]:
    """Read a list of so many users; returns the limit of each page.

    Without a cursor a real server reads no more than the page.
    """
    limits: list[int] = []
    behind = users
    while behind > 0:
        page = min(size.limit, behind)
        took = seconds(page, behind if limits else 0)
        limits.append(size.limit)
        size.learn(page, page * bytes_a_user, took)
        behind -= page
    return limits


def learn_pages(size: PageSize, count: int, seconds: Seconds = flat) -> None:
    """Read so many full pages of a list that does not end."""
    for _ in range(count):
        size.learn(size.limit, size.limit * BYTES_A_USER, seconds(size.limit, 10**6))


def test_fixed_size_never_changes() -> None:
    size = PageSize(300)
    limits = sweep(size, 50_000, quadratic)
    size.shrink()
    assert set(limits) == {300}
    assert size.limit == 300


def test_empty_and_last_pages_teach_nothing() -> None:
    size = PageSize("auto")
    size.learn(0, 60, 0.001)
    size.learn(999, 999 * BYTES_A_USER, 0.0001)
    assert size.limit == PageSize.FIRST


def test_quick_pages_grow_without_a_gain() -> None:
    """What so short a time says of the size is mostly noise; a slow page tells."""
    size = PageSize("auto")
    learn_pages(size, 2, lambda users, _behind: 0.01 + users**1.2 / 400_000)
    assert size.limit == 4 * PageSize.FIRST


def test_full_page_without_measurable_time_is_no_trouble() -> None:
    size = PageSize("auto")
    size.learn(size.limit, 1, 0.0)
    assert size.limit == 2 * PageSize.FIRST


def test_grows_to_the_largest_while_it_helps_and_stays_there() -> None:
    size = PageSize("auto")
    limits = sweep(size, 1_000_000, quadratic)
    assert limits[:6] == [2_000, 4_000, 2_000, 4_000, 8_000, 10_000]
    assert set(limits[6:]) == {10_000}


def test_growing_costs_little_more_than_the_largest_size_from_the_start() -> None:
    tuned = sweep(PageSize("auto"), 60_000, quadratic)
    assert len(tuned) <= 2 * len(sweep(PageSize(10_000), 60_000, quadratic))


def test_without_a_gain_returns_to_the_best_size_and_stays() -> None:
    size = PageSize("auto")
    learn_pages(size, PageSize.PAGES_OF_PEACE - 1)
    assert size.limit == PageSize.FIRST


def test_settles_where_a_larger_page_gains_too_little() -> None:
    size = PageSize("auto")
    limits = sweep(size, 300_000, slow_link)
    assert limits.count(2_000) >= 0.85 * len(limits)
    assert max(limits) <= 4_000


def test_server_that_slows_down_under_large_pages_gets_smaller_ones() -> None:
    size = PageSize("auto")
    limits = sweep(size, 200_000, lambda users, _: users / (5_000 if users <= 4_000 else 1_000))
    assert limits.count(1_000) + limits.count(2_000) + limits.count(4_000) >= 0.9 * len(limits)


def test_pages_of_large_users_stay_about_eight_megabytes() -> None:
    size = PageSize("auto")
    limits = sweep(size, 50_000, quadratic, bytes_a_user=10_000)
    assert max(limits[1:]) == PageSize.TARGET_BYTES // 10_000
    assert limits[-1] == PageSize.TARGET_BYTES // 10_000


def test_users_of_three_megabytes_still_come_two_at_a_time() -> None:
    size = PageSize("auto")
    size.learn(size.limit, size.limit * 5_000_000, 1.0)
    assert size.limit == PageSize.SMALLEST


@pytest.mark.parametrize("times", [1, 3, 9, 50])
def test_trouble_halves_down_to_two(times: int) -> None:
    size = PageSize("auto")
    for _ in range(times):
        size.shrink()
    assert size.limit == max(2, PageSize.FIRST // 2**times)


def test_after_trouble_it_grows_only_after_peace() -> None:
    size = PageSize("auto")
    size.shrink()
    learn_pages(size, PageSize.PAGES_OF_PEACE - 1, quadratic)
    assert size.limit == PageSize.FIRST // 2
    learn_pages(size, 1, quadratic)
    assert size.limit == PageSize.FIRST


def test_trouble_within_the_peace_begins_it_anew() -> None:
    size = PageSize("auto")
    size.shrink()
    learn_pages(size, PageSize.PAGES_OF_PEACE - 1, quadratic)
    size.shrink()
    learn_pages(size, PageSize.PAGES_OF_PEACE - 1, quadratic)
    assert size.limit == PageSize.FIRST // 4


def test_after_a_long_peace_the_largest_size_is_reached_again() -> None:
    size = PageSize("auto")
    for _ in range(9):
        size.shrink()
    learn_pages(size, 2 * PageSize.PAGES_OF_PEACE, quadratic)
    assert size.limit == PageSize.LARGEST


def test_server_that_fails_above_a_size_fails_seldom() -> None:
    size, failures, pages = PageSize("auto"), 0, 0
    while pages < 200:
        if size.limit > 3_000:
            failures += 1
            size.shrink()
        else:
            pages += 1
            learn_pages(size, 1, quadratic)
    assert failures <= 1 + pages / PageSize.PAGES_OF_PEACE


@pytest.mark.parametrize("seconds", [flat, quadratic, slow_link])
def test_size_never_leaves_its_bounds(seconds: Seconds) -> None:
    size = PageSize("auto")
    limits = [limit for _ in range(20) for limit in sweep(size, 60_000, seconds)]
    assert min(limits) >= PageSize.SMALLEST
    assert max(limits) <= PageSize.LARGEST
    assert all(after <= 2 * before for before, after in pairwise(limits))


def test_sweep_after_sweep_of_a_real_server_stays_large() -> None:
    size = PageSize("auto")
    limits = [limit for _ in range(50) for limit in sweep(size, 60_000, quadratic)]
    assert sum(limit >= 8_000 for limit in limits) >= 0.9 * len(limits)


# Once polls have to stay fresh


def fresh_size(users: int, seconds: Seconds) -> PageSize:
    """Make a size that has been tuned by a first sweep."""
    size = PageSize("auto")
    sweep(size, users, seconds)
    size.keep_polls_fresh = True
    return size


def time_of(limits: list[int], users: int, seconds: Seconds) -> float:
    behind, total = users, 0.0
    for number, limit in enumerate(limits):
        total += seconds(min(limit, behind), behind if number else 0)
        behind -= limit
    return total


@pytest.mark.parametrize("seconds", [flat, slow_link])
def test_polls_wait_no_longer_than_half_a_second_where_that_is_possible(seconds: Seconds) -> None:
    size = fresh_size(60_000, seconds)
    sweep(size, 60_000, seconds)
    limits = sweep(size, 60_000, seconds)
    assert max(seconds(limit, 0) for limit in limits) <= 0.51


@pytest.mark.parametrize("users", [30_000, 60_000, 120_000, 200_000, 500_000, 1_000_000])
def test_for_fresh_polls_no_more_than_half_of_the_speed_is_given_up(users: int) -> None:
    """On a large list a page is slow for the rows behind its cursor, however small it is."""
    size = fresh_size(users, quadratic)
    best = time_of(sweep(PageSize(10_000), users, quadratic), users, quadratic)
    for _ in range(4):
        assert time_of(sweep(size, users, quadratic), users, quadratic) < 2 * best


def test_server_that_has_become_slower_is_not_asked_for_ever_more() -> None:
    size = fresh_size(60_000, flat)
    sweep(size, 60_000, flat)
    limits = sweep(size, 60_000, lambda users, _: users / 500)
    assert max(limits) <= 4_000
    assert set(limits[-20:]) <= {250, 500}
