"""How many deletions are too many to believe without a person."""

from dataclasses import dataclass

# Below this many, a fraction says nothing: 3 of 5 users of a new project may well leave in a day.
FRACTION_FROM = 10


@dataclass(frozen=True, slots=True)
class Guard:
    """The limits of `deletions.max_count` and `deletions.max_fraction`, over a rolling day."""

    max_count: int
    max_fraction: float

    def exceeded(self, *, gone: int, deleted_today: int, live: int, list_was_empty: bool) -> bool:
        """Whether so many proven deletions must wait for approval.

        `gone` are proven and not yet deleted, `live` the rows that are live now (those gone
        included), `deleted_today` what sweeps deleted without approval within a day.
        """
        # An empty list means a wrong or emptied project, even if few users are proven gone so far.
        if list_was_empty and live >= FRACTION_FROM:
            return True
        total = gone + deleted_today
        if total > self.max_count:
            return True
        return total >= FRACTION_FROM and total > self.max_fraction * (live + deleted_today)

    @property
    def probe_limit(self) -> int:
        """How many proofs are enough to know that the limits are exceeded."""
        return self.max_count + 1


@dataclass(frozen=True, slots=True)
class DeletionPolicy:
    """What may be deleted: `deletions` of the settings, and `schedule.audit_hours`."""

    guard: Guard
    enabled: bool = True
    grace_seconds: float = 60
    audit_hours: float = 24
