"""Users, workers, the API, the database and other writers, in any order: and what always holds."""

import sys
from dataclasses import replace

from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from tests.faults.fake_world import AT_THE_CURSOR, MOST_WORKERS, Options, Scene
from tests.faults.lateness import (
    Meanwhile,
    answer_late,
    live,
    lose,
    meanwhile,
    meanwhile_back,
    sweep_until,
    write_by_hand,
)
from tests.faults.mischief import APPROVE, BY_HAND, FAILURES, HELD
from tests.faults.model_users import CLEANED, REFUSED
from tests.faults.proxy import Cut
from tests.faults.request_gate import Pool
from tests.faults.site import Manner
from tests.support.fake_time import FakeTime
from tests.support.users_apis import USERS_APIS

MOST_USERS = 14

whom = st.integers(0, AT_THE_CURSOR + 3)
nth = st.integers(0, 5)
rounds = st.integers(0, 4)
# How a write begins, after which it holds a lock.
FENCE = b"set writes = writes + 1"
# At the nth statement, or at the nth commit: whether that was done nobody can know.
cuts = st.one_of(
    st.builds(Cut, st.integers(1, 9), st.booleans()),
    st.builds(Cut, st.integers(1, 2), st.just(True), st.just(b"commit")),  # noqa: FBT003
)
# Just before a write to come: then it is another process that goes on, if any.
stalls = st.builds(Cut, st.integers(1, 5), text=st.just(FENCE), stall=st.just(True))  # noqa: FBT003
options = st.builds(
    Options,
    grace_seconds=st.sampled_from([0, 60]),
    include_anonymous=st.booleans(),
    page_size=st.integers(3, 5),
    poll_page_size=st.sampled_from([3, 5, 30]),
    users_api=st.sampled_from(USERS_APIS),
)


HINT = "select users_sync_worker.refresh(%s)"
LOSE_HINTS = "delete from users_sync_worker.hint"
STRANGER = "ffffffff-0000-4000-8000-00000000000f"


