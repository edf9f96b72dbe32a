"""How many users to ask for at once: what is set, what the server takes, what it can bear."""

from worker.errors import LimitRefused
from worker.model import LARGEST_PAGE, SMALLEST_PAGE

# Pages without trouble before a size that failed is tried again.
PAGES_BEFORE_GROWTH = 20


class PageSize:
    """The page size of a walk: `setting`, or less where the server takes or bears no more.

    A cap that the server names is kept for good. Trouble halves the size, and it comes back by
    doubling: with each page up to half of the size that failed first, for it may have been an
    outage; beyond that after some pages without trouble.
    """

    def __init__(self, setting: int, cap: int = LARGEST_PAGE) -> None:
        self.cap = cap
        self._setting = setting
        self._size = setting
        self._safe = setting
        self._in_trouble = False
        self._pages = 0

    @property
    def limit(self) -> int:
        """How many users to ask for, in general."""
        return min(self._size, self.cap)

    def limit_for(self, times: int) -> int:
        """How many users to ask for where a page needs `times` as many as usual to get on."""
        return min(self._size * times, self.cap)

    def learn_cap(self, refused: LimitRefused, limit: int) -> None:
        """Ask for less than `limit`, which was refused. Raises `refused` if that is too few.

        If the server names no cap below `limit`, half of it is tried.
        """
        named = refused.largest if refused.largest and refused.largest < limit else None
        if (named or limit // 2) < SMALLEST_PAGE:
            raise refused
        if named:
            self.cap = min(self.cap, named)
        else:
            self._size = self._safe = limit // 2

    def shrink(self) -> None:
        """Ask for half as many: the server failed in a way that a smaller page may not."""
        half = max(SMALLEST_PAGE, self.limit // 2)
        if not self._in_trouble:
            self._safe = half
        self._in_trouble = True
        self._size, self._pages = half, 0

    def succeeded(self) -> None:
        """Take in that a page came, and ask for more again if there was trouble before."""
        self._in_trouble = False
        self._pages += 1
        if self._size < self._safe:
            self._size = min(2 * self._size, self._safe)
        elif self._size < self._setting and self._pages >= PAGES_BEFORE_GROWTH:
            self._size = self._safe = min(2 * self._size, self._setting)
            self._pages = 0
