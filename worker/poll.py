"""The newest users, at once: one cheap request that adds and updates, and never deletes."""

from collections.abc import Callable
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from worker.findings import Findings
from worker.memory import Memory
from worker.model import Page
from worker.reading import Reading
from worker.source import Source
from worker.store import Store

# When every user of a page is a stranger there are probably more behind it.
GROWTH = 4
LARGEST = 10_000


@dataclass(slots=True)
class Poll:
    """Looks at the newest users; `size` is how many at first, `cold` that no sweep was complete."""

    source: Source
    store: Store
    memory: Memory
    size: int
    cold: bool

    def run(self) -> Findings:
        """Bring the newest users into the table; returns what was found.

        Raises SourceUnavailable, DatabaseUnavailable, LeaseLost, MirrorOutdated, Misconfigured or
        Stopped.
        """
        findings = Findings(
            # What a poll writes counts for the sweep before it; it takes no number of its own.
            number=max(1, self.store.lease.sweep),
            kind="poll",
            started=self.store.database.clock.now(),
            memory=self.memory,
            generation=self.memory.generation,
        )
        limit, met = self.size, set[str]()
        while True:
            page, strangers = self._look(findings, limit, met)
            if not strangers or self.cold or limit >= LARGEST:
                return findings
            met |= page.ids
            limit = min(limit * GROWTH, LARGEST)

    def _look(self, findings: Findings, limit: int, met: AbstractSet[str]) -> tuple[Page, bool]:
        """Take in one page; says whether it was full of strangers, and the list goes on.

        Whom this poll has `met` on a smaller page was a stranger as well.
        """
        at = self.store.database.clock.now()
        self.memory.asked(at)
        try:
            page = self.source.await_answer(self.source.ask_newest(limit))
            with self.memory.lock:
                strangers = page.next_cursor is not None and self._all_strangers(page, met)
                Reading(self.source, self.store, findings, _nobody_watches).take(page, None)
            return page, strangers
        finally:
            self.memory.answered(at)

    def _all_strangers(self, page: Page, met: AbstractSet[str]) -> bool:
        new = [user for user in page.users if user.id not in met]
        known = any(
            user.key in self.memory.mirror or user.id in self.memory.rejects for user in new
        )
        return bool(new) and not known


_nobody_watches: Callable[[Findings], None] = lambda _findings: None  # noqa: E731