class Machine(RuleBasedStateMachine):
    """Everything that may happen, one step after the other.

    After a step, `then` so many requests of the workers are let through, for a start.
    """

    def __init__(self, url: str, time: FakeTime) -> None:
        super().__init__()
        self._url = url
        self._time = time
        self._begun_within = sys.exc_info()[1]

    @initialize(users=st.integers(0, 9), anonymous=st.integers(0, 9), options=options)
    def begin(self, users: int, anonymous: int, options: Options) -> None:
        self.scene = Scene(self._url, self._time, options)
        for number in range(users):
            self.scene.people.sign_up(anonymous=number < anonymous, long_ago=True)

    @precondition(lambda self: len(self.scene.people.users) < MOST_USERS)
    @rule(anonymous=st.booleans(), long_ago=st.booleans(), then=rounds)
    def sign_up(self, then: int, *, anonymous: bool, long_ago: bool) -> None:
        self.scene.people.sign_up(anonymous=anonymous, long_ago=long_ago)
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.people.users)
    @rule(what=st.sampled_from(["edit", "hide", "touch", "upgrade"]), who=whom, then=rounds)
    def change(self, what: str, who: int, then: int) -> None:
        """Let something happen to a user."""
        of_whom = (
            self.scene.people.anonymous if what == "upgrade" else list(self.scene.people.users)
        )
        if of_whom:
            getattr(self.scene.people, what)(self.scene.pick(of_whom, who))
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.people.users)
    @rule(who=whom, behind=st.integers(0, 3), then=rounds)
    def delete(self, who: int, behind: int, then: int) -> None:
        """Delete a user, and some of those behind."""
        ids = list(self.scene.people.users)
        first = ids.index(self.scene.pick(ids, who))
        for user_id in ids[first : first + 1 + behind]:
            self.scene.people.delete(user_id)
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.people.departed)
    @rule(who=whom, changed=st.booleans(), then=rounds)
    def restore(self, who: int, then: int, *, changed: bool) -> None:
        self.scene.people.restore(self.scene.pick(self.scene.people.departed, who), changed=changed)
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.people.users)
    @rule(who=whom, how=st.sampled_from([*CLEANED, *REFUSED]), then=rounds)
    def make_odd(self, who: int, how: str, then: int) -> None:
        self.scene.people.make_odd(self.scene.pick(list(self.scene.people.users), who), how)
        self.scene.go_on(then)

    @precondition(lambda self: len(self.scene.workers) < MOST_WORKERS)
    @rule(
        manner=st.sampled_from(Manner),
        swept=st.booleans(),
        cut=st.none() | cuts | stalls,
        then=rounds,
    )
    def start(self, manner: Manner, cut: Cut | None, then: int, *, swept: bool) -> None:
        """Start a worker; it may have swept, or be broken off, before anything else happens."""
        worker = self.scene.start(manner)
        if swept:
            worker.proxy.cut(cut and replace(cut))
            self.scene.begin(worker, "sweep")
            self.scene.let_through(worker)
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.possible())
    @rule(of=nth, then=rounds)
    def begin_job(self, of: int, then: int) -> None:
        """Let a worker begin something; it goes on until it awaits an answer."""
        possible = self.scene.possible()
        self.scene.begin(*possible[of % len(possible)])
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.waiting())
    @rule(of=nth, how=st.sampled_from(["truth", *FAILURES]), then=rounds)
    def answer(self, of: int, how: str, then: int) -> None:
        """Let one request through, with an answer as of now, or of when it was answered."""
        waiting = self.scene.waiting()
        worker, request = waiting[of % len(waiting)]
        if how != "truth" and request.reply is None:
            request.reply = FAILURES[how](request.request)
            if how == "empty list" and not request.cursor:
                self.scene.judge.misled()
        self.scene.deliver(worker, request)
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.unanswered())
    @rule(of=nth, meanwhile=meanwhile, then=rounds)
    def answer_late(self, of: int, meanwhile: Meanwhile, then: int) -> None:
        """Let the API answer now what is delivered later, when it may be true no more."""
        unanswered = self.scene.unanswered()
        worker, request = unanswered[of % len(unanswered)]
        answer_late(self.scene, worker, request, meanwhile)
        self.scene.go_on(then, but=request)

    @precondition(lambda self: self.scene.sweepers())
    @rule(of=nth, page=nth, meanwhile=meanwhile, then=rounds)
    def read_late(self, of: int, page: int, meanwhile: Meanwhile, then: int) -> None:
        """Let a sweep get one of its pages late."""
        self._sweep_late(of, "page", page, meanwhile)
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.sweepers())
    @rule(
        of=nth,
        page=st.integers(1, 3),
        what=st.sampled_from(["delete", "hide", "upgrade"]),
        behind=st.integers(0, 2),
        then=rounds,
    )
    def lose_the_way(self, of: int, page: int, what: str, behind: int, then: int) -> None:
        """Let those leave behind whom a sweep asks for one of its pages."""
        worker = self.scene.sweepers()[of % len(self.scene.sweepers())]
        request = sweep_until(self.scene, worker, "page", page)
        if request is not None:
            lose(self.scene, what, request, behind)
        self.scene.go_on(then)

    @precondition(lambda self: bool(self.scene.sweepers() and live(self.scene)))
    @rule(of=nth, who=nth, meanwhile=meanwhile_back, then=rounds)
    def ask_late(self, of: int, who: int, meanwhile: Meanwhile, then: int) -> None:
        """Let a sweep get late what it asks about one of the newest, who is gone."""
        newest = live(self.scene)[::-1]
        self.scene.people.delete(newest[who % len(newest)])
        self._sweep_late(of, "user", 0, meanwhile)
        self.scene.go_on(then)

    def _sweep_late(self, of: int, pool: Pool, nth: int, meanwhile: Meanwhile) -> None:
        worker = self.scene.sweepers()[of % len(self.scene.sweepers())]
        request = sweep_until(self.scene, worker, pool, nth)
        if request is not None:
            answer_late(self.scene, worker, request, meanwhile)

    @precondition(lambda self: self.scene.workers)
    @rule(of=nth, how=st.sampled_from(["stops", "dies", "is cut off and stops"]), then=rounds)
    def end(self, of: int, how: str, then: int) -> None:
        self.scene.end(self.scene.workers[of % len(self.scene.workers)], how)
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.workers)
    @rule(of=nth, cut=cuts, then=rounds)
    def break_connection(self, of: int, cut: Cut, then: int) -> None:
        """Let a connection to the database break before or after a statement to come."""
        self.scene.workers[of % len(self.scene.workers)].proxy.cut(replace(cut))
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.workers)
    @rule(of=nth, write=st.integers(1, 4), then=rounds)
    def freeze(self, of: int, write: int, then: int) -> None:
        """Let a worker be stopped just before a write to come, with all that it knows."""
        worker = self.scene.workers[of % len(self.scene.workers)]
        worker.proxy.cut(Cut(write, text=FENCE, stall=True))
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.frozen())
    @rule(of=nth, meanwhile=st.none() | rounds, then=rounds)
    def thaw(self, of: int, meanwhile: int | None, then: int) -> None:
        """Let a worker go on that was stopped; another one may have taken over meanwhile."""
        frozen = self.scene.frozen()
        if meanwhile is not None:
            self.scene.take_over()
            self.scene.go_on(meanwhile)
        self.scene.thaw(frozen[of % len(frozen)])
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.judge.rows)
    @rule(who=whom, how=st.sampled_from([*BY_HAND]), then=rounds)
    def write_by_hand(self, who: int, how: str, then: int) -> None:
        """Let somebody else write into the table."""
        user_id = self.scene.pick(
            sorted(self.scene.people.states if how == "insert" else self.scene.judge.rows), who
        )
        write_by_hand(self.scene, how, user_id)
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.judge.rows)
    @rule(who=whom, how=st.sampled_from(["right", "forged", "lost"]), then=rounds)
    def hint(self, who: int, how: str, then: int) -> None:
        """Let somebody hint at a user who changed, or did not, once or again; or lose all hints."""
        if how == "lost":
            self.scene.time.query(LOSE_HINTS)
        else:
            user_id = self.scene.pick(sorted(self.scene.people.states), who)
            self.scene.time.query(HINT, STRANGER if how == "forged" else user_id)
        for worker, name in self.scene.possible():
            if name == "hints":
                self.scene.begin(worker, name)
        self.scene.go_on(then)

    @precondition(lambda self: self.scene.time.query(HELD))
    @rule()
    def approve(self) -> None:
        self.scene.time.query(APPROVE)

    @rule(seconds=st.sampled_from([5, 25, 70, 1900]), then=rounds)
    def let_time_pass(self, seconds: int, then: int) -> None:
        self.scene.time.pass_by(seconds)
        self.scene.go_on(then)

    # What always holds.

    @invariant()
    def nothing_false_is_in_the_table(self) -> None:
        self.scene.take_note()
        self.scene.judge.look()

    def teardown(self) -> None:
        if not hasattr(self, "scene"):
            return
        with self.scene:
            if sys.exc_info()[1] is self._begun_within:
                self.scene.come_to_rest()
