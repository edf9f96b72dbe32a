"""Whom the database refuses, and when each of them is tried again."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

# The first try comes with the next sweep: the cause may be gone already. What only a person can
# change need not cost every sweep its time, but is to be noticed within the hour.
FIRST_PAUSE_SECONDS = 60.0
LONGEST_PAUSE_SECONDS = 3600.0


@dataclass(frozen=True, slots=True)
class _Refusal:
    """When on the monotonic clock, and after what pause, to try a user again.

    `reason` is why something other than the record is to blame, as far as that is known.
    """

    reason: str | None = None
    due_at: float = float("-inf")
    pause_seconds: float = 0.0


@dataclass(slots=True)
class Refusals:
    """Users whom the database refused, by id."""

    _refused: dict[str, _Refusal] = field(default_factory=dict)

    def load(self, ids: Iterable[str]) -> None:
        """Take over who is recorded as refused; pauses that have begun go on."""
        self._refused = {i: self._refused.get(i, _Refusal()) for i in ids}

    def note(self, user_id: str, reason: str | None, now: float) -> None:
        """Note that a user was refused; each time but the first the pause is twice as long."""
        known = self._refused.get(user_id)
        if known is None:
            self._refused[user_id] = _Refusal(reason)
            return
        pause = min(max(2 * known.pause_seconds, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
        self._refused[user_id] = _Refusal(reason, now + pause, pause)

    def forget(self, ids: Iterable[str]) -> None:
        for user_id in ids:
            self._refused.pop(user_id, None)

    def hasten(self) -> None:
        """Make all of them due: the cause is gone, for one of them at least."""
        self._refused = {
            user_id: replace(refusal, due_at=float("-inf"))
            for user_id, refusal in self._refused.items()
        }

    def is_due(self, user_id: str, now: float) -> bool:
        refusal = self._refused.get(user_id)
        return refusal is not None and refusal.due_at <= now

    def reason(self, ids: Iterable[str]) -> str | None:
        """Say why some of these users was refused whose own record is not to blame, if any."""
        reasons = (self._refused[i].reason for i in ids if i in self._refused)
        return next((reason for reason in reasons if reason is not None), None)
