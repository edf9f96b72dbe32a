"""A gate between a worker and the API: each request waits there until the test lets it through."""

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from threading import Condition, Event, Thread, current_thread
from typing import Any, Literal, TypeVar
from weakref import WeakSet

import httpx

from worker.errors import UsersSyncError
from worker.model import Page, Single
from worker.sync.chain import Request
from worker.sync.fetcher import THREADS, Fetcher

Answered = TypeVar("Answered", Page, Single)
Pool = Literal["page", "newest", "user", "hinted"]

# So many requests of a kind are at the gate at once, as long as there are more of them.
WIDTH: dict[Pool, int] = {"page": 1, "newest": 1, "user": THREADS, "hinted": THREADS}

# Much longer than anything takes that does not hang.
PATIENCE_SECONDS = 20


@dataclass(frozen=True)
class Said:
    """What an answer tells of whom: these users are there, or this one is not."""

    asked_at: datetime
    there: frozenset[str] = frozenset()
    gone: str | None = None


@dataclass(eq=False)
class Waiting:
    """A request at the gate. Once it is answered, `reply` waits for its delivery."""

    pool: Pool
    request: httpx.Request
    asked_at: datetime | None = None
    reply: httpx.Response | httpx.TransportError | None = None
    said: Said | None = None
    delivered: Event = field(default_factory=Event)

    @property
    def cursor(self) -> str | None:
        """The user whom the answer decides about: a page's cursor, or who is asked for."""
        if self.pool in {"user", "hinted"}:
            return self.request.url.path.rpartition("/")[2]
        return str(self.request.url.params.get("cursor", "")) or None

    def __str__(self) -> str:
        return f"{self.pool} {self.cursor or ''}"


class Gate(httpx.BaseTransport):
    """Where the requests of one worker wait; `changed` is notified whenever anything happens."""

    def __init__(self, api: httpx.BaseTransport) -> None:
        self.changed = Condition()
        self.waiting: list[Waiting] = []
        self._api = api

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        waiting = Waiting(_pool_of(request.url), request)
        with self.changed:
            self.waiting.append(waiting)
            self.waiting.sort(key=str)  # side by side, they come in any order
            self.changed.notify_all()
        waiting.delivered.wait()
        if isinstance(waiting.reply, httpx.Response):
            return waiting.reply
        raise waiting.reply or httpx.ReadError("nobody answered", request=request)

    def answer(self, waiting: Waiting) -> None:
        """Let the API answer truly, now; nothing is delivered yet."""
        reply = self._api.handle_request(waiting.request)
        assert isinstance(reply.stream, httpx.SyncByteStream)
        body = b"".join(reply.stream)
        if waiting.asked_at is not None:
            read = httpx.Response(reply.status_code, headers=reply.headers, content=body)
            waiting.said = _said(waiting, waiting.asked_at, read)
        # The worker unpacks it by itself.
        stream = httpx.ByteStream(body)
        waiting.reply = httpx.Response(reply.status_code, headers=reply.headers, stream=stream)

    def deliver(self, waiting: Waiting) -> None:
        with self.changed:
            self.waiting.remove(waiting)
            waiting.delivered.set()
            self.changed.notify_all()

    def break_off(self) -> None:
        """Let whatever waits go without an answer."""
        for waiting in list(self.waiting):
            waiting.reply = httpx.ReadError("broken off", request=waiting.request)
            self.deliver(waiting)


def _pool_of(url: httpx.URL) -> Pool:
    if not url.path.endswith("/users"):
        return "hinted" if current_thread().name.startswith("ask-hinted") else "user"
    return "newest" if url.params["desc"] == "true" else "page"


def _said(waiting: Waiting, asked_at: datetime, reply: httpx.Response) -> Said:
    if reply.status_code == httpx.codes.NOT_FOUND:
        return Said(asked_at, gone=waiting.cursor)
    answer = json.loads(reply.content)
    found = answer.get("items", [answer])
    return Said(asked_at, frozenset(record["id"] for record in found))


class Job(Thread):
    """Something a worker does in a thread of its own, from one answer to the next."""

    def __init__(self, name: str, work: Callable[[], object], changed: Condition) -> None:
        super().__init__(name=name)
        self.work = work
        self.changed = changed
        self.awaits: Future[Any] | None = None
        self.ended = False
        self.error: BaseException | None = None
        self.heard: set[str] = set()

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:  # noqa: BLE001 - it is what the test looks at
            self.error = error
        with self.changed:
            self.ended = True
            self.changed.notify_all()

    @property
    def rests(self) -> bool:
        """Whether it can do no more without an answer."""
        return self.ended or (self.awaits is not None and not self.awaits.done())

    @property
    def is_bug(self) -> bool:
        return self.error is not None and not isinstance(self.error, UsersSyncError)


class WatchedFetcher(Fetcher):
    """Asks as a worker does, and tells when it can do no more without an answer."""

    def __init__(self, gate: Gate, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.gate = gate
        self._asked = Counter[Pool]()
        self._of_the_gate = WeakSet[Future[Any]]()

    @property
    def rests(self) -> bool:
        """Whether all that was asked for is at the gate, or waits behind what is there."""
        there = Counter(waiting.pool for waiting in self.gate.waiting)
        return all(there[pool] == min(WIDTH[pool], self._asked[pool]) for pool in WIDTH)

    def submit_page(self, request: Request, *, newest_first: bool = False) -> Future[Page]:
        return self._counted("page", super().submit_page(request, newest_first=newest_first))

    def submit_newest(self, request: Request, limit: int) -> Future[Page]:
        return self._counted("newest", super().submit_newest(request, limit))

    def submit_user(self, user_id: str) -> Future[Single]:
        return self._counted("user", super().submit_user(user_id))

    def submit_hinted(self, user_id: str) -> Future[Single]:
        return self._counted("hinted", super().submit_hinted(user_id))

    def await_answer(self, answer: Future[Answered]) -> Answered:
        if answer not in self._of_the_gate:
            return super().await_answer(answer)  # a page that came is being read
        self._lease.renew_if_due()
        job = current_thread()
        assert isinstance(job, Job)
        with self.gate.changed:
            job.awaits = answer
            self.gate.changed.notify_all()
            self.gate.changed.wait_for(answer.done)
            job.awaits = None
        return super().await_answer(answer)

    def _counted(self, pool: Pool, answer: Future[Answered]) -> Future[Answered]:
        self._count(pool, 1)
        self._of_the_gate.add(answer)
        answer.add_done_callback(lambda _: self._count(pool, -1))
        return answer

    def _count(self, pool: Pool, change: int) -> None:
        with self.gate.changed:
            self._asked[pool] += change
            self.gate.changed.notify_all()
