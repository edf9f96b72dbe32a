"""Writes a plan: lines for people, objects for programs."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from worker.cli.plan.change import Change
from worker.cli.plan.json_diff import ABSENT, Difference, as_json, readable
from worker.cli.plan.plan import Plan
from worker.ids import is_user_id

_SAID = {
    "inserted": "to insert",
    "restored": "to restore",
    "updated": "to update",
    "deleted": "to delete",
    "approved": "to delete as approved",
    "waiting": "waiting",
    "suspected": "suspected",
    "held": "held",
    "hidden": "hidden",
    "quarantined": "quarantined",
    "unchanged": "unchanged",
}
_STATES = {"hold": "held", "wait": "waiting", "quarantine": "quarantined", "hide": "hidden"}


@dataclass(slots=True)
class PlanPrinter:
    """Says changes as they are found, and in the end what they come to.

    `say` is given a line at a time. Without `values` nothing is said that a user's record holds;
    with a `limit` the changes beyond it are only counted.
    """

    say: Callable[[str], None]
    as_objects: bool = False
    values: bool = False
    limit: int | None = None
    _told: int = 0

    def tell(self, change: Change) -> None:
        """Say one change, unless it is beyond the limit."""
        self._told += 1
        if self.limit is not None and self._told > self.limit:
            return
        if self.as_objects:
            self.say(as_json(as_object(change, values=self.values)))
            return
        for line in lines(change, values=self.values):
            self.say(line)

    def end(self, plan: Plan) -> None:
        """Say what all changes come to, those that were not shown included."""
        left_out = 0 if self.limit is None else max(0, self._told - self.limit)
        if self.as_objects:
            self.say(as_json({**summary(plan), "left_out": left_out}))
            return
        if left_out:
            self.say(f"… and {left_out:,} more")
        self.say(sentence(plan))


def lines(change: Change, *, values: bool) -> Iterator[str]:
    """Write one change for people: a line, or for an update one for each field."""
    user = change.subject
    match change.kind:
        case "insert":
            yield f"+ {user}"
        case "restore":
            yield f"+ {user} (restored)"
        case "update":
            for field in change.fields:
                yield f"~ {user} {field.path}{_values(field) if values else ''}"
        case "delete":
            approved = " (approved)" if change.approved else ""
            yield f"- {user} gone: GET /users/{user} answered 404 USER_NOT_FOUND{approved}"
        case kind:
            yield f"! {user} {_STATES[kind]}: {change.reason}"


def sentence(plan: Plan) -> str:
    """Say in one line what a sweep would do."""
    # A row that is newer than the answer waits, too; who waits to be deleted is still a candidate.
    waiting = plan.counts["waiting"]
    suspected = max(0, plan.counts["candidates"] - waiting)
    counts = {**plan.counts, "waiting": waiting + plan.counts["stale"], "suspected": suspected}
    parts = [f"{counts[name]:,} {text}" for name, text in _SAID.items() if counts[name]]
    users = f"{counts['users']:,} user{'' if counts['users'] == 1 else 's'}"
    nothing = set(parts) <= {f"{counts['unchanged']:,} unchanged"}
    return f"{users}: {'nothing to do' if nothing else ', '.join(parts)}"


def as_object(change: Change, *, values: bool) -> dict[str, Any]:
    """Give one change as an object; a record whose id cannot be read has the id null."""
    known = is_user_id(change.subject)
    written: dict[str, Any] = {"change": change.kind, "id": change.subject if known else None}
    if not known:
        written["record"] = change.subject
    if change.kind == "update":
        written["fields"] = [_field(field, values=values) for field in change.fields]
    if change.asked_at is not None:
        written["approved"] = change.approved
        written["proof"] = {
            "status": 404,
            "code": "USER_NOT_FOUND",
            "asked_at": change.asked_at.isoformat(),
        }
    if change.reason:
        written["reason"] = change.reason
    return written


def summary(plan: Plan) -> dict[str, Any]:
    """Give what all changes come to."""
    return {
        "change": "summary",
        **plan.counts,
        "outcome": plan.outcome,
        "difference": plan.difference,
    }


def _values(field: Difference) -> str:
    return f": {_value(field.old)} → {_value(field.new)}"


def _value(value: Any) -> str:
    return repr(value) if value is ABSENT else readable(value)


def _field(field: Difference, *, values: bool) -> dict[str, Any]:
    """Give one field; what a record does not have has no value, not even null."""
    held = {"old": field.old, "new": field.new} if values else {}
    return {"path": field.path, **{name: v for name, v in held.items() if v is not ABSENT}}
