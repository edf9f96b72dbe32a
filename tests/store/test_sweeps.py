"""The checkpoint of an unfinished sweep, and the record of every sweep."""

from datetime import UTC, datetime
from typing import Any

import pytest

from tests.support.store_target import Target
from worker.store.lease import Lease
from worker.store.sweeps import COUNTS, Checkpoint, SweepRow, Sweeps
from worker.store.transaction import Statement

STARTED = datetime(2025, 10, 1, 12, tzinfo=UTC)
KEY = (1_600_000_000_000, "00000000-0000-4000-8000-00000000000a")
CHECKPOINT = Checkpoint(1, KEY, {"pages": 2}, STARTED)

ROW = f"""
select number, kind, started, finished is not null, outcome, error, {", ".join(COUNTS)}
from users_sync_worker.sweep where target = %s order by number
"""  # noqa: S608


@pytest.fixture
def lease(generated: Target) -> Lease:
    return generated.held_lease()


@pytest.fixture
def sweeps(generated: Target) -> Sweeps:
    return Sweeps(generated.schema, "all of the API")


def write(lease: Lease, *statements: Statement) -> None:
    lease.commit(statements, 1)


def rows(target: Target) -> list[tuple[Any, ...]]:
    return target.query(ROW, target.schema)


def age(target: Target, table: str, column: str, interval: str) -> None:
    target.query(
        f"update users_sync_worker.{table} set {column} = clock_timestamp() - %s::interval"  # noqa: S608
        " where target = %s",
        interval,
        target.schema,
    )


def test_at_first_there_is_no_checkpoint_and_nothing_deleted(
    generated: Target, sweeps: Sweeps
) -> None:
    assert sweeps.load(generated.conn, 60) is None
    assert sweeps.deleted_today(generated.conn) == 0


def test_checkpoint_is_found_again(generated: Target, lease: Lease, sweeps: Sweeps) -> None:
    write(lease, sweeps.move(CHECKPOINT))
    expected = Checkpoint(1, KEY, {"pages": 2, "deleted": 0, "approved": 0}, STARTED)
    assert expected == sweeps.load(generated.conn, 60)


def test_checkpoint_moves(generated: Target, lease: Lease, sweeps: Sweeps) -> None:
    later = Checkpoint(2, (-5, "b"), {"pages": 3}, STARTED)
    write(lease, sweeps.move(CHECKPOINT), sweeps.move(later))
    found = sweeps.load(generated.conn, 60)
    assert found
    assert (found.sweep, found.key, found.counts["pages"]) == (2, (-5, "b"), 3)


def test_checkpoint_counts_the_deletions_of_its_sweep_from_the_sweeps_row(
    generated: Target, lease: Lease, sweeps: Sweeps
) -> None:
    """They are written by their own statement; what the checkpoint says of them may be old."""
    row = SweepRow(1, "sweep", STARTED, {"deleted": 4, "approved": 1})
    old = Checkpoint(1, KEY, {"pages": 2, "deleted": 3}, STARTED)
    write(lease, sweeps.record(row), sweeps.move(old))
    found = sweeps.load(generated.conn, 60)
    assert found
    assert found.counts == {"pages": 2, "deleted": 4, "approved": 1}


def test_checkpoint_of_other_questions_is_none(
    generated: Target, lease: Lease, sweeps: Sweeps
) -> None:
    write(lease, sweeps.move(CHECKPOINT))
    assert Sweeps(generated.schema, "less of it").load(generated.conn, 60) is None
    assert Sweeps("another", "all of the API").load(generated.conn, 60) is None


def test_old_checkpoint_is_none(generated: Target, lease: Lease, sweeps: Sweeps) -> None:
    write(lease, sweeps.move(CHECKPOINT))
    age(generated, "checkpoint", "moved", "61 min")
    assert sweeps.load(generated.conn, 60) is None
    assert sweeps.load(generated.conn, 62) is not None


def test_cleared_checkpoint_is_gone(generated: Target, lease: Lease, sweeps: Sweeps) -> None:
    write(lease, sweeps.move(CHECKPOINT), sweeps.clear())
    write(lease, sweeps.clear())
    assert sweeps.load(generated.conn, 60) is None


def test_sweep_has_one_row_from_start_to_end(
    generated: Target, lease: Lease, sweeps: Sweeps
) -> None:
    counts = {name: at for at, name in enumerate(COUNTS)}
    write(lease, sweeps.record(SweepRow(1, "audit", STARTED, {})))
    assert rows(generated) == [(1, "audit", STARTED, False, None, None, *[0] * len(COUNTS))]

    done = SweepRow(1, "audit", STARTED, counts, "incomplete", "no way on")
    write(lease, sweeps.record(done))

    expected = (1, "audit", STARTED, True, "incomplete", "no way on", *counts.values())
    assert rows(generated) == [expected]


def test_deletions_of_a_day_are_those_without_approval(
    generated: Target, lease: Lease, sweeps: Sweeps
) -> None:
    now = generated.now()
    write(
        lease,
        sweeps.record(SweepRow(1, "sweep", now, {"deleted": 5, "approved": 70}, "complete")),
        sweeps.record(SweepRow(2, "sweep", now, {"deleted": 6})),
        sweeps.record(SweepRow(3, "sweep", STARTED, {"deleted": 700})),
        sweeps.record(SweepRow(4, "sweep", STARTED, {"deleted": 8}, "failed")),
    )
    assert sweeps.deleted_today(generated.conn) == 19
    assert Sweeps("another", "").deleted_today(generated.conn) == 0
    age(generated, "sweep", "finished", "25 h")
    age(generated, "sweep", "started", "25 h")
    assert sweeps.deleted_today(generated.conn) == 0


def test_sweeps_of_another_month_are_dropped(
    generated: Target, lease: Lease, sweeps: Sweeps
) -> None:
    now = generated.now()
    write(
        lease,
        sweeps.record(SweepRow(1, "sweep", STARTED, {}, "complete")),
        sweeps.record(SweepRow(2, "sweep", now, {}, "complete")),
        sweeps.prune(),
    )
    assert [row[0] for row in rows(generated)] == [2]
    age(generated, "sweep", "started", "29 days")
    write(lease, sweeps.prune())
    assert [row[0] for row in rows(generated)] == [2]


def test_many_old_sweeps_are_dropped_some_at_a_time(
    generated: Target, lease: Lease, sweeps: Sweeps
) -> None:
    old = [SweepRow(number, "sweep", STARTED, {}, "complete") for number in range(1, 151)]
    new = SweepRow(151, "sweep", generated.now(), {}, "complete")
    write(lease, *map(sweeps.record, [*old, new]))
    write(lease, sweeps.prune())
    assert [row[0] for row in rows(generated)] == list(range(101, 152))
    write(lease, sweeps.prune())
    assert [row[0] for row in rows(generated)] == [151]
