"""Everybody on one scene: users, workers, the API, the table; nothing happens by itself."""

from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any, ClassVar, Self

from hypothesis import note

from tests.faults.mischief import APPROVE
from tests.faults.model_users import People
from tests.faults.oracle import Judge
from tests.faults.request_gate import Waiting
from tests.faults.site import Manner, Site
from tests.faults.stepwise import Worker
from tests.support.fake_time import FakeTime
from tests.support.sweep_world import EMPTY
from tests.support.users_apis import api_of
from worker.sandbox.api import Project

LEASE_SECONDS = 60
AUDIT_HOURS = 1
# The guard holds more deletions than this within a day.
MOST_DELETED = 6
# More than two at once are no other case.
MOST_WORKERS = 2
# More than any job needs to come to its end.
MOST_ROUNDS = 500
# Whoever picks a number from here on picks the user at whom a worker stands: there it hurts most.
AT_THE_CURSOR = 10
# The cursor's user, the last one of the page before, and the one behind.
AROUND = 3

JOBS = ("sweep", "poll", "hints", "stand by", "renew")

HINTED = "select from users_sync_worker.hint limit 1"
FREE = "select from users_sync_worker.lease where expires_at <= faketime.clock_timestamp()"
BIND = "insert into users_sync_worker.lease (target, project) values ('neon_auth', %s)"
WHAT_HAPPENED = """
select jsonb_build_object('inserted', sum(inserted), 'updated', sum(updated), 'restored',
    sum(restored), 'deleted', sum(deleted), 'approved', sum(approved), 'hidden', sum(hidden),
    'stale', sum(stale), 'quarantined', sum(quarantined), 'held', sum(held))
from users_sync_worker.sweep
"""


@dataclass(frozen=True)
class Options:
    """How the workers of a scene are set up."""

    grace_seconds: int
    include_anonymous: bool
    page_size: int
    poll_page_size: int
    users_api: str

    def sections(self) -> dict[str, dict[str, Any]]:
        return {
            "stack": {
                "page_size": self.page_size,
                "include_anonymous": self.include_anonymous,
            },
            "database": {"lease_seconds": LEASE_SECONDS},
            "schedule": {"audit_hours": AUDIT_HOURS, "poll_page_size": self.poll_page_size},
            "deletions": {
                "max_fraction": 1,
                "max_count": MOST_DELETED,
                "grace_seconds": self.grace_seconds,
            },
        }


