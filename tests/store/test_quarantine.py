"""The records of what could not be stored."""

import json
from typing import Any

import pytest

from tests.support.store_target import Target, person
from worker.errors import DataRefused
from worker.model import Unreadable
from worker.store.quarantine import (
    BadRecord,
    Quarantine,
    QuarantineMark,
    refused_record,
    unreadable_record,
)
from worker.store.transaction import Statement

ROWS = """
select record, user_id, digest, payload, error, permanent, times, first_seen < last_seen
from users_sync_worker.quarantine where target = %s order by record
"""


@pytest.fixture
def quarantine(generated: Target) -> Quarantine:
    generated.lease().acquire()
    return Quarantine(generated.schema)


def run(target: Target, statement: Statement) -> None:
    target.conn.execute(statement.query, statement.params)


def rows(target: Target) -> list[tuple[Any, ...]]:
    return target.query(ROWS, target.schema)


def test_at_first_nothing_is_in_quarantine(generated: Target, quarantine: Quarantine) -> None:
    assert quarantine.load(generated.conn) == {}


def test_record_is_kept_with_what_was_wrong(generated: Target, quarantine: Quarantine) -> None:
    run(generated, quarantine.put([BadRecord("a", "d1", '{"id": "a"}', "odd")]))
    assert rows(generated) == [("a", "a", "d1", '{"id": "a"}', "odd", True, 1, False)]
    assert quarantine.load(generated.conn) == {"a": QuarantineMark("d1", "odd", permanent=True)}


def test_record_that_is_met_again_is_counted_and_brought_up_to_date(
    generated: Target, quarantine: Quarantine
) -> None:
    run(generated, quarantine.put([BadRecord("a", "d1", "{}", "odd")]))
    run(generated, quarantine.put([BadRecord("a", "d2", "[]", "other", permanent=False)]))
    assert rows(generated) == [("a", "a", "d2", "[]", "other", False, 2, True)]


def test_of_a_record_that_is_there_twice_the_last_counts(
    generated: Target, quarantine: Quarantine
) -> None:
    """Two users, say, about whom the same nonsense is answered."""
    twice = [BadRecord("a", f"d{n}", "{}", "odd") for n in (1, 2)]
    run(generated, quarantine.put(twice))
    assert rows(generated) == [("a", "a", "d2", "{}", "odd", True, 1, False)]


def test_record_whose_cause_may_go_is_known_as_such(
    generated: Target, quarantine: Quarantine
) -> None:
    run(generated, quarantine.put([BadRecord("a", "d1", "{}", "odd", permanent=False)]))
    assert quarantine.load(generated.conn) == {"a": QuarantineMark("d1", "odd", permanent=False)}


def test_record_without_an_id_is_known_by_its_digest(
    generated: Target, quarantine: Quarantine
) -> None:
    bad = Unreadable(None, b"\x01" * 8, '{"id": 7}', "the id is no text")
    for _ in range(2):
        run(generated, quarantine.put([unreadable_record(bad)]))
    known = quarantine.load(generated.conn)
    assert {record: each.digest for record, each in known.items()} == {"01" * 8: "01" * 8}
    assert [(row[1], row[6]) for row in rows(generated)] == [(None, 2)]


@pytest.mark.parametrize("left", [[], ["a"], ["a", "b"]])
def test_others_are_forgotten(generated: Target, quarantine: Quarantine, left: list[str]) -> None:
    for record in ("a", "b"):
        run(generated, quarantine.put([BadRecord(record, "d", "{}", "odd")]))
    run(generated, quarantine.forget_others(left))
    assert list(quarantine.load(generated.conn)) == left


def test_targets_have_records_of_their_own(generated: Target, quarantine: Quarantine) -> None:
    run(generated, quarantine.put([BadRecord("a", "d", "{}", "odd")]))
    run(generated, Quarantine("another target").forget_others([]))
    assert Quarantine("another target").load(generated.conn) == {}
    assert quarantine.load(generated.conn) == {"a": QuarantineMark("d", "odd", permanent=True)}


@pytest.mark.parametrize("state", ["22P02", "54001", "23505", "P0001", "U0001"])
def test_what_the_database_refuses_may_pass_another_time_and_is_told_by_its_code(
    state: str,
) -> None:
    user = person(1)
    rejected = refused_record(user, DataRefused("words", state, "name_of_a_constraint"))
    assert (rejected.record, rejected.permanent) == (user.id, False)
    assert rejected.error == f"refused by the database: {state} name_of_a_constraint"
    assert json.loads(rejected.payload) == user.record
