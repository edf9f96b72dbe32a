"""Walks the list page by page, and brings the table into line with each page."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime

import structlog

from worker.errors import UpdatesRefused
from worker.model import Key, Page, Users, last_key
from worker.stack_auth.careful_reader import storable
from worker.store import Store
from worker.store.batch import Batch, BatchResult, Extra
from worker.store.quarantine import BadRecord, unreadable_record
from worker.store.statement import Statement
from worker.store.suspects import Suspect
from worker.store.table import INSERTED, RESTORED, STALE, UNCHANGED, UPDATED, RowResults
from worker.sync.chain import Chain
from worker.sync.fetcher import Fetcher
from worker.sync.mirror import Delta, Span
from worker.sync.rejecting import Rejecting
from worker.sync.state import SweepState

log = structlog.stdlib.get_logger(__name__)

# Pages that change nothing write no checkpoint of their own more often than this.
CHECKPOINT_SECONDS = 30.0

STORED = (INSERTED, UPDATED, RESTORED, UNCHANGED)

# So many refused users are held in memory until the end of the list; more are tried before it.
MOST_ASIDE = 5_000


@dataclass(frozen=True, slots=True)
class Asked:
    """A page under way, and a moment not later than that at which it was asked for."""

    at: datetime
    answer: Future[Page]


@dataclass(slots=True)
class Reading:
    """One walk over the list. `on_page` is told after each page, for a progress display."""

    fetcher: Fetcher
    store: Store
    state: SweepState
    on_page: Callable[[SweepState], None]
    chain: Chain = field(init=False)
    rejecting: Rejecting = field(init=False)
    _reached: Key | None = field(init=False)
    _checkpoint_at: float = field(init=False)
    _api_seconds: float = field(init=False)
    _under_way: list[Asked] = field(default_factory=list)
    _refusal: UpdatesRefused | None = None

    def __post_init__(self) -> None:
        self._reached = self.state.resume_at
        with self.state.cache.lock:
            self.chain = Chain(self.state.mirror.pairs_before, self.state.resume_at)
        self.rejecting = Rejecting(self.store, self.state)
        self._checkpoint_at = self._monotonic()
        self._api_seconds = self.fetcher.api_time.of("sweep")

    def read(self) -> None:
        """Walk to the proven end of the list; then try again whom the database refused before.

        One page is fetched ahead while one is applied. Raises SweepIncomplete, and whatever asking
        and writing raise.
        """
        asked: Asked | None = self._ask()
        try:
            while asked is not None:
                asked = self._next(asked)
        finally:
            # What is still under way is not waited for: nothing has to be remembered for it.
            self._forget_asked()
        if self._refusal is not None:
            raise self._refusal
        self._try_again()

    def _next(self, asked: Asked) -> Asked | None:
        """Await a page, ask for the one behind it, and take it in; None at the end of the list."""
        page = self.fetcher.await_answer(asked.answer)
        self.count_api_time()
        with self.state.cache.lock:
            span = self.chain.take(page)
        if span is None:
            pair = self.chain.request.pair
            log.info("walk.recovered", behind=pair and pair.last.id)
        ahead = None if self.chain.ended else self._ask()
        if span is not None:
            self._take_on_the_way(page, span)
        self._forget_asked(asked)
        return ahead

    def _take_on_the_way(self, page: Page, span: Span) -> None:
        """Take a page in; where the table takes no updates, there may be new users behind it."""
        try:
            self.take(page, span)
        except UpdatesRefused as error:
            self._refusal = error
        if self._refusal is None:
            self._reached = self.chain.request.after

    def count_api_time(self) -> None:
        """Count how long the API has worked for this sweep; a checkpoint keeps the count."""
        before, self._api_seconds = self._api_seconds, self.fetcher.api_time.of("sweep")
        self.state.counts["api_millis"] += round((self._api_seconds - before) * 1000)

    def save(self) -> None:
        """Write the checkpoint now: what was applied, not what was asked for since."""
        if self._reached is not None:
            statement = self._moved(self._reached, ())
            self.store.write([statement], self.state.number)

    def _ask(self) -> Asked:
        """Ask for the next page; from now on its answer may be older than others."""
        asked = Asked(
            self.state.cache.asked(self.store.database.clock.now()),
            self.fetcher.submit_page(self.chain.request),
        )
        self._under_way.append(asked)
        return asked

    def _forget_asked(self, *only: Asked) -> None:
        for asked in only or tuple(self._under_way):
            asked.answer.cancel()
            self.state.cache.answered(asked.at)
            self._under_way.remove(asked)

    def apply(
        self,
        users: Users,
        observed_at: datetime,
        extras: Sequence[Extra],
        *,
        assume_new: bool = False,
    ) -> BatchResult:
        """Apply users to the table, and what came of it to the mirror.

        `newcomers` says that the mirror knows nobody of them.
        """
        store, state = self.store, self.state

        def attempt() -> BatchResult:
            where = (store.table, store.lease, store.quarantine, state.number)
            return Batch(*where, observed_at, assume_new).apply(users, extras)

        applied = store.database.retry.call(attempt)
        state.count(applied.results)
        state.has_written = True
        cache, mirror = state.cache, state.mirror
        cache.accepted((i for users, _ in applied.results for i in users.ids), observed_at)
        if state.quarantined:
            cache.stored({i for users in applied.by(*STORED) for i in users.ids})
        mirror.remove(applied.moved)
        for known in applied.by(*STORED):
            mirror.accept(known)
        for stale in applied.by(STALE):
            for user in stale:
                mirror.forget_fingerprint(user.key)
        for inserted in applied.by(INSERTED):
            mirror.note_inserted(inserted, self._monotonic(), store.table.grace_seconds)
            cache.on_inserted(inserted)
        for rejected in applied.rejected:
            self.rejecting.remember(rejected)
        return applied

    def take(self, page: Page, span: Span | None) -> None:
        """Bring the table into line with a page; without a span it says nothing of who is missing.

        Raises MirrorOutdated for a page that was asked for before the mirror was loaded anew.
        """
        state = self.state
        with state.cache.lock:
            state.cache.check(state.generation)
            delta = self._compare(page, span)
            found = storable(delta.changed, self.store.table.ignored_fields)
            rejected = [unreadable_record(each) for each in (*page.unreadable, *found.unreadable)]
            self._count(page, span)
            extras = self._records(page, rejected, delta)
            changed = self.rejecting.leave(found.users, page.observed_at)
            if len(state.to_retry) >= MOST_ASIDE:
                self._try_again()
            # The next sweep must not go on behind a page whose updates were refused.
            advances = span is not None and self._refusal is None
            if changed or extras or (advances and self._checkpoint_is_due()):
                self._checkpoint_at = self._monotonic()
                checkpoint = self._checkpoint(self.chain.request.after) if advances else []
                self.apply(
                    changed,
                    page.observed_at,
                    [*extras, *checkpoint],
                    assume_new=delta.assume_new,
                )
            put_aside = {each.id for each in found.unreadable}
            state.mirror.remove([key for key in delta.moved if key[1] not in put_aside])
        for user_id in (*page.cleaned, *found.cleaned):
            log.warning("record.cleaned", user=user_id)
        self.on_page(state)

    def _compare(self, page: Page, span: Span | None) -> Delta:
        cache, users = self.state.cache, page.users
        if span is not None:
            delta = cache.mirror.compare(users, span, lambda: page.ids)
            return cache.still_news(delta, page.observed_at)
        if not users:
            return Delta()
        within = Span(cache.mirror.below(users.key(0)), users.key(len(users) - 1))
        delta = cache.mirror.compare(users, within, lambda: page.ids)
        return Delta(cache.still_news(delta, page.observed_at).changed)

    def _records(self, page: Page, rejected: Sequence[BadRecord], delta: Delta) -> list[Statement]:
        """Give the statements for unreadable records, suspects seen again, and new suspects."""
        statements = self.rejecting.reject(rejected)
        if struck := self._struck(page):
            statements.append(self.store.suspects.strike(struck))
        return statements + self._suspect(delta, page)

    def _count(self, page: Page, span: Span | None) -> None:
        """Count each user of a walk once: not the overlap of the chain, nor what is read again."""
        state = self.state
        before = state.furthest if span else None
        met = page.users.count_upto(before)
        state.counts["pages"] += 1
        odd = {unreadable_record(each).record for each in page.unreadable}
        state.counts["users"] += len(page.users) - met + len(odd - state.quarantined_seen)
        end = last_key(page.places) if span else None
        if end and (before is None or end > before):
            state.furthest = end

    def _struck(self, page: Page) -> list[str]:
        """Forget the suspects that this later answer shows; returns their ids."""
        if not self.state.suspects:
            return []
        suspects = self.state.suspects
        struck = [
            user_id
            for user_id in suspects.keys() & page.ids
            if page.observed_at > suspects[user_id].noticed_at
        ]
        for user_id in struck:
            del suspects[user_id]
            self.state.missing.pop(user_id, None)
        return struck

    def _suspect(self, delta: Delta, page: Page) -> list[Statement]:
        """Notice who is missing; those already recorded need no statement."""
        state = self.state
        new = [user_id for _, user_id in delta.missing if user_id not in state.suspects]
        for user_id in new:
            state.suspects[user_id] = Suspect("candidate", state.number, page.observed_at)
        state.missing.update((user_id, (millis, user_id)) for millis, user_id in delta.missing)
        return [self.store.suspects.notice(new, state.number, page.observed_at)] if new else []

    def _try_again(self) -> None:
        """Try whom the database refused before: together, and after everybody else."""
        state = self.state
        with state.cache.lock:
            state.cache.check(state.generation)
            users, observed_at = self.rejecting.take_aside()
            if not users:
                return
            if any(self.apply(users, observed_at, []).by(*STORED)):
                state.cache.refusals.hasten()

    def _checkpoint(self, key: Key | None) -> list[Extra]:
        """Give what moves the checkpoint with a batch; at the start of the list there is none."""
        if key is None:
            return []
        return [lambda outcomes: self._moved(key, outcomes)]

    def _moved(self, key: Key, outcomes: Sequence[RowResults]) -> Statement:
        """Move the checkpoint, with counts that include what became of the batch's users."""
        return self.store.sweeps.move(self.state.checkpoint(key, outcomes))

    def _checkpoint_is_due(self) -> bool:
        return self._monotonic() - self._checkpoint_at >= CHECKPOINT_SECONDS

    def _monotonic(self) -> float:
        return self.store.database.clock.monotonic()
