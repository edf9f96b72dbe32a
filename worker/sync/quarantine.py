"""Leaves out of a walk what cannot be stored, and chooses who is tried again at its end."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

import structlog

from worker.model import User, Users
from worker.store import Store
from worker.store.quarantine import BadRecord
from worker.store.transaction import Statement
from worker.sync.state import SweepState

log = structlog.stdlib.get_logger(__name__)

# The kinds of sweeps that try refused users again. A poll comes every second, and a plan asks only.
TRY_AGAIN = {"sweep", "audit"}

NEVER = datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class QuarantineFilter:
    """The records of one walk that are in quarantine."""

    store: Store
    state: SweepState

    def reject(self, records: Sequence[BadRecord]) -> list[Statement]:
        """Give the statements that quarantine these records; those known as they are need none."""
        known = self.state.quarantined
        new = [each for each in records if known.get(each.record) != each.digest]
        for rejected in records:
            self.remember(rejected)
        return [self.store.quarantine.put(new)] if new else []

    def remember(self, rejected: BadRecord) -> None:
        """Remember what is in quarantine; a record that was there before is told no more."""
        state, record = self.state, rejected.record
        if state.quarantined.get(record) != rejected.digest:
            log.warning("record.quarantined", user=rejected.user_id, error=rejected.error)
        self._count({record})
        state.quarantined[record] = rejected.digest
        if rejected.permanent:
            state.cache.refusals.forget([record])
        else:
            culprit = None if rejected.blames_data else rejected.error
            state.cache.refusals.note(record, culprit, self._monotonic())

    def leave_out(self, users: Users, observed_at: datetime) -> Users:
        """Leave out users who are in quarantine as they are; who is due is set aside."""
        state = self.state
        if not state.quarantined:
            return users
        known = {user.id for user in users if self._is_in_quarantine(user)}
        due = {user_id for user_id in known if self._is_due(user_id)}
        state.to_retry.update((u.id, (u, observed_at)) for u in users if u.id in due)
        self._count(known - due)
        return users.without(known) if known else users

    def take_due(self) -> tuple[Users, datetime]:
        """Give whom to try again, and the earliest moment, which is true of all of them.

        Who was stored or refused meanwhile, by a poll say, is left as that found them.
        """
        state = self.state
        again = [each for each in state.to_retry.values() if self._is_in_quarantine(each[0])]
        others = state.to_retry.keys() - {user.id for user, _ in again}
        self._count({user_id for user_id in others if state.quarantined.get(user_id)})
        state.to_retry.clear()
        return Users.of(user for user, _ in again), min((at for _, at in again), default=NEVER)

    def _count(self, ids: set[str]) -> None:
        self.state.counts["quarantined"] += len(ids - self.state.quarantined_seen)
        self.state.quarantined_seen.update(ids)

    def _is_in_quarantine(self, user: User) -> bool:
        quarantined = self.state.quarantined
        return user.id in quarantined and quarantined[user.id] == user.fingerprint.hex()

    def _is_due(self, user_id: str) -> bool:
        """Whether this sweep tries a refused user again: once at most, and polls never do."""
        state = self.state
        tries = state.kind in TRY_AGAIN and user_id not in state.quarantined_seen
        return tries and state.cache.refusals.is_due(user_id, self._monotonic())

    def _monotonic(self) -> float:
        return self.store.database.clock.monotonic()
