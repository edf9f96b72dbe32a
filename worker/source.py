"""Asks the API in the background, and keeps the lease alive while an answer is awaited."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Protocol, TypeVar

import structlog

from worker.api_time import ApiTime, Purpose
from worker.errors import LimitRefused, SourceUnavailable, Stopped, Transient
from worker.model import Page, Single
from worker.outline import Arrival, Outline
from worker.page_size import PageSize
from worker.retry import Retry
from worker.walk import Request

log = structlog.stdlib.get_logger(__name__)

# Proofs are asked for side by side; one process serves the API, so more would only queue there.
THREADS = 4

# How soon a stop is noticed while an answer is awaited.
GLANCE_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Arrived:
    """A page that came; `page` is all of it, which is still being read."""

    outline: Outline | Page
    page: Future[Page]


Answered = TypeVar("Answered", Page, Single, Arrived)
Listed = TypeVar("Listed", Page, Arrival)


class Api(Protocol):
    """What is asked of the users API; each call is one attempt."""

    def fetch_page(self, cursor: str | None, limit: int, *, newest_first: bool = False) -> Page: ...

    def fetch_arrival(self, cursor: str | None, limit: int) -> Arrival: ...

    def fetch_user(self, user_id: str) -> Single: ...


class Renewed(Protocol):
    """What must be kept alive while waiting."""

    def renew_if_due(self) -> None: ...


class Source:
    """The users API with retries, in threads of its own: ask first, wait for the answer later."""

    def __init__(self, api: Api, retry: Retry, *, page_size: PageSize, lease: Renewed) -> None:
        self.page_size = page_size
        self.api_time = ApiTime()
        self._api = api
        self._retry = retry
        self._lease = lease
        # A poll queues behind nothing that a sweep asks for. And each thread keeps for good what
        # memory its largest page took, so one thread reads all the pages of a sweep.
        self._pages = ThreadPoolExecutor(1, thread_name_prefix="ask-page")
        self._readers = ThreadPoolExecutor(1, thread_name_prefix="read-page")
        self._newest = ThreadPoolExecutor(1, thread_name_prefix="ask-newest")
        self._users = ThreadPoolExecutor(THREADS, thread_name_prefix="ask-user")

    @property
    def stop(self) -> Event:
        return self._retry.stop

    def ask_page(self, request: Request) -> Future[Arrived]:
        """Begin to fetch a page, with retries; it is read while the next one is asked for."""
        return self._pages.submit(self._retry.call, lambda: self._fetch_page(request))

    def ask_newest(self, request: Request, limit: int) -> Future[Page]:
        """Begin to fetch up to `limit` users, newest first, with retries; no cursor is cheap."""
        return self._newest.submit(self._retry.call, lambda: self._fetch_newest(request, limit))

    def ask_user(self, user_id: str) -> Future[Single]:
        """Begin to fetch one user, with retries."""
        return self._users.submit(self._retry.call, lambda: self._fetch_user(user_id))

    def await_answer(self, answer: Future[Answered]) -> Answered:
        """Wait for an answer. Raises what asking raised, Stopped, LeaseLost or MirrorOutdated."""
        self._lease.renew_if_due()
        while not wait([answer], GLANCE_SECONDS).done:
            if self.stop.is_set():
                raise Stopped("asked to stop")
            self._lease.renew_if_due()
        return answer.result()

    def close(self) -> None:
        """Ask for nothing more; a request in flight ends when the stop is set."""
        for pool in (self._pages, self._readers, self._newest, self._users):
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetch_page(self, request: Request) -> Arrived:
        try:
            arrival = self._within_cap(
                lambda: self.page_size.widened(request.widen),
                lambda limit: self._api.fetch_arrival(request.cursor, limit),
                "sweep",
            )
        except Transient as error:
            if error.too_much:
                self.page_size.shrink()
            raise
        self.page_size.succeeded()
        return Arrived(arrival.outline, self._readers.submit(read, arrival.read))

    def _fetch_newest(self, request: Request, limit: int) -> Page:
        return self._within_cap(
            lambda: self.page_size.capped(limit * request.widen),
            lambda most: self._api.fetch_page(request.cursor, most, newest_first=True),
            "poll",
        )

    def _fetch_user(self, user_id: str) -> Single:
        return self.api_time.measured("sweep", lambda: self._api.fetch_user(user_id))

    def _within_cap(
        self, limit: Callable[[], int], fetch: Callable[[int], Listed], purpose: Purpose
    ) -> Listed:
        """Fetch up to `limit` users; if the server gives fewer at once, learn it and ask again."""
        while True:
            asked = limit()
            try:
                return self.api_time.measured(purpose, partial(fetch, asked))
            except LimitRefused as refused:
                self.page_size.learn_cap(refused, asked)
                log.info("page.capped", refused=asked, cap=self.page_size.cap)


def read(page: Callable[[], Page]) -> Page:
    """Read a page that came. To ask for it again is of no use. Raises SourceUnavailable."""
    try:
        return page()
    except Transient as error:
        raise SourceUnavailable(str(error)) from error
