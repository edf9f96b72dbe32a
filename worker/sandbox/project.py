"""A Stack Auth project in memory: who is in it, and in which order the list has them."""

import json
import random
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from threading import RLock
from typing import Any
from uuid import uuid4

from worker.sandbox.records import (
    LATEST_SIGN_UP,
    RESTRICTED,
    UNRESTRICTED,
    Record,
    blank,
    invented,
    merged,
    written,
)

Key = tuple[int, str]


class Shown(IntEnum):
    """How far a list looks: it holds the users of its own kind and of those before it."""

    DEFAULT = 0
    RESTRICTED = 1
    ANONYMOUS = 2


@dataclass(frozen=True, slots=True)
class Entry:
    """A record in its place in the list; `bodies` is its JSON in two orders of keys.

    `active_at` is the moment of the last activity, in milliseconds.
    """

    key: Key
    shown: Shown
    bodies: tuple[bytes, bytes]
    active_at: int
    odd: bool = False


@dataclass(frozen=True, slots=True)
class Asked:
    """What one request wants of the list.

    `cursor` is the id of the first user wanted, or of the one before, if the list is not
    `inclusive` of it. `by_activity` asks for the order of the last activity.
    """

    limit: int | None
    cursor: str | None
    newest_first: bool
    shown: Shown
    inclusive: bool = True
    by_activity: bool = False


def wall_clock_millis() -> int:
    return time.time_ns() // 1_000_000


