"""How many users are asked for at once: what is set, less where the server takes or bears less."""

import pytest

from worker.errors import LimitRefused
from worker.model import LARGEST_PAGE, SMALLEST_PAGE
from worker.sync.page_size import PAGES_BEFORE_GROWTH, PageSize


def refused(size: PageSize, limit: int, largest: int | None) -> None:
    size.learn_cap(LimitRefused("too many", largest), limit)


def peace(size: PageSize, pages: int = PAGES_BEFORE_GROWTH) -> int:
    """Let so many pages succeed; returns how many users are asked for then."""
    for _ in range(pages):
        size.succeeded()
    return size.limit


def test_size_is_what_is_set_for_as_long_as_nothing_fails() -> None:
    assert peace(PageSize(300), 10 * PAGES_BEFORE_GROWTH) == 300


def test_cap_that_the_server_names_is_kept_for_good() -> None:
    size = PageSize(2_000)
    refused(size, 2_000, 1_000)
    assert (size.limit, size.limit_for(1), size.limit_for(5)) == (1_000, 1_000, 1_000)
    assert peace(size, 10 * PAGES_BEFORE_GROWTH) == 1_000


def test_cap_that_becomes_smaller_is_learnt_again() -> None:
    size = PageSize(2_000)
    refused(size, 2_000, 1_000)
    refused(size, 1_000, 500)
    assert (size.limit, size.cap) == (500, 500)


def test_cap_that_is_not_named_is_found_by_halves_and_is_no_cap_for_good() -> None:
    size = PageSize(2_000)
    refused(size, 2_000, None)
    assert (size.limit, size.cap) == (1_000, LARGEST_PAGE)
    assert peace(size) == 2_000


@pytest.mark.parametrize("named", [1_000, 2_000])
def test_cap_that_is_no_less_than_what_was_refused_is_not_believed(named: int) -> None:
    size = PageSize(1_000)
    refused(size, 1_000, named)
    assert size.limit == 500


@pytest.mark.parametrize(("limit", "named"), [(3, None), (5, 1), (5, 2), (4, 4)])
def test_server_that_takes_too_few_for_a_chain_is_refused(limit: int, named: int | None) -> None:
    size = PageSize(limit)
    with pytest.raises(LimitRefused):
        refused(size, limit, named)


def test_page_that_needs_more_users_gets_no_more_than_the_cap() -> None:
    size = PageSize(300)
    assert [size.limit_for(times) for times in (1, 4, 1_024)] == [300, 1_200, LARGEST_PAGE]
    refused(size, 2_400, 1_000)
    assert size.limit_for(8) == 1_000


@pytest.mark.parametrize("times", [1, 3, 9, 50])
def test_trouble_halves_down_to_what_a_chain_needs(times: int) -> None:
    size = PageSize(1_000)
    for _ in range(times):
        size.shrink()
    assert size.limit == max(SMALLEST_PAGE, 1_000 // 2**times)


def test_size_that_failed_is_tried_again_only_after_some_pages() -> None:
    size = PageSize(1_000)
    size.shrink()
    assert peace(size, PAGES_BEFORE_GROWTH - 1) == 500
    assert peace(size, 1) == 1_000


def test_after_an_outage_the_size_comes_back_page_by_page() -> None:
    """Whatever failed until then, it was not the size; only the last step waits."""
    size = PageSize(1_000)
    for _ in range(9):
        size.shrink()
    assert [peace(size, 1) for _ in range(8)] == [6, 12, 24, 48, 96, 192, 384, 500]
    assert peace(size) == 1_000


def test_size_that_fails_again_is_not_tried_again_soon() -> None:
    size = PageSize(1_000)
    size.shrink()
    size.shrink()
    assert peace(size, 1) == 500
    size.shrink()
    assert peace(size, PAGES_BEFORE_GROWTH - 1) == 250
    assert peace(size, 1) == 500


def test_size_comes_back_up_to_the_cap_only() -> None:
    size = PageSize(2_000)
    refused(size, 2_000, 700)
    size.shrink()
    assert peace(size, 10 * PAGES_BEFORE_GROWTH) == 700


def test_server_that_fails_above_a_size_fails_seldom() -> None:
    size, failures = PageSize(1_000), 0
    for _ in range(200):
        if size.limit > 300:
            failures += 1
            size.shrink()
        else:
            size.succeeded()
    assert failures <= 3 + 200 / PAGES_BEFORE_GROWTH
