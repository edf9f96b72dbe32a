"""What commands wrote beside the holder of the lease."""

import pytest

from tests.support.store_target import Target
from worker.store.invalidations import MOST_TOUCHED, Invalidations

TOUCH = "insert into users_sync_worker.touched values (%s, %s, %s, now())"


@pytest.fixture
def touched(generated: Target) -> Invalidations:
    generated.lease().acquire()
    for writes, user_id in ((3, "a"), (4, "b"), (4, "c"), (6, "d")):
        generated.query(TOUCH, generated.schema, writes, user_id)
    return Invalidations(generated.schema)


@pytest.mark.parametrize(
    ("since", "now", "ids"),
    [
        (2, 3, ["a"]),
        (2, 4, ["a", "b", "c"]),
        (3, 4, ["b", "c"]),
        (4, 5, None),  # somebody else
        (2, 6, None),
        (5, 6, ["d"]),
        (6, 6, None),  # whatever it was, it was none of these
        (6, 2, None),  # the database was set back
    ],
)
def test_gap_is_explained_by_commands_or_not(
    generated: Target, touched: Invalidations, since: int, now: int, ids: list[str] | None
) -> None:
    assert touched.between(generated.conn, since, now) == ids


def test_other_targets_explain_nothing(generated: Target, touched: Invalidations) -> None:
    assert Invalidations("another").between(generated.conn, 2, 3) is None


def test_too_much_is_not_looked_at_row_by_row(generated: Target, touched: Invalidations) -> None:
    for number in range(MOST_TOUCHED + 1):
        generated.query(TOUCH, generated.schema, 10, str(number))
    assert touched.between(generated.conn, 9, 10) is None
