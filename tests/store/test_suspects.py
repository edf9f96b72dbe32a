"""The records of suspicions: what one more notice, a proof or a person makes of them."""

from typing import Any

import pytest

from tests.support.store_target import Target
from worker.store.statement import Statement
from worker.store.suspects import Deletions, Suspect


@pytest.fixture
def deletions(generated: Target) -> Deletions:
    generated.lease().acquire()
    return Deletions(generated.schema)


def run(target: Target, statement: Statement) -> None:
    target.conn.execute(statement.query, statement.params)


def notice(target: Target, deletions: Deletions, *ids: str, sweep: int = 1) -> None:
    run(target, deletions.notice(ids, sweep, target.now()))


def states(target: Target, deletions: Deletions) -> dict[str, str]:
    return {user_id: suspect.state for user_id, suspect in deletions.load(target.conn).items()}


def sweeps(target: Target, deletions: Deletions) -> dict[str, tuple[Any, ...]]:
    return {row[0]: row[2:] for row in deletions.listed(target.conn)}


def test_at_first_nobody_is_suspected(generated: Target, deletions: Deletions) -> None:
    assert deletions.load(generated.conn) == {}
    assert deletions.listed(generated.conn) == []
    assert deletions.approve(generated.conn, 99) == 0


def test_nobody_is_nothing_to_write_about(generated: Target, deletions: Deletions) -> None:
    notice(generated, deletions, "a")
    for statement in (
        deletions.notice([], 1, generated.now()),
        deletions.strike([]),
        deletions.hold([]),
        deletions.hide([]),
        deletions.keep([], 2),
    ):
        run(generated, statement)
    assert states(generated, deletions) == {"a": "candidate"}


def test_noticed_user_is_a_candidate_since_the_page_was_asked_for(
    generated: Target, deletions: Deletions
) -> None:
    asked = generated.now()
    run(generated, deletions.notice(["a"], 4, asked))
    assert deletions.load(generated.conn) == {"a": Suspect("candidate", 4, asked)}
    assert deletions.listed(generated.conn) == [("a", "candidate", 4, 4)]


def test_noticing_again_changes_no_state_and_no_first_notice(
    generated: Target, deletions: Deletions
) -> None:
    notice(generated, deletions, "a", "b", "c", "d")
    run(generated, deletions.hold(["b", "d"]))
    run(generated, deletions.hide(["c"]))
    deletions.approve(generated.conn, 1)
    run(generated, deletions.hold(["a"]))
    before = deletions.load(generated.conn)

    notice(generated, deletions, "a", "b", "c", "d", "e", sweep=2)

    after = deletions.load(generated.conn)
    assert after.pop("e").first_noticed == 2
    assert before == after


def test_struck_suspects_are_forgotten(generated: Target, deletions: Deletions) -> None:
    notice(generated, deletions, "a", "b")
    run(generated, deletions.strike(["b", "unknown"]))
    assert states(generated, deletions) == {"a": "candidate"}


def test_candidates_and_hidden_ones_are_held_but_not_the_approved(
    generated: Target, deletions: Deletions
) -> None:
    notice(generated, deletions, "a", "b", "c")
    run(generated, deletions.hold(["a"]))
    deletions.approve(generated.conn, 1)
    run(generated, deletions.hide(["b"]))

    run(generated, deletions.hold(["a", "b", "unknown"]))

    assert states(generated, deletions) == {"a": "approved", "b": "held", "c": "candidate"}


def test_hidden_user_was_asked_for_just_now(generated: Target, deletions: Deletions) -> None:
    notice(generated, deletions, "a")
    before = generated.now()
    run(generated, deletions.hide(["a"]))
    suspect = deletions.load(generated.conn)["a"]
    assert suspect.asked_at
    assert suspect.state == "hidden"
    assert before < suspect.asked_at < generated.now()


def test_last_notice_only_rises(generated: Target, deletions: Deletions) -> None:
    notice(generated, deletions, "a", "b", sweep=2)
    run(generated, deletions.keep(["a"], 5))
    run(generated, deletions.keep(["a"], 3))
    assert sweeps(generated, deletions) == {"a": (2, 5), "b": (2, 2)}


@pytest.mark.parametrize("left", [[], ["a"], ["a", "b", "c"]])
def test_others_are_forgotten(generated: Target, deletions: Deletions, left: list[str]) -> None:
    notice(generated, deletions, "a", "b", "c")
    run(generated, deletions.hold(["b"]))
    run(generated, deletions.forget_others(left))
    assert list(states(generated, deletions)) == left


def test_approval_covers_what_is_held_since_that_sweep_or_before(
    generated: Target, deletions: Deletions
) -> None:
    notice(generated, deletions, "old", "candidate", sweep=1)
    notice(generated, deletions, "same", sweep=2)
    notice(generated, deletions, "new", sweep=3)
    run(generated, deletions.hold(["old", "same", "new"]))
    run(generated, deletions.keep(["old"], 3))

    assert deletions.approve(generated.conn, 2) == 2

    assert states(generated, deletions) == {
        "old": "approved",
        "same": "approved",
        "new": "held",
        "candidate": "candidate",
    }
    assert deletions.approve(generated.conn, 2) == 0


def test_oldest_suspicion_is_listed_first(generated: Target, deletions: Deletions) -> None:
    notice(generated, deletions, "c", "b", sweep=2)
    notice(generated, deletions, "d", sweep=1)
    assert [row[0] for row in deletions.listed(generated.conn)] == ["d", "b", "c"]


def test_targets_have_suspects_of_their_own(generated: Target, deletions: Deletions) -> None:
    notice(generated, deletions, "a")
    run(generated, deletions.hold(["a"]))
    other = Deletions("another target")
    for statement in (other.strike(["a"]), other.hide(["a"]), other.forget_others([])):
        run(generated, statement)
    assert other.load(generated.conn) == {}
    assert other.approve(generated.conn, 9) == 0
    assert states(generated, deletions) == {"a": "held"}
