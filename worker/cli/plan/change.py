"""What a sweep would do to one user, and why it would leave one as it is."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from worker.cli.plan.json_diff import Difference, differences, read_exactly
from worker.model import User
from worker.stack_auth.careful_reader import MAX_NESTING, nesting

Kind = Literal["insert", "restore", "update", "delete", "hold", "wait", "quarantine", "hide"]

# Whence a column is written, where it does not follow from the record by itself.
_FIELDS = {
    "name": "display_name",
    "email": "primary_email",
    "created_at": "signed_up_at_millis",
}


@dataclass(frozen=True, slots=True)
class Change:
    """What would become of one user, or of a record in quarantine whose id cannot be read.

    `subject` is the user's id, or the digest of such a record. `fields` are what an update would
    change, `asked_at` is when the API was asked that proved a user gone, and `reason` says why a
    user would be left; it quotes no value.
    """

    kind: Kind
    subject: str
    fields: tuple[Difference, ...] = ()
    asked_at: datetime | None = None
    approved: bool = False
    reason: str = ""


def update(user: User, row: str, ignored_fields: Collection[str]) -> Change:
    """Compare a user with the row that an update would write: its record, and its columns."""
    return Change("update", user.id, tuple(_differing(user, row, ignored_fields)))


def _differing(user: User, row: str, ignored_fields: Collection[str]) -> Iterator[Difference]:
    new, found = read_exactly(user.json), _read_row(row)
    if found is None:
        yield Difference("column raw_json", "(nested too deep to be read)", new)
        return
    old = found["raw_json"]
    fields = list(differences(old, new, ignored_fields) if isinstance(old, dict) else ())
    yield from fields
    if not isinstance(old, dict):
        yield Difference("column raw_json", old, new)
    # A column that follows its field is no difference of its own.
    paths = {field.path for field in fields}
    for column, (holds, becomes) in found["columns"].items():
        if _FIELDS[column] not in paths:
            yield Difference(f"column {column}", holds, becomes)


def _read_row(row: str) -> dict[str, Any] | None:
    """Read a row, or nothing of one whose record is deeper than any that a sweep writes.

    How deep Python itself reads differs by version: 900 levels here, 9,000 there.
    """
    try:
        found: dict[str, Any] = read_exactly(row)
    except RecursionError:
        return None
    return found if nesting(found["raw_json"]) <= MAX_NESTING else None
