"""Asks the API in the background, and keeps the lease alive while an answer is awaited."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from threading import Event
from typing import Any, Protocol, TypeVar

import structlog

from worker.errors import LimitRefused, SourceUnavailable, Stopped, Transient
from worker.model import Page, Single
from worker.retry import Retry
from worker.sync.api_time import ApiTime, Purpose
from worker.sync.chain import Request
from worker.sync.page_size import PageSize

log = structlog.stdlib.get_logger(__name__)

# Proofs are asked for side by side; one process serves the API, so more would only queue there.
THREADS = 4

# How soon a stop is noticed while an answer is awaited.
GLANCE_SECONDS = 0.25


Answered = TypeVar("Answered", Page, Single)


class Api(Protocol):
    """What is asked of the users API; each call is one attempt."""

    def fetch_page(self, cursor: str | None, limit: int, *, newest_first: bool = False) -> Page: ...

    def fetch_user(self, user_id: str) -> Single: ...

    def fetch_active(self, limit: int) -> Page: ...

    def create_user(self, fields: Mapping[str, Any]) -> str: ...


class Renewed(Protocol):
    """What must be kept alive while waiting."""

    def renew_if_due(self) -> None: ...


class NoLease:
    """Nothing to renew: for commands that work without the lease."""

    def renew_if_due(self) -> None:
        pass


def _at_once(_purpose: Purpose) -> None:
    """Ask without waiting for a turn."""


class Fetcher:
    """The users API with retries, in threads of its own: ask first, wait for the answer later.

    `take_turn` is called before each request, and returns when it may be sent.
    """

    def __init__(
        self,
        api: Api,
        retry: Retry,
        *,
        page_size: PageSize,
        lease: Renewed,
        take_turn: Callable[[Purpose], None] = _at_once,
    ) -> None:
        self.page_size = page_size
        self.api_time = ApiTime()
        # How many users were asked for one by one, as proofs are.
        self.users_asked = 0
        self._api = api
        self._retry = retry
        self._lease = lease
        self._take_turn = take_turn
        # A poll queues behind nothing that a sweep asks for. And each thread keeps for good what
        # memory its largest page took, so one thread reads all the pages of a sweep.
        self._pages = ThreadPoolExecutor(1, thread_name_prefix="ask-page")
        self._newest = ThreadPoolExecutor(1, thread_name_prefix="ask-newest")
        self._users = ThreadPoolExecutor(THREADS, thread_name_prefix="ask-user")
        # Nor does a hint queue behind the suspects of a sweep.
        self._hinted = ThreadPoolExecutor(THREADS, thread_name_prefix="ask-hinted")

    @property
    def stop(self) -> Event:
        return self._retry.stop

    def submit_page(self, request: Request, *, newest_first: bool = False) -> Future[Page]:
        """Begin to fetch a page, with retries."""
        fetch = partial(self._fetch, self.page_size, request, "sweep", newest_first=newest_first)
        return self._pages.submit(self._retry.call, fetch)

    def submit_newest(self, request: Request, limit: int) -> Future[Page]:
        """Begin to fetch up to `limit` users, newest first, with retries.

        Without a cursor this is cheap for the server.
        """
        size = PageSize(limit, self.page_size.cap)
        fetch = partial(self._fetch, size, request, "poll", newest_first=True)
        return self._newest.submit(self._retry.call, fetch)

    def submit_user(self, user_id: str) -> Future[Single]:
        """Begin to fetch one user, with retries."""
        self.users_asked += 1
        return self._users.submit(
            self._retry.call,
            lambda: self._in_turn("sweep", lambda: self._api.fetch_user(user_id)),
        )

    def submit_hinted(self, user_id: str) -> Future[Single]:
        """Begin to fetch a user who was hinted at, with retries."""
        self.users_asked += 1
        return self._hinted.submit(
            self._retry.call,
            lambda: self._in_turn("hint", lambda: self._api.fetch_user(user_id)),
        )

    def submit_active(self, limit: int) -> Future[Page]:
        """Begin to fetch the users who were active last, with retries."""
        return self._hinted.submit(
            self._retry.call,
            lambda: self._in_turn("poll", lambda: self._api.fetch_active(limit)),
        )

    def create_user(self, fields: Mapping[str, Any]) -> str:
        """Create a user, in one attempt: a second one might create another. Returns the id.

        Raises Misconfigured, SourceUnavailable or Stopped; SourceUnavailable says if it is not
        known whether the user was created.
        """
        try:
            return self._api.create_user(fields)
        except Transient as error:
            raise SourceUnavailable(str(error)) from error

    def await_answer(self, answer: Future[Answered]) -> Answered:
        """Wait for an answer. Raises what asking raised, Stopped, LeaseLost or MirrorOutdated."""
        self._lease.renew_if_due()
        while not wait([answer], GLANCE_SECONDS).done:
            if self.stop.is_set():
                raise Stopped("asked to stop")
            self._lease.renew_if_due()
        return answer.result()

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Ask for one thing after the other inside the block, in a thread that ends with it.

        What that thread logs is about the same project as what this one does.
        """
        before = self._pages, self._newest, self._users, self._hinted
        pool = _SameContext(1, thread_name_prefix="ask")
        self._pages = self._newest = self._users = self._hinted = pool
        try:
            yield
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._pages, self._newest, self._users, self._hinted = before

    def close(self) -> None:
        """Ask for nothing more; a request in flight ends when the stop is set."""
        for pool in (self._pages, self._newest, self._users, self._hinted):
            pool.shutdown(wait=False, cancel_futures=True)

    def _in_turn(self, purpose: Purpose, ask: Callable[[], Answered]) -> Answered:
        """Ask when it is our turn: waiting for that is no work of the API's."""
        self._take_turn(purpose)
        return self.api_time.measured(purpose, ask)

    def _fetch(
        self, size: PageSize, request: Request, purpose: Purpose, *, newest_first: bool
    ) -> Page:
        """Fetch as many users as the server takes and bears; what it says of that is learnt."""
        while True:
            limit = size.limit_for(request.widen)
            try:
                page = self._in_turn(
                    purpose,
                    lambda: self._api.fetch_page(
                        request.cursor,
                        limit,  # noqa: B023  it is called at once
                        newest_first=newest_first,
                    ),
                )
            except LimitRefused as refused:
                size.learn_cap(refused, limit)
                self.page_size.cap = min(self.page_size.cap, size.cap)
                log.info("page.capped", refused=limit, cap=size.limit)
            except Transient as error:
                if error.too_much:
                    size.shrink()
                raise
            else:
                size.succeeded()
                return page


class _SameContext(ThreadPoolExecutor):
    """Threads that know what the one that hands them work knows."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(copy_context().run, fn, *args, **kwargs)
