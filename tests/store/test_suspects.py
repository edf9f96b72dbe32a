"""The records of suspicions: what one more notice, a proof or a person makes of them."""

from typing import Any

import pytest

from tests.support.store_target import Target
from worker.store.suspects import Suspect, Suspects
from worker.store.transaction import Statement


@pytest.fixture
def suspects(generated: Target) -> Suspects:
    generated.lease().acquire()
    return Suspects(generated.schema)


def run(target: Target, statement: Statement) -> None:
    target.conn.execute(statement.query, statement.params)


def notice(target: Target, suspects: Suspects, *ids: str, sweep: int = 1) -> None:
    run(target, suspects.notice(ids, sweep, target.now()))


def states(target: Target, suspects: Suspects) -> dict[str, str]:
    return {user_id: suspect.state for user_id, suspect in suspects.load(target.conn).items()}


def sweeps(target: Target, suspects: Suspects) -> dict[str, tuple[Any, ...]]:
    return {row[0]: row[2:] for row in suspects.listed(target.conn)}


def test_at_first_nobody_is_suspected(generated: Target, suspects: Suspects) -> None:
    assert suspects.load(generated.conn) == {}
    assert suspects.listed(generated.conn) == []
    assert suspects.approve(generated.conn, 99) == 0


def test_nobody_is_nothing_to_write_about(generated: Target, suspects: Suspects) -> None:
    notice(generated, suspects, "a")
    for statement in (
        suspects.notice([], 1, generated.now()),
        suspects.strike([]),
        suspects.hold([]),
        suspects.hide([]),
        suspects.keep([], 2),
    ):
        run(generated, statement)
    assert states(generated, suspects) == {"a": "candidate"}


def test_noticed_user_is_a_candidate_since_the_page_was_asked_for(
    generated: Target, suspects: Suspects
) -> None:
    asked = generated.now()
    run(generated, suspects.notice(["a"], 4, asked))
    assert suspects.load(generated.conn) == {"a": Suspect("candidate", 4, asked)}
    assert suspects.listed(generated.conn) == [("a", "candidate", 4, 4)]


def test_noticing_again_changes_no_state_and_no_first_notice(
    generated: Target, suspects: Suspects
) -> None:
    notice(generated, suspects, "a", "b", "c", "d")
    run(generated, suspects.hold(["b", "d"]))
    run(generated, suspects.hide(["c"]))
    suspects.approve(generated.conn, 1)
    run(generated, suspects.hold(["a"]))
    before = suspects.load(generated.conn)

    notice(generated, suspects, "a", "b", "c", "d", "e", sweep=2)

    after = suspects.load(generated.conn)
    assert after.pop("e").first_noticed == 2
    assert before == after


def test_struck_suspects_are_forgotten(generated: Target, suspects: Suspects) -> None:
    notice(generated, suspects, "a", "b")
    run(generated, suspects.strike(["b", "unknown"]))
    assert states(generated, suspects) == {"a": "candidate"}


def test_candidates_and_hidden_ones_are_held_but_not_the_approved(
    generated: Target, suspects: Suspects
) -> None:
    notice(generated, suspects, "a", "b", "c")
    run(generated, suspects.hold(["a"]))
    suspects.approve(generated.conn, 1)
    run(generated, suspects.hide(["b"]))

    run(generated, suspects.hold(["a", "b", "unknown"]))

    assert states(generated, suspects) == {"a": "approved", "b": "held", "c": "candidate"}


def test_hidden_user_was_asked_for_just_now(generated: Target, suspects: Suspects) -> None:
    notice(generated, suspects, "a")
    before = generated.now()
    run(generated, suspects.hide(["a"]))
    suspect = suspects.load(generated.conn)["a"]
    assert suspect.asked_at
    assert suspect.state == "hidden"
    assert before < suspect.asked_at < generated.now()


def test_last_notice_only_rises(generated: Target, suspects: Suspects) -> None:
    notice(generated, suspects, "a", "b", sweep=2)
    run(generated, suspects.keep(["a"], 5))
    run(generated, suspects.keep(["a"], 3))
    assert sweeps(generated, suspects) == {"a": (2, 5), "b": (2, 2)}


@pytest.mark.parametrize("left", [[], ["a"], ["a", "b", "c"]])
def test_others_are_forgotten(generated: Target, suspects: Suspects, left: list[str]) -> None:
    notice(generated, suspects, "a", "b", "c")
    run(generated, suspects.hold(["b"]))
    run(generated, suspects.forget_others(left))
    assert list(states(generated, suspects)) == left


def test_approval_covers_what_is_held_since_that_sweep_or_before(
    generated: Target, suspects: Suspects
) -> None:
    notice(generated, suspects, "old", "candidate", sweep=1)
    notice(generated, suspects, "same", sweep=2)
    notice(generated, suspects, "new", sweep=3)
    run(generated, suspects.hold(["old", "same", "new"]))
    run(generated, suspects.keep(["old"], 3))

    assert suspects.approve(generated.conn, 2) == 2

    assert states(generated, suspects) == {
        "old": "approved",
        "same": "approved",
        "new": "held",
        "candidate": "candidate",
    }
    assert suspects.approve(generated.conn, 2) == 0


def test_oldest_suspicion_is_listed_first(generated: Target, suspects: Suspects) -> None:
    notice(generated, suspects, "c", "b", sweep=2)
    notice(generated, suspects, "d", sweep=1)
    assert [row[0] for row in suspects.listed(generated.conn)] == ["d", "b", "c"]


def test_targets_have_suspects_of_their_own(generated: Target, suspects: Suspects) -> None:
    notice(generated, suspects, "a")
    run(generated, suspects.hold(["a"]))
    other = Suspects("another target")
    for statement in (other.strike(["a"]), other.hide(["a"]), other.forget_others([])):
        run(generated, statement)
    assert other.load(generated.conn) == {}
    assert other.approve(generated.conn, 9) == 0
    assert states(generated, suspects) == {"a": "held"}
