"""The chain: pages one after another, each proven to continue the one before.

The list lies when its cursor's user was deleted, hidden or moved: it answers a clean end, or skips
users. So the cursor is always the last user of the page before, and a page counts only if it begins
with that very user at that very place.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from worker.errors import SweepIncomplete
from worker.mirror import Span
from worker.model import Key, Place

# Finding the way back takes a step for each doubling of a page's length, and two more.
MAX_RECOVERIES = 60

# More users in one answer make the server fail: it runs out of bind parameters.
MAX_LIMIT = 30_000

Below = Callable[[Key], Key | None]
"""Finds the nearest key of the mirror below a key."""


class Outlined(Protocol):
    """A page, or what it says of its place in the list.

    Everything is as in `Page`.
    """

    @property
    def first(self) -> Place | None: ...

    @property
    def last(self) -> Place | None: ...

    @property
    def end(self) -> Key | None: ...

    @property
    def ascending(self) -> bool: ...

    @property
    def next_cursor(self) -> str | None: ...

    def key(self, number: int) -> Key | None: ...


@dataclass(frozen=True, slots=True)
class Request:
    """Where the next page is asked for: the user it must begin with, and how far the list is known.

    Without a cursor it is the start of the list. `widen` multiplies the page size.
    """

    cursor: Place | None = None
    after: Key | None = None
    widen: int = 1


class Walk:
    """One walk over the list; says what to ask for, and which span an answer proves.

    `below` finds the nearest key of the mirror below a key, None if there is none. `resume_at` is
    the key of the last user of an earlier, unfinished walk.
    """

    def __init__(self, below: Below, resume_at: Key | None = None) -> None:
        self.ended = False
        self.recoveries = 0
        self.request = Request() if resume_at is None else _request_at(resume_at)
        self._below = below
        self._furthest = resume_at
        self._without_progress = 0
        self._ways_back = _from_mirror(resume_at, below)

    def take(self, page: Outlined) -> Span | None:
        """Return the span that this answer to `request` proves, or None if it proves nothing.

        Afterwards `request` is what to ask next, unless the walk has `ended`. Raises
        SweepIncomplete if too many answers in a row brought the walk no further.
        """
        if not self._proven(page):
            self._go_back()
            return None
        if page.next_cursor is not None and page.last == self.request.cursor:
            self._widen()
            return None
        return self._advance(page)

    def _proven(self, page: Outlined) -> bool:
        begins = self.request.cursor is None or page.first == self.request.cursor
        return begins and page.ascending

    def _advance(self, page: Outlined) -> Span:
        after = self.request.after
        reached = max((key for key in (after, page.end) if key), default=None)
        self.ended = page.next_cursor is None
        if reached == after and not self.ended:
            # Only records without a key: a server may go round in circles with those.
            self._count_recovery()
        if reached is not None and (self._furthest is None or reached > self._furthest):
            self._furthest = reached
            self._without_progress = 0
        self.request = Request(page.last, reached)
        self._ways_back = _through(page, self._below)
        return Span(after, None if self.ended else reached)

    def _go_back(self) -> None:
        self._count_recovery()
        self.request = next(self._ways_back)

    def _widen(self) -> None:
        """Ask for more: the page held nobody but the chain user, yet the list goes on."""
        self._count_recovery()
        request = self.request
        self.request = Request(request.cursor, request.after, request.widen * 2)

    def _count_recovery(self) -> None:
        self.recoveries += 1
        self._without_progress += 1
        if self._without_progress > MAX_RECOVERIES:
            raise SweepIncomplete(
                f"{MAX_RECOVERIES} answers of the users list in a row did not continue the walk"
                f" behind {self._furthest[1] if self._furthest else 'its start'}"
            )


# No methods: a generator that knows the walk, which knows the generator, would keep a page in
# memory until the next garbage collection.


def _through(page: Outlined, below: Below) -> Iterator[Request]:
    """Step back through the page before, ever further, then leave it for the mirror."""
    step = 1
    while (key := page.key(-1 - step)) is not None:
        yield _request_at(key)
        step *= 2
    yield from _from_mirror(page.key(0), below)


def _from_mirror(key: Key | None, below: Below) -> Iterator[Request]:
    """Begin behind the nearest live row we know of, or else at the start of the list."""
    nearest = None if key is None else below(key)
    if nearest is not None:
        yield _request_at(nearest)
    while True:
        yield Request()


def _request_at(key: Key) -> Request:
    return Request(Place(key[1], key[0]), key)


class PageSize:
    """How many users to ask for at once: a fixed number, or tuned by what the server shows.

    Large pages are cheaper for the server, which reads all rows behind a cursor for each page; too
    large ones exhaust its memory, and time-outs.
    """

    FIRST = 2_000
    LARGEST = 10_000
    SMALLEST = 2
    TARGET_BYTES = 8_000_000
    # Less than this is noise, and not worth the server's memory.
    WORTHWHILE_GAIN = 1.05
    # So quick a page says little about its size, and has room for more.
    QUICK_SECONDS = 0.25
    # The first page of a list is cheaper than any other: a size without a gain is tried once more.
    CHANCES = 2
    # One process serves the API: a poll waits behind a page, so it should not wait for long.
    FRESH_SECONDS = 0.5
    # But where a page is slow for the rows behind its cursor, a smaller one is hardly any quicker.
    LEAST_SHARE_OF_SPEED = 0.5
    # Pages without trouble before a size that failed is tried again.
    PAGES_OF_PEACE = 20

    def __init__(self, setting: int | str) -> None:
        self.fixed = isinstance(setting, int)
        self.limit = setting if isinstance(setting, int) else self.FIRST
        self._best_rate = 0.0
        self._best_limit = self.limit
        self._chances = self.CHANCES
        self._peaceful_pages = 0
        self._top_rate = 0.0
        self._grown_from = (0, 0.0)
        self.keep_polls_fresh = False

    def learn(self, users: int, size: int, seconds: float) -> None:
        """Take in how long a page of `users` users and `size` bytes took."""
        if self.fixed or users < self.limit:
            return
        self._peaceful_pages += 1
        rate = users / max(seconds, 1e-6)
        most = min(self.LARGEST, int(self.TARGET_BYTES * users / max(size, 1)))
        self._compare(rate, seconds)
        if self.keep_polls_fresh:
            self._keep_fresh(users, rate)
        self._top_rate = max(self._top_rate, rate)
        self.limit = max(self.SMALLEST, min(self.limit, most))

    def _keep_fresh(self, users: int, rate: float) -> None:
        """Bound how long a page takes, unless too much speed is lost by that."""
        users_before, rate_before = self._grown_from
        if users > 1.5 * users_before and rate < 1.2 * rate_before:
            # Not the rows behind the cursor are what costs time: the server has become slower.
            self._top_rate = rate
        worth_it = int(users * self.LEAST_SHARE_OF_SPEED * self._top_rate / rate)
        fresh = max(int(rate * self.FRESH_SECONDS), worth_it)
        self.limit = max(min(self.limit, fresh), min(worth_it, 2 * users))
        self._grown_from = (users, rate) if worth_it > users else (0, 0.0)

    def _compare(self, users_per_second: float, seconds: float) -> None:
        """Go on growing after a gain; without one go back to the size that was best."""
        gain = users_per_second > self._best_rate * self.WORTHWHILE_GAIN
        if self._chances and not gain and seconds >= self.QUICK_SECONDS:
            self._chances -= 1
            self._best_rate, self.limit = 0.0, self._best_limit
        elif self._chances or self._peaceful_pages >= self.PAGES_OF_PEACE:
            self._chances, self._peaceful_pages = self._chances or self.CHANCES, 0
            self._best_rate, self._best_limit = users_per_second, self.limit
            self.limit *= 2

    def shrink(self) -> None:
        """Ask for half as many: the server failed in a way that a smaller page may not."""
        if not self.fixed:
            self.limit = max(self.SMALLEST, self.limit // 2)
            self._chances = 0
            self._peaceful_pages = 0
