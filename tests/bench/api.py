"""The fake users API in a process of its own, as slow as it is told to be."""

import random
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

from tests.bench.projects import Listed, Long
from worker.sandbox.api import APRIL, TODAY, FakeStackApi, Kind, serve
from worker.sandbox.project import Asked, Shown
from worker.sandbox.replies import Reply, json_reply
from worker.sandbox.requests import Request, listing


@dataclass(frozen=True, slots=True)
class Costs:
    """What a page costs, in seconds; requests wait for each other, as in one process."""

    request: float = 0.0
    user: float = 0.0
    row_behind_cursor: float = 0.0
    newest_first: float = 0.0

    def page(self, users: int, behind: int, *, newest_first: bool = False) -> float:
        """Say how long a page takes; `behind` rows come after its cursor."""
        more = self.newest_first if newest_first else 0.0
        return self.request + self.user * users + self.row_behind_cursor * behind + more


FREE = Costs()
# Fitted to sweeps over 60,000 users with an e-mail address each of a real server, in pages of 1,000
# and of 10,000: see `What a sweep costs` in docs/promises.md.
REAL_SERVER = Costs(request=0.005, user=480e-6, row_behind_cursor=20e-6)

# The same server's pages without a cursor, newest first: 0.20 s for 200 users.
REAL_POLLS = replace(REAL_SERVER, newest_first=0.1)

# What is measured is the worker: unpacking gzip takes each client the same time.
UNPACKED = replace(TODAY, gzip=False)
KINDS = {"today": UNPACKED, "April": replace(APRIL, gzip=False)}


@dataclass
class Served:
    """What the API does when it is told to, in its own process."""

    project: "Listed"
    api: "SlowApi"
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def spend(self, costs: Costs) -> None:
        self.api.costs = costs

    def worked(self) -> tuple[float, float]:
        """Give the seconds that pages took since the last time: of sweeps, and of polls."""
        sweeps, polls = self.api.worked[False], self.api.worked[True]
        self.api.worked.clear()
        return sweeps, polls

    def rows_read(self) -> int:
        """Give how many rows the server read for pages since the last time."""
        read, self.api.rows_read = self.api.rows_read, 0
        return read

    def edit_share(self, share: float, name: str) -> int:
        """Give another name to every nth user."""
        ids = self.project.ids()
        chosen = ids[:: max(1, round(1 / share))]
        for user_id in chosen:
            self.project.edit(user_id, display_name=name)
        return len(chosen)

    def edit_some(self, count: int) -> None:
        for user_id in self.chance.sample(self.project.ids(), count):
            self.project.edit(user_id, display_name=f"Edited {self.chance.random()}")

    def edit_one(self, name: str) -> tuple[str, str]:
        """Give a user of any age another name; returns id and name."""
        user_id = self.chance.choice(self.project.ids())
        self.project.edit(user_id, display_name=name)
        return user_id, name

    def edit_active(self, name: str) -> tuple[str, str]:
        """Let a user of any age with an open session take another name; returns id and name."""
        while self.project.is_anonymous(user_id := self.chance.choice(self.project.ids())):
            pass
        self.project.touch(user_id)
        self.project.edit(user_id, display_name=name)
        return user_id, name

    def sign_up(self) -> str:
        return self.project.create(display_name="New", primary_email="new@example.com")

    def pages(self) -> list[str]:
        """Give the queries of all pages that were asked for since the last time."""
        asked = [r.url for r in self.api.requests if r.path == "/api/v1/users"]
        self.api.requests.clear()
        return asked

    def bodies(self) -> list[bytes]:
        """Give every record as it is sent."""
        asked = Asked(None, None, newest_first=False, shown=Shown.ANONYMOUS)
        return [entry.bodies[0] for entry in self.project.page(asked)[0]]


@dataclass(slots=True)
class Ready:
    """A page as it is sent: in each order of keys, as far as it was asked for."""

    users: int
    bodies: dict[int, bytes] = field(default_factory=dict)


class SlowApi(FakeStackApi):
    """The users API with a price: pages wait for each other and cost time, as in one process.

    Its own work is part of the price, and next to nothing: until the project changes, what was
    sent once is ready to be sent again.
    """

    project: Listed

    def __init__(self, project: Listed, kind: Kind = UNPACKED, costs: Costs = FREE) -> None:
        super().__init__(project, kind)
        self.costs = costs
        # By whether the newest users came first, as polls ask.
        self.worked: defaultdict[bool, float] = defaultdict(float)
        self.rows_read = 0
        self._queue = Lock()
        self._ready: dict[Asked, Ready] = {}
        self._ready_bytes = 0
        self._version = 0

    def _list(self, request: Request, kind: Kind) -> Reply:
        asked = listing(request, kind)
        with self._queue:
            began = time.perf_counter()
            users, body = self._written(asked)
            behind, newest_first = self.project.behind(asked), asked.newest_first
            self.rows_read += behind or users
            seconds = self.costs.page(users, behind, newest_first=newest_first)
            self.worked[newest_first] += seconds
            time.sleep(max(0.0, began + seconds - time.perf_counter()))
        return json_reply(200, body)

    def _written(self, asked: Asked) -> tuple[int, bytes]:
        """Give a page in the other order of keys than the answer before, and its users."""
        self._forget_if_changed()
        order = self._key_order()
        ready = self._ready.get(asked)
        if ready is not None and order in ready.bodies:
            return ready.users, ready.bodies[order]
        entries, next_cursor = self.project.page(asked)
        body = self._page(asked, entries, next_cursor, order if entries else 0)
        if self._ready_bytes + len(body) <= self.project.most_ready_bytes:
            self._ready_bytes += len(body)
            self._ready.setdefault(asked, Ready(len(entries))).bodies[order] = body
        return len(entries), body

    def _forget_if_changed(self) -> None:
        if self._version != self.project.version:
            self._version = self.project.version
            self._ready.clear()
            self._ready_bytes = 0


@dataclass(frozen=True, slots=True)
class RemoteApi:
    """The API seen from outside."""

    url: str
    project_id: str
    secret_server_key: str
    _control: Connection

    def call(self, what: str, *arguments: Any) -> Any:
        """Have `Served` do something, and return what came of it."""
        self._control.send((what, arguments))
        return self._control.recv()


@contextmanager
def started_api(
    users: int, costs: Costs = FREE, *, kind: Kind = UNPACKED, of_many: bool = False
) -> Iterator[RemoteApi]:
    """Start the API of a project of so many users; one `of_many` holds millions, unchangeable."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(
        target=_serve, args=(theirs, users, costs, kind, of_many), daemon=True
    )
    process.start()
    try:
        url, project_id, key = ours.recv()
        yield RemoteApi(url, project_id, key, ours)
    finally:
        process.kill()
        process.join()


def _serve(
    control: Connection,
    users: int,
    costs: Costs,
    kind: Kind,
    of_many: bool,  # noqa: FBT001
) -> None:
    project = Long(users) if of_many else Listed()
    if not of_many:
        project.populate(users)
    api = SlowApi(project, kind, costs)
    served = Served(project, api)
    with serve(api) as url:
        control.send((url, project.project_id, project.secret_server_key))
        while True:
            what, arguments = control.recv()
            control.send(getattr(served, what)(*arguments))