class Scene:
    """An empty project, an empty table, and nobody at work yet.

    Workers go on only until they await an answer, and each answer is let through by a step.
    `happened` counts what came of it all, over all scenes.
    """

    happened: ClassVar[Counter[str]] = Counter()

    def __init__(self, url: str, time: FakeTime, options: Options) -> None:
        time.set(0)
        time.query(EMPTY)
        # The order of sign-ups does not depend on how quick the machine is.
        began, sign_ups = time.millis(), count()
        project = Project(now_millis=lambda: began + int(time.seconds) * 1000 + next(sign_ups))
        time.query(BIND, project.project_id)
        self.time = time
        self.workers: list[Worker] = []
        self.people = People(project, time.now, options.include_anonymous)
        grace = timedelta(seconds=options.grace_seconds)
        # A worker that is slower than this may well find another one in its place.
        patience = max(grace, timedelta(seconds=LEASE_SECONDS))
        self.judge = Judge(self.people, time.query, grace, patience)
        api = api_of(project, options.users_api)
        self._site = Site(url, api, time.monotonic, options.sections())
        self._told: list[str] = []
        self._ends = ExitStack()
        self._turn = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        """End whoever is still at work, in whatever state."""
        self._ends.close()

    def start(self, manner: Manner) -> Worker:
        note(f"{manner.value} starts")
        worker = Worker(self._site, manner, self._told.append)
        self._ends.callback(worker.die)
        self.workers.append(worker)
        worker.begin("begin")
        self.judge.acted(worker)
        return worker

    def begin(self, worker: Worker, name: str) -> None:
        if worker.can(name):
            note(f"{worker}: {name}")
            worker.begin(name)
            self.judge.acted(worker)
            self.take_note()

    def possible(self) -> list[tuple[Worker, str]]:
        """Say who may begin what; to look for a lease that is not free leads nowhere."""
        possible = [(w, name) for w in self.workers for name in JOBS if w.can(name)]
        if any(name == "hints" for _, name in possible) and not self.time.query(HINTED):
            possible = [(w, name) for w, name in possible if name != "hints"]
        if any(name == "stand by" for _, name in possible) and not self.time.query(FREE):
            return [(w, name) for w, name in possible if name != "stand by"]
        return possible

    def sweepers(self) -> list[Worker]:
        return [worker for worker, name in self.possible() if name == "sweep"]

    def waiting(self) -> list[tuple[Worker, Waiting]]:
        awake = [worker for worker in self.workers if not worker.frozen]
        return [(worker, waiting) for worker in awake for waiting in worker.gate.waiting]

    def unanswered(self) -> list[tuple[Worker, Waiting]]:
        return [each for each in self.waiting() if each[1].reply is None]

    def pick(self, ids: Sequence[str], who: int) -> str:
        """Pick one of them: the nth, or one of those around whom a worker stands."""
        listed = self.people.project.ids()
        near = [
            user_id
            for _, waiting in self.waiting()
            if waiting.cursor in listed
            for user_id in listed[listed.index(waiting.cursor) :][:AROUND]
            if user_id in ids
        ]
        if who >= AT_THE_CURSOR and near:
            return near[(who - AT_THE_CURSOR) % len(near)]
        return ids[who % len(ids)]

    def deliver(self, worker: Worker, waiting: Waiting) -> None:
        if waiting.reply is None:
            worker.gate.answer(waiting)
        if waiting.said:
            self.judge.heard(worker, waiting.said)
            if waiting.pool == "newest":
                worker.says.append(waiting.said)
        worker.gate.deliver(waiting)
        worker.settle()
        self.judge.acted(worker)

    def let_through(self, worker: Worker, rounds: int = MOST_ROUNDS) -> None:
        for _ in range(rounds):
            self.take_note()
            if worker.frozen or not worker.gate.waiting:
                return
            self.deliver(worker, worker.gate.waiting[0])
        assert rounds < MOST_ROUNDS or not worker.gate.waiting, f"asks without end: {worker}"

    def go_on(self, times: int, but: Waiting | None = None) -> None:
        """Let some requests through, truly answered; where nobody asks, let somebody begin."""
        for _ in range(times):
            self.take_note()
            waiting = [each for each in self.waiting() if each[1] is not but]
            possible = self.possible()
            self._turn += 1
            if waiting:
                self.deliver(*waiting[self._turn % len(waiting)])
            elif possible:
                self.begin(*possible[self._turn % len(possible)])
            elif len(self.workers) == len(self.frozen()) < MOST_WORKERS:
                self.start(Manner.QUIET if self._turn % 2 else Manner.LONG)

    def take_note(self) -> None:
        """Note when what is asked was asked, and what was done with answers."""
        now = self.time.now()
        for worker in self.workers:
            for waiting in worker.gate.waiting:
                waiting.asked_at = waiting.asked_at or now
            for said in worker.accepted:
                self.judge.accepted(worker, said)
            worker.accepted.clear()
            self._told += [f"connection: broken {where}" for where in worker.proxy.happened]
            worker.proxy.happened.clear()
        self.workers = [worker for worker in self.workers if not worker.over]
        while self._told:
            told = self._told.pop(0)
            note(told)
            self.happened[told] += 1

    def frozen(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.frozen]

    def thaw(self, worker: Worker) -> None:
        self._told.append(f"stopped worker goes on, {self.judge.tell_place(worker)}")
        worker.thaw()
        self.judge.acted(worker)

    def take_over(self) -> None:
        """Let the time of the lease pass, and somebody who is not stopped take it."""
        self.time.pass_by(LEASE_SECONDS + 1)
        for worker in self.workers:
            self.begin(worker, "stand by")
        if len(self.workers) == len(self.frozen()) < MOST_WORKERS:
            self.start(Manner.LONG)

    def end(self, worker: Worker, how: str = "stops") -> None:
        """End a worker as a power cut does, or let it tidy up, with its connection or without."""
        worker.die() if how == "dies" else worker.stop(cut_off=how == "is cut off and stops")
        self.judge.acted(worker)
        self.take_note()

    def come_to_rest(self) -> None:
        """Let nothing more go wrong: two sweeps then make table and project equal.

        One well-formed user signs up, because a sweep that may store nobody fails.
        """
        self.people.sign_up(anonymous=False, long_ago=True)
        for worker in self.workers:
            worker.proxy.cut(None)
            if worker.frozen:
                self.thaw(worker)
            self.let_through(worker)
        for worker in [each for each in self.workers if each.manner.lasts]:
            self.time.pass_by(3 * LEASE_SECONDS)
            self._sweep_twice(worker)
            self.judge.compare(audited=False)
            self.end(worker)
        self.time.pass_by(2 * 3600 * AUDIT_HOURS)
        self._sweep_once()
        self._sweep_once()
        if self.time.query(APPROVE):
            self._sweep_once()
            self._sweep_once()
        self.judge.compare(audited=True)
        self._tell_what_happened()

    def _sweep_twice(self, worker: Worker) -> None:
        enough = worker.completed + 2
        for _ in range(6):  # it may have lost its lease, or its mirror, and not know it yet
            if worker.completed < enough:
                self.begin(worker, "sweep" if worker.leader else "stand by")
                self.let_through(worker)
        assert worker.completed == enough, f"it does not get to its end: {self._told}"

    def _sweep_once(self) -> None:
        worker = self.start(Manner.ONCE)
        self.begin(worker, "sweep")
        self.let_through(worker)
        assert worker.completed, f"it does not get to its end: {self._told}"

    def _tell_what_happened(self) -> None:
        for counts in self.time.query(WHAT_HAPPENED):
            for name, number in counts[0].items():
                self.happened[f"users {name}"] += number or 0
