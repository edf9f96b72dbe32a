"""Ends a sweep: confirms its suspects, lets the guard judge, and marks users deleted."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta

import structlog

from worker.errors import Blocked, DataRefused, Misconfigured, SourceUnavailable
from worker.model import Proof, Single, Unreadable, User, Users
from worker.store import Store
from worker.store.batch import MOST_BLOCKED
from worker.store.quarantine import unreadable_record
from worker.store.table import DELETED, WAITING
from worker.store.transaction import Row, Statement
from worker.sync.apply import PageApplier
from worker.sync.confirm import Verdicts, confirm
from worker.sync.fetcher import Fetcher
from worker.sync.guard import DeletionPolicy
from worker.sync.state import SweepState

log = structlog.stdlib.get_logger(__name__)

# What one statement marks deleted.
SOFT_DELETE_BATCH = 500


@dataclass(slots=True)
class Deletions:
    """The deletions of one sweep. `list_was_empty` is what its walk found.

    After `settle`, `trouble` says why no user was deleted, and `unasked` how many suspects were
    left for the next sweep.
    """

    fetcher: Fetcher
    applier: PageApplier
    policy: DeletionPolicy
    list_was_empty: bool
    trouble: SourceUnavailable | Misconfigured | None = None
    _verdicts: Verdicts = field(default_factory=Verdicts)
    _put_off: set[str] = field(default_factory=set)
    _blocked: int = 0
    _refusals: list[str] = field(default_factory=list)
    _marked: int = 0

    def settle(self) -> list[Statement]:
        """Ask about the suspects, and delete those that are proven gone if they are not too many.

        Returns the statements that the transaction which ends the sweep must run.
        """
        if self.policy.enabled:
            self._ask(self._choose_suspects())
            self._learn_of_approvals()
            if self.trouble is None:
                self._ask(self._state.in_state("approved"))
        state, proofs = self._state, self._verdicts.proofs
        with state.cache.lock:
            state.cache.check(state.generation)
            # A user who was seen meanwhile, by a poll say, is no longer suspected.
            gone = [proof for user_id, proof in proofs.items() if user_id in state.suspects]
            if gone and self.trouble is None:
                self._judge(gone)
                self._require_some_marked()
            return self._closing_statements()

    def delete(self, gone: Sequence[Proof]) -> None:
        """Mark users deleted who are proven gone, or hold them if the guard says so."""
        if gone and self.policy.enabled:
            self._judge(gone)

    @property
    def unasked(self) -> int:
        """How many suspects were left for the next sweep to ask about."""
        suspects = self._state.suspects
        return sum(
            user_id in suspects and suspects[user_id].state != "held" for user_id in self._put_off
        )

    @property
    def _state(self) -> SweepState:
        return self.applier.state

    @property
    def _store(self) -> Store:
        return self.applier.store

    def _choose_suspects(self) -> list[str]:
        """Choose whom to ask about: no more than tell whether the guard is exceeded."""
        state = self._state
        asked_before = self._store.database.clock.now() - timedelta(hours=self.policy.audit_hours)
        due = []
        with state.cache.lock:
            for user_id in state.in_state("hidden"):
                asked_at = state.suspects[user_id].asked_at
                if user_id in state.missing and (asked_at is None or asked_at <= asked_before):
                    due.append(user_id)
            suspects = state.in_state("candidate") + due
        limit = self.policy.guard.probe_limit
        self._put_off = set(suspects[limit:])
        return suspects[:limit]

    def _learn_of_approvals(self) -> None:
        """Take over approvals that a person gave meanwhile; the cache does not know them yet."""
        state, store = self._state, self._store
        if not state.in_state("held"):
            return
        recorded = store.database.call(store.suspects.load)
        with state.cache.lock:
            for user_id in state.in_state("held"):
                if user_id in recorded and recorded[user_id].state == "approved":
                    state.suspects[user_id] = recorded[user_id]

    def _ask(self, ids: Sequence[str]) -> None:
        """Confirm these suspects; take in those that the API still knows."""
        verdicts, state = confirm(self.fetcher, ids), self._state
        state.count_api_time(self.fetcher.api_time.of("sweep"))
        self.trouble = verdicts.trouble
        self._verdicts.asked |= verdicts.asked
        self._verdicts.proofs.update(verdicts.proofs)
        with state.cache.lock:
            state.cache.check(state.generation)
            found = {i: single for i, single in verdicts.found.items() if i in state.suspects}
            if found:
                self._take_found(found)

    def _take_found(self, found: dict[str, Single]) -> None:
        """Take in users that the list left out though the API knows them: hidden, or moved."""
        state, suspects = self._state, self._store.suspects
        users = {u: s.found for u, s in found.items() if isinstance(s.found, User)}
        bad = [
            unreadable_record(s.found) for s in found.values() if isinstance(s.found, Unreadable)
        ]
        hidden = [u for u, user in users.items() if state.missing.get(u) in {None, user.key}]
        for user_id in found.keys() - set(hidden):
            key = state.missing.pop(user_id, None)
            state.mirror.remove([key] if key and user_id in users else [])
        asked_at = self._store.database.clock.now()
        for user_id in found:
            suspect = state.suspects.pop(user_id)
            if user_id in hidden:
                state.suspects[user_id] = replace(suspect, state="hidden", asked_at=asked_at)
        before = state.not_as_before
        statements = [
            suspects.hide(hidden),
            suspects.strike(found.keys() - set(hidden)),
            *self.applier.quarantine.reject(bad),
        ]
        # The earliest moment is true of all of them.
        observed_at = min(single.observed_at for single in found.values())
        self.applier.apply(Users.of(users.values()), observed_at, statements)
        state.counts["hidden"] += len(hidden)
        state.off_list += state.not_as_before - before

    def _judge(self, gone: Sequence[Proof]) -> None:
        """Delete what a person approved, and the rest unless it is too much to believe."""
        state, store = self._state, self._store
        approved = [p for p in gone if state.suspects[p.user_id].state == "approved"]
        rest = [p for p in gone if state.suspects[p.user_id].state != "approved"]
        exceeded = self.policy.guard.exceeded(
            gone=len(rest),
            deleted_today=store.database.call(store.sweeps.deleted_today),
            live=len(state.mirror),
            list_was_empty=self.list_was_empty,
        )
        self._soft_delete(sorted(approved), approved=True)
        if not exceeded:
            self._soft_delete(rest, approved=False)
        elif rest:
            self._hold(rest)

    def _hold(self, gone: Sequence[Proof]) -> None:
        """Hold every candidate, proven or not, until a person approves."""
        state, store = self._state, self._store
        held = {*state.in_state("candidate"), *(proof.user_id for proof in gone)}
        for user_id in held:
            state.suspects[user_id] = replace(state.suspects[user_id], state="held")
        state.has_written = True
        # A suspicion is in memory even if the transaction that was to record it failed.
        noticed = store.suspects.notice(sorted(held), state.number, store.database.clock.now())
        store.write([noticed, store.suspects.hold(held)], state.number)
        log.warning("deletions.held", held=len(held), proven=len(gone), sweep=state.number)

    def _soft_delete(self, proofs: Sequence[Proof], *, approved: bool) -> None:
        """Mark users deleted, some hundred in a transaction, but not those inserted just now.

        The database cannot tell these: a new row has no `updated_at`, and the sign-up may be years
        old. Only the process that inserted them knows.
        """
        since = self._store.database.clock.monotonic() - self.policy.grace_seconds
        ripe = [p for p in proofs if not self._state.mirror.inserted_since(p.user_id, since)]
        self._state.waiting += len(proofs) - len(ripe)
        for at in range(0, len(ripe), SOFT_DELETE_BATCH):
            self._mark_in_pieces(ripe[at : at + SOFT_DELETE_BATCH], approved=approved)

    def _mark_in_pieces(self, proofs: Sequence[Proof], *, approved: bool) -> None:
        """Mark users deleted in one transaction, or in ever smaller ones to pass a locked row."""
        work = [proofs]
        while work:
            part = work.pop()
            try:
                letters = self._mark(part, approved=approved)
            except (Blocked, DataRefused) as error:
                middle = len(part) // 2
                if middle:
                    work += [part[middle:], part[:middle]]
                else:
                    self._leave(part[0].user_id, error)
            else:
                self._count_marked(part, letters, approved=approved)
            if self._blocked >= MOST_BLOCKED:
                return  # the table itself is locked: the next sweep goes on

    def _mark(self, proofs: Sequence[Proof], *, approved: bool) -> str:
        """Mark users deleted in one transaction; returns a letter for each."""
        state, store = self._state, self._store
        state.has_written = True
        record = (store.sweeps.record if state.owns_row else store.sweeps.ensure)(state.row())
        statement = store.table.soft_delete(proofs, state.number, approved=approved)

        def closing(rows: Sequence[Row | None]) -> list[Statement]:
            # In the same transaction: a suspicion must not outlive its reason.
            told = zip(proofs, _letters(rows), strict=True)
            return [store.suspects.strike([p.user_id for p, letter in told if letter != WAITING])]

        return _letters(store.lease.commit([record, statement], state.number, closing))

    def _leave(self, user_id: str, error: Blocked | DataRefused) -> None:
        """Leave a user a candidate; log a deletion that the database refuses only once."""
        if isinstance(error, Blocked):
            self._blocked += 1
            log.warning("deletion.blocked", user=user_id, error=str(error))
            return
        self._refusals.append(error.code)
        known = self._state.cache.unmarked
        if user_id not in known:
            log.warning("deletion.blocked", user=user_id, error=error.code)
            known.add(user_id)

    def _count_marked(self, proofs: Sequence[Proof], letters: str, *, approved: bool) -> None:
        state = self._state
        for (user_id, _), letter in zip(proofs, letters, strict=True):
            if letter == WAITING:
                state.waiting += 1
                continue
            key = state.missing.pop(user_id, None)
            del state.suspects[user_id]
            state.cache.unmarked.discard(user_id)
            self._marked += 1
            state.mirror.remove([key] if key else [])
            if letter == DELETED:
                state.counts["approved" if approved else "deleted"] += 1

    def _require_some_marked(self) -> None:
        """Note it as the sweep's trouble if every deletion is refused: no user is to blame then."""
        if len(self._refusals) > 1 and not self._marked:
            self.trouble = Misconfigured(
                f"none of {len(self._refusals)} users who are gone could be marked deleted, the"
                f" last was refused by the database: {self._refusals[-1]}; see the triggers and"
                " constraints of the table, and the log of the database"
            )

    def _closing_statements(self) -> list[Statement]:
        """Forget what was not noticed again; only a sweep that saw everything can say so."""
        state, store = self._state, self._store
        statements = [store.suspects.keep(state.missing, state.number)]
        if self.trouble is not None:
            return statements
        # The next sweep asks first about those about whom this one did not.
        left = self._verdicts.asked.intersection(state.in_state("candidate"))
        if left:
            asked_at = store.database.clock.now()
            for user_id in left:
                state.suspects[user_id] = replace(state.suspects[user_id], asked_at=asked_at)
            statements.append(store.suspects.asked(left))
        if state.from_start:
            statements.append(store.suspects.forget_others(state.missing))
            statements.append(store.quarantine.forget_others(state.quarantined_seen))
        return statements


def _letters(rows: Sequence[Row | None]) -> str:
    """Give what `Table.soft_delete` returned; it is the second statement, after the sweep's row."""
    row = rows[1]
    return str(row[0]) if row else ""
