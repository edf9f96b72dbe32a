"""Which of two answers is the newer one, in whatever order they are accepted."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.errors import MirrorOutdated
from worker.model import User, Users
from worker.sync.cache import Cache
from worker.sync.mirror import Delta

BEGAN = datetime(2026, 3, 14, tzinfo=UTC)
IDS = [f"00000000-0000-4000-8000-00000000000{number}" for number in range(6)]


def at(seconds: int) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def users(ids: Iterable[str]) -> Users:
    return Users.of(User(user_id, 1, b"x" * 8, b"{}") for user_id in ids)


def everybody() -> Delta:
    """Give a delta that finds something about everybody, in each of its ways."""
    keys = [(1, user_id) for user_id in IDS]
    return Delta(users(IDS), keys, list(keys))


def decided(cache: Cache, seconds: int) -> set[str]:
    """Tell of which ids an answer that was asked for then says nothing."""
    delta = cache.still_news(everybody(), at(seconds))
    said = {user.id for user in delta.changed}
    assert said == {key[1] for key in delta.missing} == {key[1] for key in delta.moved}
    return set(IDS) - said


answers = st.lists(
    st.tuples(st.integers(0, 20), st.sets(st.sampled_from(IDS)), st.integers(0, 100)), max_size=8
)


@given(answers)
def test_older_answer_says_nothing_of_what_a_later_one_decided(
    answers: list[tuple[int, set[str], int]],
) -> None:
    """Each answer has the moment it was asked for, whom it shows, and when its turn comes."""
    cache = Cache()
    for seconds, _, _ in answers:
        cache.asked(at(seconds))
    accepted: list[tuple[int, set[str]]] = []
    for seconds, ids, _ in sorted(answers, key=lambda answer: answer[2]):
        later = [shown for moment, shown in accepted if moment > seconds]
        assert decided(cache, seconds) == set[str]().union(*later)
        cache.accepted(users(ids), at(seconds))
        cache.answered(at(seconds))
        accepted.append((seconds, ids))
    assert cache.remembered == 0


@given(answers)
def test_nothing_is_remembered_when_nothing_is_under_way(
    answers: list[tuple[int, set[str], int]],
) -> None:
    cache = Cache()
    for seconds, ids, _ in answers:
        cache.asked(at(seconds))
        cache.accepted(users(ids), at(seconds))
        cache.answered(at(seconds))
        assert cache.remembered == 0


def test_answers_one_after_another_need_no_memory() -> None:
    cache = Cache()
    cache.asked(at(5))
    cache.accepted(users(IDS), at(5))
    assert cache.remembered == 0
    assert decided(cache, 5) == set()


def test_only_what_the_oldest_answer_could_contradict_is_kept() -> None:
    cache = Cache()
    for seconds in (1, 5, 9):
        cache.asked(at(seconds))
    cache.accepted(users(IDS[:1]), at(5))
    cache.accepted(users(IDS[1:2]), at(9))
    cache.answered(at(1))
    assert (cache.remembered, decided(cache, 6)) == (1, {IDS[1]})
    cache.answered(at(9))
    assert cache.remembered == 1
    cache.answered(at(5))
    assert cache.remembered == 0


def test_answer_that_was_given_up_twice_is_forgotten_once() -> None:
    cache = Cache()
    cache.asked(at(1))
    cache.answered(at(1))
    cache.answered(at(1))
    assert cache.remembered == 0


def test_nothing_to_say_stays_nothing() -> None:
    cache = Cache()
    assert cache.still_news(Delta(), at(0)) == Delta()


def test_answer_for_an_earlier_generation_counts_for_nothing() -> None:
    cache = Cache()
    cache.check(0)
    cache.generation += 1
    with pytest.raises(MirrorOutdated):
        cache.check(0)
