"""The chain: pages one after another, each proven to continue the one before.

The list lies when its cursor's user was deleted, hidden or moved: it answers a clean end, or skips
users. So each page is asked for with the second-last user of the page before, and it counts only if
it begins with that user and the last one, or with the last one, where they stood before. Servers
differ in whether a page begins with the cursor's user or behind it: both prove the same.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from worker.errors import SweepIncomplete
from worker.model import Key, Page, Place, Places, last_key
from worker.sync.mirror import Span

# Finding the way back takes a step for each doubling of a page's length, and of the mirror's.
MAX_RECOVERIES = 60

PairsBefore = Callable[[Key], Iterator[tuple[Key, Key]]]
"""Finds pairs of neighbours that the walk meets before a key, in its direction, nearest first."""


def no_pairs(_key: Key) -> Iterator[tuple[Key, Key]]:
    """Know no neighbours: the way back leads to the start of the list."""
    return iter(())


class Pair(NamedTuple):
    """Two neighbours of the list: a page is asked for with the first and goes on behind the second.

    Where both stand as they did, no user between the two pages was skipped.
    """

    cursor: Place
    last: Place


@dataclass(frozen=True, slots=True)
class Request:
    """Where the next page is asked for: the pair it must continue, and how far the list is known.

    Without a pair it is the start of the list. `widen` multiplies the page size.
    """

    pair: Pair | None = None
    after: Key | None = None
    widen: int = 1

    @property
    def cursor(self) -> str | None:
        return self.pair.cursor.id if self.pair else None


class Chain:
    """One walk over the list; says what to ask for, and which span an answer proves.

    `pairs_before` finds neighbours in the mirror. `resume_at` is the key of the last user of an
    earlier, unfinished walk. With `newest_first` the list is walked from its end, and the spans
    run downwards.
    """

    def __init__(
        self,
        pairs_before: PairsBefore = no_pairs,
        resume_at: Key | None = None,
        *,
        newest_first: bool = False,
    ) -> None:
        self.ended = False
        self.recoveries = 0
        self.request = Request() if resume_at is None else _resumed(resume_at, pairs_before)
        self._newest_first = newest_first
        self._pairs_before = pairs_before
        self._furthest = resume_at
        self._without_progress = 0
        self._ways_back = _from_mirror(resume_at, pairs_before)

    def take(self, page: Page) -> Span | None:
        """Return the span that this answer to `request` proves, or None if it proves nothing.

        Afterwards `request` is what to ask next, unless the walk has `ended`. Raises
        SweepIncomplete if too many answers in a row brought the walk no further.
        """
        if not self._proven(page):
            self._go_back()
            return None
        if page.next_cursor is not None and not self._goes_on(page.places):
            self._widen()
            return None
        return self._advance(page)

    def _proven(self, page: Page) -> bool:
        pair, places = self.request.pair, page.places
        continues = pair is None or _begins(places, pair) or _begins(places, [pair.last])
        return continues and (page.descending if self._newest_first else page.ascending)

    def _goes_on(self, places: Places) -> bool:
        """Whether the page brings the walk on; else a larger one is needed."""
        pair = self.request.pair
        goes_on = last_key(places) is not None if pair is None else places[-1] != pair.last
        return len(places) > 1 and goes_on

    def _advance(self, page: Page) -> Span:
        after = self.request.after
        reached = self._further(after, last_key(page.places))
        self.ended = page.next_cursor is None
        if reached == after and not self.ended:
            # Only records without a key: a server may go round in circles with those.
            self._count_recovery()
        if reached is not None and self._further(self._furthest, reached) != self._furthest:
            self._furthest = reached
            self._without_progress = 0
        if self.ended:
            self.request = Request(self.request.pair, reached)
        else:
            self.request = Request(Pair(page.places[-2], page.places[-1]), reached)
            self._ways_back = _through(page.places, self._pairs_before)
        return Span(after, None if self.ended else reached)

    def _further(self, *keys: Key | None) -> Key | None:
        """Give the key that is the furthest in the direction of the walk."""
        furthest = min if self._newest_first else max
        return furthest((key for key in keys if key is not None), default=None)

    def _go_back(self) -> None:
        self._count_recovery()
        self.request = next(self._ways_back)

    def _widen(self) -> None:
        """Ask for more: the page held only the pair, yet the list goes on."""
        self._count_recovery()
        request = self.request
        self.request = Request(request.pair, request.after, request.widen * 2)

    def _count_recovery(self) -> None:
        self.recoveries += 1
        self._without_progress += 1
        if self._without_progress > MAX_RECOVERIES:
            raise SweepIncomplete(
                f"{MAX_RECOVERIES} answers of the users list in a row did not continue the walk"
                f" behind {self._furthest[1] if self._furthest else 'its start'}"
            )


def _begins(places: Places, chain: Sequence[Place]) -> bool:
    return len(places) >= len(chain) and all(places[n] == each for n, each in enumerate(chain))


def _resumed(at: Key, pairs_before: PairsBefore) -> Request:
    """Go on behind this key, with the nearest neighbour that is known; else at the start."""
    nearest = next(pairs_before(at), None)
    return _behind(nearest[1], at) if nearest else Request()


# No methods: a generator that knows the walk, which knows the generator, would keep a page in
# memory until the next garbage collection.


def _through(places: Places, pairs_before: PairsBefore) -> Iterator[Request]:
    """Step back through the page before, ever further, then leave it for the mirror."""
    step = 1
    while step + 2 <= len(places):
        cursor, last = places[-2 - step], places[-1 - step]
        if last.key is not None:
            yield Request(Pair(cursor, last), last.key)
        step *= 2
    first = next((key for n in range(len(places)) if (key := places[n].key) is not None), None)
    yield from _from_mirror(first, pairs_before)


def _from_mirror(key: Key | None, pairs_before: PairsBefore) -> Iterator[Request]:
    """Step back through the live rows before a key, ever further; then to the start of the list."""
    for cursor, last in pairs_before(key) if key else ():
        yield _behind(cursor, last)
    while True:
        yield Request()


def _behind(cursor: Key, last: Key) -> Request:
    return Request(Pair(Place(cursor[1], cursor[0]), Place(last[1], last[0])), last)
