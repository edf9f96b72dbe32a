"""Walks the users list page by page, from its start to its proven end."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial

import structlog

from worker.errors import UpdatesRefused
from worker.model import Key, Page, key_before
from worker.sync.apply import Change, PageApplier
from worker.sync.chain import Chain
from worker.sync.fetcher import Fetcher
from worker.sync.mirror import Span
from worker.sync.state import SweepState
from worker.tracing import traced

log = structlog.stdlib.get_logger(__name__)

# A page that changes nothing writes a checkpoint at most this often.
CHECKPOINT_SECONDS = 30.0

# A list of fewer pages is walked from its start: there is little to save.
OUTWARDS_PAGES = 16


@dataclass(frozen=True, slots=True)
class Requested:
    """A page under way, and a moment not later than that at which it was requested."""

    at: datetime
    answer: Future[Page]


@dataclass(frozen=True, slots=True)
class Proven:
    """What a page proves: the span, and up to where all is read from the start of the list on."""

    span: Span
    reached: Key | None


@dataclass(slots=True)
class Walk:
    """One walk over the list. `on_page` is called after each page, for a progress display.

    For a page the server reads every row behind its cursor. So a walk through a long list goes
    outwards, from the middle of what is known: down to the start, then up to the end. That is half
    of the rows. The way down leaves no checkpoint: a walk that is stopped there begins again. One
    that goes on from a checkpoint goes up, and so does one that is not to go `outwards`.
    """

    fetcher: Fetcher
    applier: PageApplier
    on_page: Callable[[SweepState], None]
    outwards: bool = True
    chain: Chain = field(init=False)
    # Where the way up begins; None on it.
    _middle: Key | None = field(init=False)
    _reached: Key | None = field(init=False)
    _checkpoint_at: float = field(init=False)
    _under_way: list[Requested] = field(default_factory=list)
    _refusal: UpdatesRefused | None = None

    def __post_init__(self) -> None:
        self._reached = self.state.resume_at
        with self.state.cache.lock:
            self._begin()
        self._checkpoint_at = self._monotonic()

    def _begin(self) -> None:
        state, mirror = self.state, self.state.mirror
        least = OUTWARDS_PAGES * self.fetcher.page_size.limit
        goes_up = state.resume_at is not None or not self.outwards
        middle = None if goes_up else mirror.middle(least)
        if middle is None:
            self._middle, self.chain = None, Chain(mirror.pairs_before, state.resume_at)
            return
        self._middle, above = middle
        state.lowest = state.furthest = self._middle
        self.chain = Chain(mirror.pairs_after, above, newest_first=True)

    @property
    def state(self) -> SweepState:
        return self.applier.state

    def run(self) -> None:
        """Walk to the proven end of the list; then retry the users whom the database refused.

        One page is fetched while the one before is written. Raises SweepIncomplete, and whatever
        fetching and writing raise.
        """
        requested: Requested | None = self._request()
        try:
            while requested is not None:
                requested = self._step(requested)
        finally:
            # What is still under way is not waited for: nothing has to be remembered for it.
            self._forget(*self._under_way)
        if self._refusal is not None:
            raise self._refusal
        self.applier.retry_refused()

    def _step(self, requested: Requested) -> Requested | None:
        """Await a page and apply it; returns the next one, unless the list has ended."""
        with traced("page") as note:
            page = self.fetcher.await_answer(requested.answer)
            self.state.count_api_time(self.fetcher.api_time.of("sweep"))
            proven = self._prove(page)
            note(users=len(page.users), proven=proven is not None)
            if proven is None:
                ahead = self._request_next()
            else:
                with self.state.cache.lock:
                    change = self.applier.compare(page, proven.span)
                    # Only now: to read the next page slows comparing, but not the database.
                    ahead = self._request_next()
                    self._write(change, proven.reached)
                self.on_page(self.state)
            self._forget(requested)
            return ahead

    def save_checkpoint(self) -> None:
        """Write the checkpoint now: what was applied, not what was requested since."""
        if self._reached is not None:
            statement = self.applier.checkpoint(self._reached)
            self.applier.store.write([statement], self.state.number)

    def _request_next(self) -> Requested | None:
        return None if self.chain.ended else self._request()

    def _request(self) -> Requested:
        """Request the next page; from now on its answer may be older than others."""
        at = self.state.cache.asked(self.applier.store.database.clock.now())
        requested = Requested(
            at,
            self.fetcher.submit_page(self.chain.request, newest_first=self._middle is not None),
        )
        self._under_way.append(requested)
        return requested

    def _forget(self, *requests: Requested) -> None:
        for each in requests:
            each.answer.cancel()
            self.state.cache.answered(each.at)
            self._under_way.remove(each)

    def _prove(self, page: Page) -> Proven | None:
        """Say what the page proves, None if nothing; at the start of the list turn round."""
        with self.state.cache.lock:
            span = self.chain.take(page)
            if span is None:
                pair = self.chain.request.pair
                log.info("walk.recovered", behind=pair and pair.last.id)
                return None
            middle = self._middle
            if middle is None:
                return Proven(span, self.chain.request.after)
            if not self.chain.ended:
                return Proven(_downwards(span, middle, ended=False), None)
            self._middle, self.chain = None, Chain(self.state.mirror.pairs_before, middle)
            return Proven(_downwards(span, middle, ended=True), middle)

    def _write(self, change: Change, reached: Key | None) -> None:
        """Write a page. Where the table takes no updates, later pages may still have new users."""
        checkpoint = []
        if reached is not None and self._refusal is None:
            checkpoint = [partial(self.applier.checkpoint, reached)]
        # In quiet mode, where the database is awake anyway.
        awake = self.applier.store.lease.held
        due = awake and self._monotonic() - self._checkpoint_at >= CHECKPOINT_SECONDS
        try:
            if self.applier.write(change, checkpoint, extras_are_due=due):
                self._checkpoint_at = self._monotonic()
        except UpdatesRefused as error:
            self._refusal = error
        if self._refusal is None:
            self._reached = reached

    def _monotonic(self) -> float:
        return self.applier.store.database.clock.monotonic()


def _downwards(span: Span, middle: Key, *, ended: bool) -> Span:
    """Turn a span of the way down: from just below the page's last user to just below its first.

    Above the middle a page proves nothing: that is read on the way up. A span whose ends meet is
    empty.
    """
    high = middle if span.after is None else min(middle, key_before(span.after))
    if ended:
        return Span(None, high)
    return Span(high if span.upto is None else key_before(span.upto), high)
