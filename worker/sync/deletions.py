"""Settles the suspicions of a walk: asks about each, lets the guard judge, marks users deleted."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

import structlog

from worker.errors import Blocked, DataRefused, Misconfigured, SourceUnavailable
from worker.model import Single, Unreadable, User, Users
from worker.store.batch import MOST_BLOCKED
from worker.store.quarantine import unreadable_record
from worker.store.statement import Row, Statement
from worker.store.table import DELETED, WAITING
from worker.sync.apply import Reading
from worker.sync.guard import Guard

log = structlog.stdlib.get_logger(__name__)

# What one statement marks deleted.
SOFT_DELETE_BATCH = 500


@dataclass(frozen=True, slots=True)
class DeletionPolicy:
    """What may be deleted: `deletions` of the settings, and `schedule.audit_hours`."""

    guard: Guard
    enabled: bool = True
    grace_seconds: float = 60
    audit_hours: float = 24


@dataclass(slots=True)
class Settling:
    """The end of one sweep. `list_was_empty` is what the walk found."""

    reading: Reading
    policy: DeletionPolicy
    list_was_empty: bool
    trouble: SourceUnavailable | Misconfigured | None = None
    _gone: dict[str, datetime] = field(default_factory=dict)
    _left: int = 0
    _asked: set[str] = field(default_factory=set)
    _put_off: set[str] = field(default_factory=set)
    _refused: list[str] = field(default_factory=list)
    _marked: int = 0

    def settle(self) -> list[Statement]:
        """Ask about the suspects and delete what is proven and not too much.

        Returns the statements that the transaction which ends the sweep must run. If the API
        could not answer for every suspect, `trouble` says why, and nobody is deleted; or why the
        database refused every deletion.
        """
        if self.policy.enabled:
            self._ask(self._suspects())
            self._learn_of_approvals()
            self._ask(self.reading.state.in_state("approved"))
        state = self.reading.state
        with state.cache.lock:
            state.cache.check(state.generation)
            # Somebody who was seen meanwhile, by a poll say, is a suspect no more.
            self._gone = {i: at for i, at in self._gone.items() if i in state.suspects}
            if self._gone and self.trouble is None:
                self._judge()
                self._require_some_marked()
            return self._closing_statements()

    def _suspects(self) -> list[str]:
        """Choose whom to ask about: no more than tell whether the guard holds."""
        state = self.reading.state
        now = self.reading.store.database.clock.now()
        asked_before = now - timedelta(hours=self.policy.audit_hours)
        due = []
        with state.cache.lock:
            for user_id in state.in_state("hidden"):
                asked_at = state.suspects[user_id].asked_at
                if user_id in state.missing and (asked_at is None or asked_at <= asked_before):
                    due.append(user_id)
            suspects = state.in_state("candidate") + due
        probe_limit = self.policy.guard.probe_limit
        self._put_off = set(suspects[probe_limit:])
        return suspects[:probe_limit]

    @property
    def unasked(self) -> int:
        """How many suspects were left for the next sweep to ask about."""
        suspects = self.reading.state.suspects
        return sum(
            user_id in suspects and suspects[user_id].state != "held" for user_id in self._put_off
        )

    def _learn_of_approvals(self) -> None:
        """Look whether somebody has approved meanwhile: that is written beside our memory."""
        state, store = self.reading.state, self.reading.store
        if not state.in_state("held"):
            return
        recorded = store.database.call(store.suspects.load)
        with state.cache.lock:
            for user_id in state.in_state("held"):
                if user_id in recorded and recorded[user_id].state == "approved":
                    state.suspects[user_id] = recorded[user_id]

    def _ask(self, ids: Sequence[str]) -> None:
        """Ask for each of these users with GET, a few at a time."""
        fetcher = self.reading.fetcher
        if self.trouble is not None:
            return
        answers = [(user_id, fetcher.submit_user(user_id)) for user_id in ids]
        found: list[tuple[str, Single]] = []
        try:
            for user_id, answer in answers:
                single = fetcher.await_answer(answer)
                if single.found is None:
                    self._gone[user_id] = single.observed_at
                else:
                    found.append((user_id, single))
        except (SourceUnavailable, Misconfigured) as error:
            self.trouble = error
        finally:
            for _, answer in answers:
                answer.cancel()
        self.reading.count_api_time()
        self._asked.update(ids)
        state = self.reading.state
        with state.cache.lock:
            state.cache.check(state.generation)
            still = {i: single for i, single in found if i in state.suspects}
            if still:
                self._take_found(still)

    def _take_found(self, found: dict[str, Single]) -> None:
        """Take in users that the list left out though the API knows them: hidden, or moved."""
        reading, state = self.reading, self.reading.state
        users = {u: s.found for u, s in found.items() if isinstance(s.found, User)}
        bad = [
            unreadable_record(s.found) for s in found.values() if isinstance(s.found, Unreadable)
        ]
        hidden = [u for u, user in users.items() if state.missing.get(u) in {None, user.key}]
        for user_id in found.keys() - set(hidden):
            key = state.missing.pop(user_id, None)
            state.mirror.remove([key] if key and user_id in users else [])
        asked_at = reading.store.database.clock.now()
        for user_id in found:
            suspect = state.suspects.pop(user_id)
            if user_id in hidden:
                state.suspects[user_id] = replace(suspect, state="hidden", asked_at=asked_at)
        before = state.not_as_before
        statements = [
            reading.store.suspects.hide(hidden),
            reading.store.suspects.strike(found.keys() - set(hidden)),
            *reading.rejecting.reject(bad),
        ]
        # The earliest moment is true of all of them.
        observed_at = min(single.observed_at for single in found.values())
        reading.apply(Users.of(users.values()), observed_at, statements)
        state.counts["hidden"] += len(hidden)
        state.off_list += state.not_as_before - before

    def _judge(self) -> None:
        """Delete what a person approved, and the rest unless it is too much to believe."""
        state, store = self.reading.state, self.reading.store
        approved = {id_ for id_ in self._gone if state.suspects[id_].state == "approved"}
        rest = [user_id for user_id in self._gone if user_id not in approved]
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

    def _hold(self, gone: Sequence[str]) -> None:
        """Hold every candidate, proven or not, until a person approves."""
        state, store = self.reading.state, self.reading.store
        held = {*state.in_state("candidate"), *gone}
        for user_id in held:
            state.suspects[user_id] = replace(state.suspects[user_id], state="held")
        state.has_written = True
        store.write([store.suspects.hold(held)], state.number)
        log.warning("deletions.held", held=len(held), proven=len(gone), sweep=state.number)

    def _soft_delete(self, ids: Sequence[str], *, approved: bool) -> None:
        young = {user_id for user_id in ids if self._just_inserted(user_id)}
        self.reading.state.waiting += len(young)
        ripe = [user_id for user_id in ids if user_id not in young]
        for at in range(0, len(ripe), SOFT_DELETE_BATCH):
            self._mark(ripe[at : at + SOFT_DELETE_BATCH], approved=approved)

    def _mark(self, ids: Sequence[str], *, approved: bool) -> None:
        """Mark users deleted in one transaction, or in ever smaller ones to pass a locked row."""
        state, store = self.reading.state, self.reading.store
        state.has_written = True
        record = store.sweeps.record(state.row())
        proofs = [(user_id, self._gone[user_id]) for user_id in ids]
        statement = store.table.soft_delete(proofs, state.number, approved=approved)

        def closing(rows: Sequence[Row | None]) -> list[Statement]:
            # In the same transaction: a suspicion must not outlive its reason.
            letters = _letters(rows)
            left_no_trace = [i for i, each in zip(ids, letters, strict=True) if each != WAITING]
            return [store.suspects.strike(left_no_trace)]

        try:
            rows = store.lease.commit([record, statement], state.number, closing)
        except (Blocked, DataRefused) as error:
            self._mark_halves(ids, error, approved=approved)
        else:
            self._take(ids, _letters(rows), approved=approved)

    def _mark_halves(
        self, ids: Sequence[str], error: Blocked | DataRefused, *, approved: bool
    ) -> None:
        middle = len(ids) // 2
        if not middle:
            self._leave(ids[0], error)
            return
        for half in (ids[:middle], ids[middle:]):
            # So many in a row are not a lock on some rows but one on the table: the next sweep.
            if self._left < MOST_BLOCKED:
                self._mark(half, approved=approved)

    def _leave(self, user_id: str, error: Blocked | DataRefused) -> None:
        """Leave a user a candidate; a deletion that the database refuses is told only once."""
        if isinstance(error, Blocked):
            self._left += 1
            log.warning("deletion.blocked", user=user_id, error=str(error))
            return
        self._refused.append(error.code)
        known = self.reading.state.cache.unmarked
        if user_id not in known:
            log.warning("deletion.blocked", user=user_id, error=error.code)
            known.add(user_id)

    def _require_some_marked(self) -> None:
        """Note it as the sweep's trouble if every deletion is refused: no user is to blame then."""
        if len(self._refused) > 1 and not self._marked:
            self.trouble = Misconfigured(
                f"none of {len(self._refused)} users who are gone could be marked deleted, the last"
                f" was refused by the database: {self._refused[-1]}; see the triggers and"
                " constraints of the table, and the log of the database"
            )

    def _take(self, ids: Sequence[str], letters: str, *, approved: bool) -> None:
        state = self.reading.state
        for user_id, letter in zip(ids, letters, strict=True):
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

    def _just_inserted(self, user_id: str) -> bool:
        now = self.reading.store.database.clock.monotonic()
        since = now - self.policy.grace_seconds
        return self.reading.state.mirror.inserted_since(user_id, since)

    def _closing_statements(self) -> list[Statement]:
        """Forget what was not noticed again; only a sweep that saw everything can say so."""
        state, store = self.reading.state, self.reading.store
        statements = [store.suspects.keep(state.missing, state.number)]
        if self.trouble is None:
            statements += self._note_asked()
        if state.from_start and self.trouble is None:
            statements.append(store.suspects.forget_others(state.missing))
            statements.append(store.quarantine.forget_others(state.quarantined_seen))
        return statements

    def _note_asked(self) -> list[Statement]:
        """Let the next sweep ask first about those about whom this one did not."""
        state, store = self.reading.state, self.reading.store
        left = self._asked.intersection(state.in_state("candidate"))
        asked_at = store.database.clock.now()
        for user_id in left:
            state.suspects[user_id] = replace(state.suspects[user_id], asked_at=asked_at)
        return [store.suspects.asked(left)] if left else []


def _letters(rows: Sequence[Row | None]) -> str:
    """Give what `Table.soft_delete` told; it is the second statement, after the sweep's row."""
    row = rows[1]
    return str(row[0]) if row else ""