class Project:
    """A Stack Auth project: users in memory, in the order of the list. Thread-safe.

    Whatever is done to a user who is not there raises KeyError.
    """

    def __init__(
        self,
        project_id: str = "11111111-1111-4111-8111-111111111111",
        secret_server_key: str = "ssk_sandbox",  # noqa: S107  opens nothing but this fake
        now_millis: Callable[[], int] = wall_clock_millis,
    ) -> None:
        self.project_id = project_id
        self.secret_server_key = secret_server_key
        self._now_millis = now_millis
        self._lock = RLock()
        self._entries: dict[str, Entry] = {}
        self._keys: list[Key] = []

    def create(self, **fields: Any) -> str:
        """Add a user who signs up now, and return the id.

        `fields` are fields of the record, `id` and `signed_up_at_millis` included. Emails are
        lower-cased, an empty display name becomes null, and an anonymous or restricted user gets
        the reason, as on the real server. A record with the same id is replaced.
        """
        user_id = fields.get("id") or str(uuid4())
        millis = fields.get("signed_up_at_millis", self._now_millis())
        self._put(merged(blank(user_id, millis), fields))
        return user_id

    def populate(self, count: int, seed: int = 0) -> list[str]:
        """Add invented users, the same ones for the same seed, and return their ids in order.

        They signed up over two years until October 2025, some in the same millisecond, and about
        one in fifty is anonymous. Ids that are taken are passed over, so that the same seed can be
        used twice.
        """
        dice = random.Random(seed)  # noqa: S311  they need not be hard to guess
        with self._lock:
            ids: list[str] = []
            while len(ids) < count:
                latest = min(LATEST_SIGN_UP, self._now_millis())
                ids += self._put_new(invented(count - len(ids), dice, latest))
            return sorted(ids, key=lambda user_id: self._entries[user_id].key)

    def signs_in_with(self, email: object) -> bool:
        """Whether a user may sign in with this email address."""
        return any(
            user["primary_email_auth_enabled"] and user["primary_email"] == email
            for user in self.users().values()
        )

    def edit(self, user_id: str, **fields: Any) -> None:
        """Set fields of a record. A new `signed_up_at_millis` moves the user in the list."""
        with self._lock:
            self._put(merged(self._record(user_id), fields))

    def delete(self, user_id: str) -> None:
        with self._lock:
            entry = self._entries.pop(user_id)
            del self._keys[bisect_left(self._keys, entry.key)]

    def restrict(self, user_id: str) -> None:
        """Hide a user from the default list, as an administrator can."""
        self.edit(user_id, **RESTRICTED)

    def unrestrict(self, user_id: str) -> None:
        """Show a user again; an anonymous one stays restricted until the sign-up."""
        if not self.is_anonymous(user_id):
            self.edit(user_id, **UNRESTRICTED)

    def upgrade(self, user_id: str) -> None:
        """Let an anonymous user sign up properly, which moves the user to the end of the list.

        Two users of a test often share a millisecond; the new sign-up comes after all others all
        the same, as it would have for a person.
        """
        with self._lock:
            millis = max(self._now_millis(), self._keys[-1][0] + 1)
            self.edit(user_id, is_anonymous=False, signed_up_at_millis=millis, **UNRESTRICTED)

    def touch(self, user_id: str) -> None:
        """Refresh the user's session: `last_active_at_millis` alone changes, and always does."""
        with self._lock:
            last = self._record(user_id)["last_active_at_millis"]
            self.edit(user_id, last_active_at_millis=max(self._now_millis(), last + 1))

    def put_raw(self, user_id_or_label: str, signed_up_at_millis: int, raw: bytes) -> None:
        """Put an odd record into every list: these bytes, at (signed_up_at_millis, label).

        If the label is the id of a user, they take the place of that user's record.
        """
        key = (signed_up_at_millis, user_id_or_label)
        self._place(Entry(key, Shown.DEFAULT, (raw, raw), signed_up_at_millis, odd=True))

    def snapshot(self) -> "Project":
        """Copy the project as it is now: what a replica of the server's database still shows."""
        copy = Project(self.project_id, self.secret_server_key, self._now_millis)
        with self._lock:
            copy._entries, copy._keys = self._entries.copy(), self._keys.copy()
        return copy

    def users(self) -> dict[str, Record]:
        """Copy the well-formed records, by id, in the order of the list."""
        with self._lock:
            entries = [self._entries[user_id] for _, user_id in self._keys]
        return {entry.key[1]: json.loads(entry.bodies[0]) for entry in entries if not entry.odd}

    def ids(self) -> list[str]:
        """Everybody's ids in the order of the list, hidden users and labels of odd ones too."""
        with self._lock:
            return [user_id for _, user_id in self._keys]

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def find(self, user_id: str) -> Entry | None:
        """Look up a user, hidden or not, in either spelling: the real server does so, too.

        Without the lock, a user who is being edited could seem to be deleted.
        """
        with self._lock:
            return self._entries.get(user_id) or self._entries.get(user_id.lower())

    def is_anonymous(self, user_id: str) -> bool:
        with self._lock:
            return self._entries[user_id].shown is Shown.ANONYMOUS

    def page(self, asked: Asked) -> tuple[list[Entry], str | None]:
        """Cut a page out of the list; with it comes the id of the first user of the next page."""
        with self._lock:
            if asked.limit is None:
                return list(self._from_cursor(asked)), None
            found = list(islice(self._from_cursor(asked), asked.limit + 1))
        if len(found) <= asked.limit:
            return found, None
        return found[:-1], found[-1].key[1]

    def _from_cursor(self, asked: Asked) -> Iterator[Entry]:
        keys = self._by_activity() if asked.by_activity else self._keys
        start = self._start(asked, keys)
        if start is None:
            return iter(())
        places = range(start, -1, -1) if asked.newest_first else range(start, len(keys))
        entries = (self._entries[keys[place][1]] for place in places)
        return (entry for entry in entries if entry.shown <= asked.shown)

    def _by_activity(self) -> list[Key]:
        return sorted((entry.active_at, user_id) for user_id, entry in self._entries.items())

    def _start(self, asked: Asked, keys: list[Key]) -> int | None:
        """Find where the page starts; the cursor's user must be in this very list and spelling.

        That no user is found is what makes the list lie: the server answers with an empty page.
        """
        if asked.cursor is None:
            return len(keys) - 1 if asked.newest_first else 0
        entry = self._entries.get(asked.cursor)
        if entry is None or entry.shown > asked.shown:
            return None
        key = (entry.active_at, asked.cursor) if asked.by_activity else entry.key
        return bisect_left(keys, key) + first_behind(asked)

    def _record(self, user_id: str) -> Record:
        record: Record = json.loads(self._entries[user_id].bodies[0])
        return record

    def _put(self, record: Record) -> None:
        self._place(_entry(record))

    def _place(self, entry: Entry) -> None:
        with self._lock:
            if entry.key[1] in self._entries:
                self.delete(entry.key[1])
            self._entries[entry.key[1]] = entry
            insort(self._keys, entry.key)

    def _put_new(self, records: Iterable[Record]) -> list[str]:
        """Add many at once: one sort costs less than a hundred thousand insertions."""
        entries = [_entry(record) for record in records if record["id"] not in self._entries]
        self._entries.update((entry.key[1], entry) for entry in entries)
        self._keys.extend(entry.key for entry in entries)
        self._keys.sort()
        return [entry.key[1] for entry in entries]


def first_behind(asked: Asked) -> int:
    """Say how far from the cursor's user the page begins, in places of the list."""
    if asked.inclusive:
        return 0
    return -1 if asked.newest_first else 1


def _entry(record: Record) -> Entry:
    shown = Shown.RESTRICTED if record["is_restricted"] else Shown.DEFAULT
    if record["is_anonymous"]:
        shown = Shown.ANONYMOUS
    key = (record["signed_up_at_millis"], record["id"])
    return Entry(key, shown, written(record), record["last_active_at_millis"])
