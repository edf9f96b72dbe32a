"""Tells what a sweep would do, user by user, while pages are read."""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from worker.cli.plan.change import Change, Kind, update
from worker.model import Proof, User, Users
from worker.store.quarantine import BadRecord
from worker.store.table import DELETED, INSERTED, RESTORED, STALE, UNCHANGED, UPDATED, WAITING
from worker.sync.state import SweepState

_WRITTEN = {INSERTED, RESTORED, UPDATED}

_YOUNG = "the row is younger than deletions.grace_seconds"
_NEWER = "the row is newer than the answer"
_DELETED_LATELY = "the row was marked deleted within deletions.grace_seconds before the answer"
_TOO_MANY = "more are gone than deletions.max_count and deletions.max_fraction let through"
_APPROVAL = "held by an earlier sweep, and not approved yet"
_NOT_ENABLED = "missing from the list, but deletions.enabled is false"
_LEFT = "missing from the list, and left for a later sweep"
_HIDDEN = "missing from the list, but GET still finds the user"


@dataclass(slots=True)
class PlanRecorder:
    """What is told of one plan; `errors` is what is wrong with the records in quarantine.

    A batch may be tried again, so what a page changes is told after the page, each thing once. The
    last users of a page come again with the next one: a sweep has written them by then.
    `different` says whether anything was told that a sweep would do, or should do and could not.
    """

    tell: Callable[[Change], None]
    ignored_fields: Collection[str]
    errors: dict[str, str] = field(default_factory=dict)
    different: bool = False
    _state: SweepState | None = None
    _page: dict[tuple[Kind, str], Change] = field(default_factory=dict)
    _left: set[tuple[Kind, str]] = field(default_factory=set)
    _written: set[str] = field(default_factory=set)

    def compared(self, users: Users, letters: str, old: Sequence[str]) -> str:
        rows = iter(old)
        for user, letter in zip(users, letters, strict=True):
            change = self._change(user, letter, rows)
            if user.id not in self._written:
                self._note(change)
        return "".join(
            UNCHANGED if letter in _WRITTEN and user_id in self._written else letter
            for user_id, letter in zip(users.ids, letters, strict=True)
        )

    def proven(self, proofs: Sequence[Proof], letters: str, *, approved: bool) -> None:
        for (user_id, asked_at), letter in zip(proofs, letters, strict=True):
            if letter == DELETED:
                self._note(Change("delete", user_id, asked_at=asked_at, approved=approved))
            elif letter == WAITING:
                self._note(Change("wait", user_id, reason=_YOUNG))

    def rejected(self, records: Sequence[BadRecord]) -> None:
        self.errors.update((each.record, each.error) for each in records)

    def hidden(self, ids: Iterable[str]) -> None:
        for user_id in ids:
            self._note(Change("hide", user_id, reason=_HIDDEN))

    def turn_page(self, state: SweepState) -> None:
        """Tell what was found on a page, all at once."""
        self._state = state
        # Records already in quarantine, unchanged, were not reported to `rejected`.
        for record in sorted(state.quarantined_seen):
            reason = self.errors.get(record, "in quarantine")
            self._note(Change("quarantine", record, reason=reason))
        for at, change in self._page.items():
            if change.reason:
                self._left.add(at)
            if change.kind in {"insert", "restore", "update"}:
                self._written.add(change.subject)
            self.different = self.different or change.kind != "hide"
            self.tell(change)
        self._page.clear()

    def close(self, *, deletions_enabled: bool, held_before: Collection[str]) -> None:
        """Tell what the end of the sweep found, and who would be left until a person acts."""
        state = self._state
        if state is None:
            return
        for user_id in state.in_state("held"):
            reason = _APPROVAL if user_id in held_before else _TOO_MANY
            self._note(Change("hold", user_id, reason=reason))
        for user_id in state.in_state("candidate", "approved"):
            if ("wait", user_id) not in self._page:
                reason = _LEFT if deletions_enabled else _NOT_ENABLED
                self._note(Change("wait", user_id, reason=reason))
        self.turn_page(state)

    def _change(self, user: User, letter: str, rows: Iterator[str]) -> Change | None:
        if letter == UPDATED:
            return update(user, next(rows), self.ignored_fields)
        if letter == STALE:
            was_deleted = json.loads(next(rows))["was_deleted"]
            return Change("wait", user.id, reason=_DELETED_LATELY if was_deleted else _NEWER)
        kinds: dict[str, Kind] = {INSERTED: "insert", RESTORED: "restore"}
        return Change(kinds[letter], user.id) if letter in kinds else None

    def _note(self, change: Change | None) -> None:
        """Keep it for the end of the page; who is left as he is may be met on several pages."""
        if change is not None and (change.kind, change.subject) not in self._left:
            self._page[change.kind, change.subject] = change
