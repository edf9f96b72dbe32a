"""The users of a project as a plain dict, with all that the API ever knew of each of them."""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import count
from typing import Any

from tests.support.sweep_world import numbered, row_of
from worker.sandbox.api import Project

Record = dict[str, Any]

LONG_AGO = 1_600_000_000_000

# What a table has no character for, as JSON writes it.
_UNSTORABLE = re.compile(r"\\u0000|\\ud[89a-f][0-9a-f]{2}")

# Odd things in a record that the table takes once they are cleaned, and those that it never takes.
CLEANED: dict[str, Record] = {
    "NUL": {"server_metadata": {"a\0b": "c\0"}},
    "lone surrogate": {"server_metadata": ["\ud800", {"\udfff": 1}]},
}
REFUSED: dict[str, Record] = {
    "check": {"display_name": "Refused"},
    "data": {"display_name": "Impossible"},
    "nesting": {"server_metadata": json.loads("[" * 210 + "]" * 210)},
    "sign-up": {"signed_up_at_millis": 1.5},
}
# The database itself refuses the first two: for now (class 23), and for good (class 22).
CONSTRAINTS = """
alter table neon_auth.users_sync
    add check (name <> 'Refused'),
    add check (1 / (case name when 'Impossible' then 0 else 1 end) = 1)
"""


@dataclass(frozen=True)
class State:
    """What the API knew of one user from a moment on; without a record, it knew no such user.

    `row` is what the table must hold of it, None if the table cannot.
    """

    at: datetime
    record: Record | None = None
    row: tuple[Any, ...] | None = None
    listed: bool = False

    @property
    def key(self) -> tuple[Any, str] | None:
        return (self.record["signed_up_at_millis"], self.record["id"]) if self.record else None


@dataclass
class People:
    """Everybody who was ever there; `everybody_listed` says whether the list is asked for all."""

    project: Project
    now: Callable[[], datetime]
    everybody_listed: bool = True
    states: dict[str, list[State]] = field(default_factory=dict)
    _versions: Iterator[int] = field(default_factory=lambda: count(1))
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))

    @property
    def users(self) -> dict[str, Record]:
        """The model: whom the API knows, in the order of the list."""
        known = {i: states[-1].record for i, states in self.states.items()}
        users = [record for record in known.values() if record]
        in_order = sorted(users, key=lambda record: (record["signed_up_at_millis"], record["id"]))
        return {record["id"]: record for record in in_order}

    @property
    def departed(self) -> list[str]:
        return [user_id for user_id, states in self.states.items() if states[-1].record is None]

    @property
    def anonymous(self) -> list[str]:
        return [user_id for user_id in self.users if self.project.is_anonymous(user_id)]

    def sign_up(self, *, anonymous: bool = False, long_ago: bool = False) -> str:
        """Let somebody sign up: now, or with a sign-up that others share."""
        number = next(self._numbers)
        user_id = numbered(number * 7919 % 65_536)
        self.project.create(
            id=user_id,
            primary_email=f"{number}@example.com",
            client_metadata={"version": next(self._versions)},
            **({"is_anonymous": True} if anonymous else {}),
            **({"signed_up_at_millis": LONG_AGO + number % 3} if long_ago else {}),
        )
        self._learn(user_id)
        return user_id

    def edit(self, user_id: str) -> None:
        self._put(user_id, display_name=f"Name {next(self._versions)}")
        self._learn(user_id)

    def touch(self, user_id: str) -> None:
        """Change what is no change."""
        user = self.users[user_id]
        self.project.create(**{**user, "last_active_at_millis": user["last_active_at_millis"] + 1})
        self._learn(user_id)

    def delete(self, user_id: str) -> None:
        self.project.delete(user_id)
        self._append(user_id, State(self.now()))

    def restore(self, user_id: str, *, changed: bool) -> None:
        """Let somebody come back, as they were or not."""
        last = next(state.record for state in reversed(self.states[user_id]) if state.record)
        version = next(self._versions) if changed else last["client_metadata"]["version"]
        self.project.create(**{**last, "client_metadata": {"version": version}})
        self._learn(user_id)

    def hide(self, user_id: str) -> None:
        """Restrict a user, or end that; who is hidden so depends on what the list is asked for."""
        hidden = self.users[user_id]["is_restricted"]
        self._put(user_id)
        (self.project.unrestrict if hidden else self.project.restrict)(user_id)
        self._learn(user_id)

    def upgrade(self, user_id: str) -> None:
        """Let an anonymous user sign up properly, which moves them to the end of the list."""
        self._put(user_id)
        self.project.upgrade(user_id)
        self._learn(user_id)

    def make_odd(self, user_id: str, how: str) -> None:
        """Put something into a record that the table does not take, or not as it is."""
        record = {**self.users[user_id], "client_metadata": {"version": next(self._versions)}}
        odd = {**record, **CLEANED.get(how, {}), **REFUSED.get(how, {})}
        if how != "sign-up":
            self.project.create(**odd)
            self._learn(user_id)
            return
        # It keeps its place in the list, and is on every list.
        self.project.put_raw(user_id, record["signed_up_at_millis"], json.dumps(odd).encode())
        self._append(user_id, State(self.now(), record, None, listed=True))

    def state_at(self, user_id: str, moment: datetime) -> State | None:
        """Give what the API knew of a user at a moment; None before it ever heard of them."""
        known = [state for state in self.states.get(user_id, ()) if state.at <= moment]
        return known[-1] if known else None

    def states_since(self, user_id: str, moment: datetime) -> list[State]:
        """Give what the API knew of a user from a moment on, what it knew then included."""
        states = self.states.get(user_id, [])
        later = [state for state in states if state.at > moment]
        before = self.state_at(user_id, moment)
        return [before, *later] if before else later

    def version(self, user_id: str) -> int:
        """Give the newest version of a user that the API ever had."""
        versions = [
            int(state.record["client_metadata"]["version"])
            for state in self.states.get(user_id, ())
            if state.record
        ]
        return max(versions, default=0)

    def _put(self, user_id: str, **fields: Any) -> None:
        """Change a record; whatever was odd in it is in order again."""
        user = self.users[user_id]
        odd = {"display_name"} if user["display_name"] in {"Refused", "Impossible"} else set()
        plain = dict.fromkeys({"server_metadata", *odd})
        version = {"client_metadata": {"version": next(self._versions)}}
        self.project.create(**{**user, **plain, **version, **fields})

    def _learn(self, user_id: str) -> None:
        """Take over a record as the API tells it."""
        entry = self.project.find(user_id)
        assert entry is not None
        record = json.loads(entry.bodies[0])
        row = None if _is_refused(record) else row_of(cleaned(record))
        listed = self.everybody_listed or not record["is_restricted"]
        self._append(user_id, State(self.now(), record, row, listed))

    def _append(self, user_id: str, state: State) -> None:
        self.states.setdefault(user_id, []).append(state)


def _is_refused(record: Record) -> bool:
    return any(record.items() >= odd.items() for odd in REFUSED.values())


def cleaned(record: Record) -> Record:
    """Say what the table holds of a record with odd characters."""
    text = _UNSTORABLE.sub(r"\\ufffd", json.dumps(record))
    found: Record = json.loads(text)
    return found
