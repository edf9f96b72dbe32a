"""The newest users, at once: mostly one cheap request that adds and updates, and never deletes."""

from dataclasses import dataclass, field

from worker.model import Page
from worker.store import Store
from worker.sync.apply import PageApplier
from worker.sync.cache import Cache
from worker.sync.chain import Chain
from worker.sync.fetcher import Fetcher
from worker.sync.state import SweepState, beside_sweeps

# Behind so many strangers the next sweep is quicker: each page with a cursor costs the server a
# look at all users before it.
MOST_STRANGERS = 10_000
# Nor is it worth looking for the way back for as long as a sweep does.
MOST_RECOVERIES = 8


@dataclass(slots=True)
class Poll:
    """Looks at the newest users; `size` is how many at first, `cold` that no sweep was complete.

    Where a page is full of strangers, there are probably more behind it: the poll goes on as a walk
    from the newest user, with the page size of a sweep, until it meets a known user.
    """

    fetcher: Fetcher
    store: Store
    cache: Cache
    size: int
    cold: bool
    _met: set[str] = field(default_factory=set)

    def run(self) -> SweepState:
        """Bring the newest users into the table; returns what was found.

        Raises SourceUnavailable, DatabaseUnavailable, LeaseLost, MirrorOutdated, Misconfigured or
        Stopped.
        """
        state = beside_sweeps(self.store, self.cache)
        chain, limit = Chain(newest_first=True), self.size
        while self._look(state, chain, limit):
            limit = max(self.size, self.fetcher.page_size.limit)
        return state

    def _look(self, state: SweepState, chain: Chain, limit: int) -> bool:
        """Take in one page; says whether to go on."""
        at = self.store.database.clock.now()
        self.cache.asked(at)
        try:
            page = self.fetcher.await_answer(self.fetcher.submit_newest(chain.request, limit))
            with self.cache.lock:
                proven, strangers = chain.take(page) is not None, self._are_strangers(page)
                # An unproven page says nothing about those behind it: ask again from further back.
                goes_on = (strangers or not proven) and self._is_worth_it(chain)
                applier = PageApplier(self.store, state)
                applier.write(applier.compare(page, None))
            return goes_on
        finally:
            self.cache.answered(at)

    def _is_worth_it(self, chain: Chain) -> bool:
        """Whether to ask for another page. Back at the start there is nothing to do."""
        few = len(self._met) < MOST_STRANGERS and chain.recoveries <= MOST_RECOVERIES
        return few and not chain.ended and chain.request.pair is not None and not self.cold

    def _are_strangers(self, page: Page) -> bool:
        """Whether all users of the page are unknown, apart from those whom this poll met before."""
        new = page.ids - self._met
        self._met |= new
        return new.isdisjoint(self.cache.quarantined) and not any(
            user.key in self.cache.mirror for user in page.users if user.id in new
        )
