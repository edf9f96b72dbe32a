"""The fake users API in a process of its own, as slow as it is told to be."""

import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from threading import Lock
from typing import Any

import orjson

from worker.sandbox.api import FakeStackApi, serve
from worker.sandbox.project import Asked, Entry, Key, Project, Shown
from worker.sandbox.records import LATEST_SIGN_UP, SIGN_UP_SPAN, blank, invented

# The whole list of this many is held as bytes; of more users only the keys are.
MOST_WRITTEN = 200_000


@dataclass(frozen=True, slots=True)
class Costs:
    """What a page costs, in seconds; requests wait for each other, as in one process."""

    request: float = 0.0
    user: float = 0.0
    row_behind_cursor: float = 0.0
    byte: float = 0.0

    def times(self, factor: float) -> "Costs":
        return Costs(
            self.request * factor,
            self.user * factor,
            self.row_behind_cursor * factor,
            self.byte * factor,
        )


FREE = Costs()
# A server for which all pages cost the same for each user, wherever in the list they are.
FLAT = Costs(request=0.005, user=100e-6)
# Fitted to a sweep over 60,005 users of a real server, in pages of 500 to 10,000: see
# `What a sweep costs` in docs/promises.md. Each page cost 129 ms, for 30,000 rows behind the cursor
# on average, and each user 173 us.
REAL_SERVER = Costs(request=0.005, user=173e-6, row_behind_cursor=4.1e-6)
# 50 ms there and back, and 20 Mbit/s.
SLOW_LINK = Costs(request=0.05, byte=8 / 20e6)


@dataclass
class Served:
    """What the API does when it is told to, in its own process."""

    project: "Listed"
    api: FakeStackApi
    chance: random.Random = field(default_factory=lambda: random.Random(1))

    def spend(self, costs: Costs) -> None:
        self.project.costs = costs

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


class Listed(Project):
    """A project whose list costs time."""

    costs: Costs = FREE

    def __init__(self) -> None:
        super().__init__()
        self._queue = Lock()

    def page(self, asked: Asked) -> tuple[list[Entry], str | None]:
        began = time.perf_counter()
        with self._queue:
            entries, next_cursor = self._cut(asked)
            costs, behind = self.costs, self._behind(asked)
            seconds = costs.request + costs.user * len(entries) + costs.row_behind_cursor * behind
            if costs.byte:
                seconds += costs.byte * sum(len(entry.bodies[0]) for entry in entries)
            time.sleep(max(0.0, began + seconds - time.perf_counter()))
        return entries, next_cursor

    def _cut(self, asked: Asked) -> tuple[list[Entry], str | None]:
        return super().page(asked)

    def _behind(self, asked: Asked) -> int:
        start = self._start(asked) if asked.cursor else None
        return 0 if start is None else len(self._keys) - start


class Long(Listed):
    """More users than would fit into memory as JSON: each record is written when it is sent."""

    def __init__(self, count: int) -> None:
        super().__init__()
        dice = random.Random(0)
        step = SIGN_UP_SPAN / count
        first = LATEST_SIGN_UP - SIGN_UP_SPAN
        self._keys = [
            (
                first + int(number * step),
                f"{number:08x}-{dice.getrandbits(16):04x}-4000-8000-{0:012x}",
            )
            for number in range(count)
        ]
        self._templates = [_template(record) for record in invented(50, dice, LATEST_SIGN_UP)]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, user_id: str) -> Entry | None:
        at = self._start(Asked(1, user_id, newest_first=False, shown=Shown.ANONYMOUS))
        return None if at is None else self._entry(at)

    def _cut(self, asked: Asked) -> tuple[list[Entry], str | None]:
        start = self._start(asked)
        if start is None or asked.limit is None:
            return [], None
        if asked.newest_first:
            places = range(start, max(-1, start - asked.limit), -1)
            return [self._entry(place) for place in places], None
        end = start + asked.limit
        following = self._keys[end][1] if end < len(self._keys) else None
        return [self._entry(at) for at in range(start, min(end, len(self)))], following

    def _start(self, asked: Asked) -> int | None:
        if asked.cursor is None:
            return len(self) - 1 if asked.newest_first else 0
        # The first part of an id is its number, in the order of the list.
        number = int(asked.cursor[:8], 16)
        there = number < len(self) and self._keys[number][1] == asked.cursor
        return number if there else None

    def _entry(self, place: int) -> Entry:
        key: Key = self._keys[place]
        start, middle, end = self._templates[place % len(self._templates)]
        body = b"%b%b%b%d%b" % (start, key[1].encode(), middle, key[0], end)
        return Entry(key, Shown.DEFAULT, (body, body))


def _template(record: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    """Cut a record at its id and its sign-up."""
    body = orjson.dumps(blank("ID", 0) | record | {"id": "ID", "signed_up_at_millis": 424242})
    start, rest = body.split(b"ID", 1)
    middle, end = rest.split(b"424242", 1)
    return start, middle, end


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
def started_api(users: int, costs: Costs = FREE) -> Iterator[RemoteApi]:
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, users, costs), daemon=True)
    process.start()
    try:
        url, project_id, key = ours.recv()
        yield RemoteApi(url, project_id, key, ours)
    finally:
        process.kill()
        process.join()


def _serve(control: Connection, users: int, costs: Costs) -> None:
    project = Long(users) if users > MOST_WRITTEN else Listed()
    if users <= MOST_WRITTEN:
        project.populate(users)
    project.costs = costs
    api = FakeStackApi(project)
    served = Served(project, api)
    with serve(api) as url:
        control.send((url, project.project_id, project.secret_server_key))
        while True:
            what, arguments = control.recv()
            control.send(getattr(served, what)(*arguments))
