"""How many users to ask for at once: what is set, what the server takes, what it can bear."""

from worker.errors import LimitRefused

# More users in one answer make a server without a cap fail: it runs out of bind parameters.
LARGEST = 30_000

# A page may begin with the two users that prove the chain, and needs a third to get on.
SMALLEST = 3

# Pages without trouble before a size that failed is tried again.
PAGES_OF_PEACE = 20


class PageSize:
    """The page size of a sweep: `setting`, or less where the server takes or bears no more.

    A cap that the server names is kept for good. Trouble halves the size; it comes back in steps.
    """

    def __init__(self, setting: int) -> None:
        self.cap = LARGEST
        self.limit = setting
        self._setting = setting
        self._peaceful_pages = 0

    def widened(self, times: int) -> int:
        """Give the size for a page that needs more users than usual to get on."""
        return min(self.limit * times, self.cap)

    def capped(self, limit: int) -> int:
        """Give how many of so many users can be asked for at once."""
        return min(limit, self.cap)

    def learn_cap(self, refused: LimitRefused, limit: int) -> None:
        """Ask for less from now on. Raises `refused` where there is no less to ask for.

        `limit` is what was refused. A server that names no smaller one gets half.
        """
        named = refused.largest
        cap = named if named is not None and named < limit else limit // 2
        if cap < SMALLEST:
            raise refused
        self.cap = min(self.cap, cap)
        self.limit = min(self.limit, self.cap)

    def shrink(self) -> None:
        """Ask for half as many: the server failed in a way that a smaller page may not."""
        self.limit = max(SMALLEST, self.limit // 2)
        self._peaceful_pages = 0

    def succeeded(self) -> None:
        """Ask for twice as many again after some pages without trouble."""
        most = min(self._setting, self.cap)
        self._peaceful_pages += 1
        if self.limit < most and self._peaceful_pages >= PAGES_OF_PEACE:
            self.limit = min(2 * self.limit, most)
            self._peaceful_pages = 0
