"""Brings the table into line with what one answer of the API says."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import structlog

from worker.model import Key, Page, Unreadable, Users, last_key
from worker.stack_auth.careful_reader import storable
from worker.store import Store
from worker.store.batch import Batch, BatchResult, Extra
from worker.store.quarantine import BadRecord, unreadable_record
from worker.store.suspects import Suspect
from worker.store.table import INSERTED, RESTORED, STALE, UNCHANGED, UPDATED, RowResults
from worker.store.transaction import Statement
from worker.sync.mirror import Delta, Span
from worker.sync.quarantine import QuarantineFilter
from worker.sync.state import SweepState

log = structlog.stdlib.get_logger(__name__)

STORED = (INSERTED, UPDATED, RESTORED, UNCHANGED)

# This many refused users are held in memory until the end of the list; more are tried before it.
MOST_TO_RETRY = 5_000


@dataclass(frozen=True, slots=True)
class Change:
    """What an answer changes, not written yet: users, further statements, keys that are no more."""

    users: Users
    observed_at: datetime
    statements: Sequence[Extra] = ()
    moved: Sequence[Key] = ()
    cleaned: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class PageApplier:
    """Compares answers with the mirror, writes what differs, and updates the mirror.

    Walks, polls, hints and the confirmation of deletions all use it: there is one way for answers
    into the table. Deletions are written by `deletions`, from proofs alone. The caller holds the
    cache's lock from comparing to writing.
    """

    store: Store
    state: SweepState

    @property
    def quarantine(self) -> QuarantineFilter:
        return QuarantineFilter(self.store, self.state)

    def compare(self, page: Page, span: Span | None) -> Change:
        """Find what a page changes; without a span it says nothing about who is missing.

        Counts and suspects change at once, in memory. Raises MirrorOutdated for a page that was
        requested before the mirror was loaded.
        """
        self.state.cache.check(self.state.generation)
        delta = self._compare(page, span)
        found = storable(delta.changed, self.store.table.ignored_fields)
        rejected = [unreadable_record(each) for each in (*page.unreadable, *found.unreadable)]
        self._count(page, span)
        put_aside = {each.id for each in found.unreadable}
        return Change(
            statements=self._record(page, rejected, delta),
            users=self.quarantine.leave_out(found.users, page.observed_at),
            observed_at=page.observed_at,
            moved=[key for key in delta.moved if key[1] not in put_aside],
            cleaned=(*page.cleaned, *found.cleaned),
        )

    def compare_single(
        self, users: Users, unreadable: Sequence[Unreadable], observed_at: datetime
    ) -> Change:
        """Find what an answer about single users changes, wherever in the list they stand.

        The answer says nothing about other users. Raises as `compare` does.
        """
        state = self.state
        state.cache.check(state.generation)
        # Of users who are hidden from the list it is known that the API finds them.
        struck = self._strike(set(users.ids), observed_at, but="hidden")
        delta = Delta(state.mirror.differing(users))
        changed = state.cache.still_news(delta, observed_at).changed
        found = storable(changed, self.store.table.ignored_fields)
        rejected = [unreadable_record(each) for each in (*unreadable, *found.unreadable)]
        return Change(
            statements=[
                *self.quarantine.reject(rejected),
                *([self.store.suspects.strike(struck)] if struck else []),
            ],
            users=self.quarantine.leave_out(found.users, observed_at),
            observed_at=observed_at,
            cleaned=found.cleaned,
        )

    def write(
        self, change: Change, extras: Sequence[Extra] = (), *, extras_are_due: bool = True
    ) -> bool:
        """Write a change, and `extras` with it, or alone if they are due.

        Returns whether anything was committed. Raises whatever Batch.apply raises.
        """
        if len(self.state.to_retry) >= MOST_TO_RETRY:
            self.retry_refused()
        commits = bool(change.users or change.statements or (extras and extras_are_due))
        if commits:
            self.apply(change.users, change.observed_at, [*change.statements, *extras])
        self.state.mirror.remove(change.moved)
        for user_id in change.cleaned:
            log.warning("record.cleaned", user=user_id)
        return commits

    def apply(self, users: Users, observed_at: datetime, extras: Sequence[Extra]) -> BatchResult:
        """Write users to the table, and tell state, cache and mirror what became of them."""
        store, state = self.store, self.state

        def attempt() -> BatchResult:
            where = (store.table, store.lease, store.quarantine, state.number)
            return Batch(*where, observed_at).apply(users, extras)

        # Each commit retries by itself: this is for a table that is locked as a whole. What was
        # committed before that comes back as unchanged, and is not counted.
        applied = store.database.retry.call(attempt)
        state.count(applied.results)
        state.has_written = True
        cache, mirror = state.cache, state.mirror
        for told, _ in applied.results:
            cache.accepted(told, observed_at)
        if state.quarantined:
            cache.stored({i for users in applied.by(*STORED) for i in users.ids})
        mirror.remove(applied.moved)
        for known in applied.by(*STORED):
            mirror.accept(known)
        for stale in applied.by(STALE):
            for user in stale:
                mirror.forget_fingerprint(user.key)
        now = store.database.clock.monotonic()
        for inserted in applied.by(INSERTED):
            mirror.note_inserted(inserted, now, store.table.grace_seconds)
            cache.on_inserted(inserted)
        for rejected in applied.rejected:
            self.quarantine.remember(rejected)
        return applied

    def retry_refused(self) -> None:
        """Retry the users whom the database refused before: together, and after all others."""
        state = self.state
        with state.cache.lock:
            state.cache.check(state.generation)
            users, observed_at = self.quarantine.take_due()
            if users and any(self.apply(users, observed_at, []).by(*STORED)):
                state.cache.refusals.hasten()

    def checkpoint(self, key: Key, results: Sequence[RowResults] = ()) -> Statement:
        """Move the checkpoint to this key, with counts that include the results of a batch."""
        return self.store.sweeps.move(self.state.checkpoint(key, results))

    def _compare(self, page: Page, span: Span | None) -> Delta:
        cache, users = self.state.cache, page.users
        if span is not None:
            delta = cache.mirror.compare(users, span, lambda: page.ids)
            return cache.still_news(delta, page.observed_at)
        if not users:
            return Delta()
        # Around the page: so an unchanged one is found equal as a slice. It proves no absence.
        covered = Span(cache.mirror.below(users.key(0)), users.key(len(users) - 1))
        delta = cache.mirror.compare(users, covered, lambda: page.ids)
        return Delta(cache.still_news(delta, page.observed_at).changed)

    def _count(self, page: Page, span: Span | None) -> None:
        """Count each user of a walk once: not the overlap of the chain, nor what is read again."""
        state, users = self.state, page.users
        new = len(users)
        if span is not None:
            low, high = _numbers(users, span)
            met = _numbers(users, Span(state.lowest, state.furthest)) if state.furthest else (0, 0)
            new = max(0, high - low) - max(0, min(high, met[1]) - max(low, met[0]))
            end = span.upto or last_key(page.places)
            if end and (state.furthest is None or end > state.furthest):
                state.furthest = end
            if state.lowest is not None:
                state.lowest = min(state.lowest, span.after) if span.after else None
        state.counts["pages"] += 1
        odd = {unreadable_record(each).record for each in page.unreadable}
        state.counts["users"] += new + len(odd - state.quarantined_seen)

    def _record(self, page: Page, rejected: Sequence[BadRecord], delta: Delta) -> list[Extra]:
        """Give the statements for unreadable records, suspects seen again, and new suspects."""
        statements: list[Extra] = [*self.quarantine.reject(rejected)]
        suspects, number = self.store.suspects, self.state.number
        if self.state.suspects and (struck := self._strike(page.ids, page.observed_at)):
            statements.append(suspects.strike(struck))
        if noticed := self._notice(delta, page):
            statements.append(suspects.notice(noticed, number, page.observed_at))
        return statements

    def _strike(self, shown: set[str], observed_at: datetime, but: str = "") -> list[str]:
        """Forget suspects shown by a later answer, `but` those in that state; returns their ids."""
        suspects = self.state.suspects
        struck = [
            user_id
            for user_id in suspects.keys() & shown
            if observed_at > suspects[user_id].noticed_at and suspects[user_id].state != but
        ]
        for user_id in struck:
            del suspects[user_id]
            self.state.missing.pop(user_id, None)
        return struck

    def _notice(self, delta: Delta, page: Page) -> list[str]:
        """Suspect the missing users; returns the ids that are not recorded yet."""
        state = self.state
        new = [user_id for _, user_id in delta.missing if user_id not in state.suspects]
        for user_id in new:
            state.suspects[user_id] = Suspect("candidate", state.number, page.observed_at)
        state.missing.update((user_id, (millis, user_id)) for millis, user_id in delta.missing)
        return new


def _numbers(users: Users, span: Span) -> tuple[int, int]:
    """Give the number of the first user within the span, and of the first one behind it."""
    return users.count_upto(span.after), users.count_upto(span.upto) if span.upto else len(users)
