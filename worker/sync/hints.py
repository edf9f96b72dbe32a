"""Follows hints: asks the API about single users, and writes what it says like any answer.

A hint is never believed. A changed user goes through the page applier with its stale-write guard;
a user who is gone needs the same proof, grace period and guard as in a sweep.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice

from worker.model import Proof, Single, Unreadable, User, Users
from worker.store import Store
from worker.store.suspects import Suspect
from worker.store.table import RowResults
from worker.store.transaction import Statement
from worker.sync.apply import PageApplier
from worker.sync.cache import Cache
from worker.sync.confirm import confirm
from worker.sync.deletions import Deletions
from worker.sync.fetcher import Fetcher
from worker.sync.guard import DeletionPolicy
from worker.sync.state import SweepState, beside_sweeps, stale_ids

# With more hints than this a sweep is quicker than following each.
MOST_HINTS = 2_000

# Hints followed between two looks at the table: new ones do not wait behind old ones for long.
FOLLOWED_AT_ONCE = 20

# Proofs are collected, for the guard to judge them together. Under a lease that is shorter than
# this the oldest of them are too old to count: their hints are followed again.
MOST_COLLECTING_SECONDS = 15.0

# A user may be hinted at before the sign-up has reached a replica of the API.
AWAITED_SECONDS = 10.0

# How long before a hint that must wait is followed again.
RETRY_SECONDS = 1.0


@dataclass(slots=True)
class HintFollower:
    """Follows the hints of one target; `wants_sweep` is called if there are too many to follow.

    `on_followed` is given the seconds from a hint until it was followed.

    `_waiting` are hints that are followed again later, by user id: since when on the monotonic
    clock they wait, and when their turn comes.
    """

    fetcher: Fetcher
    store: Store
    cache: Cache
    policy: DeletionPolicy
    wants_sweep: Callable[[], None]
    on_followed: Callable[[float], None] = lambda _seconds: None
    _waiting: dict[str, tuple[float, float]] = field(default_factory=dict)

    def run(self) -> SweepState | None:
        """Follow the hints that are there; returns what came of them, None if there were none.

        Raises SourceUnavailable, DatabaseUnavailable, LeaseLost, MirrorOutdated, Misconfigured or
        Stopped; hints that were not followed stay.
        """
        hints = self._load()
        if not hints:
            return None
        state = beside_sweeps(self.store, self.cache)
        if len(hints) > MOST_HINTS:
            self.store.write([self.store.hints.clear(max(hints.values()))], state.number)
            self._waiting.clear()
            self.wants_sweep()
            return state
        applier, proofs = PageApplier(self.store, state), dict[str, Proof]()
        began = self._monotonic()
        while due := self._due(hints, proofs):
            self._follow(applier, due, proofs)
            if self._monotonic() - began > MOST_COLLECTING_SECONDS:
                break
            hints = self._load()
        if proofs:
            self._settle(applier, hints, proofs)
        return state

    @property
    def waits(self) -> bool:
        """Whether hints wait that are followed again soon."""
        return bool(self._waiting)

    def _load(self) -> dict[str, datetime]:
        store = self.store
        hints = store.read(lambda conn: store.hints.load(conn, MOST_HINTS + 1))
        for user_id in self._waiting.keys() - hints.keys():
            del self._waiting[user_id]
        return hints

    def _due(self, hints: dict[str, datetime], proofs: dict[str, Proof]) -> dict[str, datetime]:
        now = self._monotonic()
        due = (
            (user_id, asked_at)
            for user_id, asked_at in hints.items()
            if user_id not in proofs and self._waiting.get(user_id, (now, now))[1] <= now
        )
        return dict(islice(due, FOLLOWED_AT_ONCE))

    def _follow(
        self, applier: PageApplier, due: dict[str, datetime], proofs: dict[str, Proof]
    ) -> None:
        """Ask about these users, and apply what the API says of those it knows."""
        at = self.cache.asked(self.store.database.clock.now())
        try:
            verdicts = confirm(self.fetcher, list(due), hinted=True)
            with self.cache.lock:
                self.cache.check(applier.state.generation)
                self._take_found(applier, verdicts.found, due)
                self._take_gone(applier, verdicts.proofs, due, proofs)
        finally:
            self.cache.answered(at)
        if verdicts.trouble is not None:
            raise verdicts.trouble

    def _take_found(
        self, applier: PageApplier, found: dict[str, Single], due: dict[str, datetime]
    ) -> None:
        """Write users whose rows differ; remove their hints in the same transaction.

        Hints for rows that are locked, or newer than the answer, stay for another look.
        """
        if not found:
            return
        self._forget(found)

        def remove(results: Sequence[RowResults]) -> Statement:
            stale = stale_ids(results)
            return self.store.hints.remove({i: due[i] for i in found if i not in stale})

        change = applier.compare_single(
            Users.of(s.found for s in found.values() if isinstance(s.found, User)),
            [s.found for s in found.values() if isinstance(s.found, Unreadable)],
            # The earliest moment is true of all of them.
            min(single.observed_at for single in found.values()),
        )
        applier.write(change, [remove])
        now, monotonic = self.store.database.clock.now(), self._monotonic()
        for user_id in found:
            if user_id in applier.state.stale:
                self._waiting[user_id] = monotonic, monotonic + RETRY_SECONDS
            else:
                self.on_followed((now - due[user_id]).total_seconds())

    def _take_gone(
        self,
        applier: PageApplier,
        gone: dict[str, Proof],
        due: dict[str, datetime],
        proofs: dict[str, Proof],
    ) -> None:
        """Collect the proofs about live rows; wait a while for users who may be about to appear."""
        state, now, done = applier.state, self._monotonic(), dict[str, datetime]()
        for user_id, proof in gone.items():
            key = state.mirror.key_of(user_id)
            if key is not None:
                proofs[user_id] = proof
                state.missing[user_id] = key
                continue
            since, _ = self._waiting.get(user_id, (now, now))
            if now - since < AWAITED_SECONDS:
                self._waiting[user_id] = since, now + RETRY_SECONDS
            else:
                done[user_id] = due[user_id]
        if done:
            self._forget(done)
            self.store.write([self.store.hints.remove(done)], state.number)

    def _settle(
        self, applier: PageApplier, hints: dict[str, datetime], proofs: dict[str, Proof]
    ) -> None:
        """Let the guard judge all proofs together, and mark deleted those it lets through."""
        state, store = applier.state, self.store
        with self.cache.lock:
            self.cache.check(state.generation)
            # A sweep may have marked some of them deleted meanwhile.
            live = {i: proof for i, proof in proofs.items() if state.mirror.key_of(i) is not None}
            new = [user_id for user_id in live if user_id not in state.suspects]
            noticed_at = min(proof.asked_at for proof in proofs.values())
            for user_id in new:
                state.suspects[user_id] = Suspect("candidate", state.number, noticed_at)
            if new:
                store.write([store.suspects.notice(new, state.number, noticed_at)], state.number)
            deletions = Deletions(self.fetcher, applier, self.policy, list_was_empty=False)
            deletions.delete([p for i, p in live.items() if state.suspects[i].state != "held"])
            left = (i for i in live if i in state.suspects and state.suspects[i].state != "held")
            waiting = set(left) if self.policy.enabled else set[str]()
            for user_id in waiting:
                later = self._monotonic() + max(RETRY_SECONDS, self.policy.grace_seconds / 4)
                self._waiting[user_id] = self._monotonic(), later
            done = {i: hints[i] for i in proofs if i in hints and i not in waiting}
            self._forget(done)
            if done:
                store.write([store.hints.remove(done)], state.number)

    def _forget(self, ids: Iterable[str]) -> None:
        for user_id in ids:
            self._waiting.pop(user_id, None)

    def _monotonic(self) -> float:
        return self.store.database.clock.monotonic()
