"""Answers that are overtaken: true when they were given, and no longer when they arrive."""

from dataclasses import dataclass

from hypothesis import strategies as st

from tests.faults.fake_world import MOST_ROUNDS, Scene
from tests.faults.mischief import BY_HAND
from tests.faults.request_gate import Pool, Waiting
from tests.faults.stepwise import Worker


@dataclass(frozen=True)
class Meanwhile:
    """What happens while an answer is on its way; a poll may see that."""

    what: str
    seconds: int
    polled: bool


meanwhile = st.builds(
    Meanwhile,
    st.sampled_from(["sign up", "sign up", "come or go", "edit", "by hand", "nothing"]),
    st.sampled_from([0, 0, 70]),
    st.sampled_from([True, True, False]),
)
# About somebody who is gone: whether that is still true, or the row is another's by now.
meanwhile_back = st.builds(
    Meanwhile,
    st.sampled_from(["come or go", "come or go", "by hand"]),
    st.sampled_from([0, 0, 70]),
    st.sampled_from([True, True, False]),
)


def answer_late(scene: Scene, worker: Worker, request: Waiting, meanwhile: Meanwhile) -> None:
    """Let the API answer now what is delivered some time after."""
    worker.gate.answer(request)
    happen(scene, meanwhile.what, _about_whom(scene, request))
    scene.time.pass_by(meanwhile.seconds)
    if meanwhile.polled:
        poll(scene, worker)


def _about_whom(scene: Scene, request: Waiting) -> str | None:
    """Give the user about whom something is asked, or the first one on a page."""
    if request.pool in {"user", "hinted"} or request.said is None:
        return request.cursor
    there = request.said.there
    return next((user_id for user_id in scene.people.project.ids() if user_id in there), None)


def happen(scene: Scene, what: str, who: str | None) -> None:
    """Let something happen to the user about whom something is asked, or to nobody."""
    people = scene.people
    if what == "sign up":
        people.sign_up()
    elif what == "by hand" and who in scene.judge.rows:
        write_by_hand(scene, "update", who)
    elif what == "come or go" and who in people.departed:
        people.restore(who, changed=False)
    elif what == "come or go" and who in people.users:
        people.delete(who)
    elif what == "edit" and who in people.users:
        people.edit(who)


def lose(scene: Scene, what: str, request: Waiting, behind: int) -> None:
    """Let the user at whom a page's cursor stands leave that place, and some of those behind."""
    listed = scene.people.project.ids()
    first = listed.index(request.cursor) if request.cursor in listed else len(listed)
    for user_id in listed[first : first + 1 + behind]:
        if what != "upgrade" or user_id in scene.people.anonymous:
            getattr(scene.people, what)(user_id)


def write_by_hand(scene: Scene, how: str, user_id: str) -> None:
    if scene.time.query(BY_HAND[how], user_id):
        scene.judge.wrote_by_hand(user_id)


def poll(scene: Scene, worker: Worker) -> None:
    """Let a worker look at the newest users, whatever else it awaits."""
    scene.take_note()
    scene.begin(worker, "poll")
    for _ in range(MOST_ROUNDS):
        newest = [each for each in worker.gate.waiting if each.pool == "newest"]
        if worker.frozen or not newest:
            break
        scene.take_note()
        scene.deliver(worker, newest[0])


def live(scene: Scene) -> list[str]:
    """Give the users who have a live row, in the order of the list."""
    rows = scene.judge.rows
    return [user_id for user_id in scene.people.users if user_id in rows and rows[user_id].live]


def sweep_until(scene: Scene, worker: Worker, pool: Pool, nth: int) -> Waiting | None:
    """Let a worker sweep until it asks about a user, or for the nth page; None if it never does."""
    scene.begin(worker, "sweep")
    for number in range(MOST_ROUNDS):
        scene.take_note()
        waiting = worker.gate.waiting
        if worker.frozen or not waiting:
            break
        if waiting[-1].pool == pool and number >= nth and waiting[-1].reply is None:
            return waiting[-1]
        scene.deliver(worker, waiting[0])
    return None
