"""The projects behind the API: one that can change, and one of very many users that cannot."""

import random
from heapq import nlargest
from typing import Any

import orjson

from worker.sandbox.project import Asked, Entry, Key, Project, Shown, first_behind
from worker.sandbox.records import LATEST_SIGN_UP, SIGN_UP_SPAN, blank, invented

MOST_ACTIVE = 1_000


class Listed(Project):
    """A project that tells how long its list is, and by `version` whether it may have changed."""

    most_ready_bytes = 512 * 2**20
    version = 0

    def delete(self, user_id: str) -> None:
        super().delete(user_id)
        self.version += 1

    def _place(self, entry: Entry) -> None:
        super()._place(entry)
        self.version += 1

    def _by_activity(self) -> list[Key]:
        """Give those active last, and no more than a page of them: the real server has an index."""
        active = ((entry.active_at, user_id) for user_id, entry in self._entries.items())
        return nlargest(MOST_ACTIVE, active)[::-1]

    def behind(self, asked: Asked) -> int:
        """Say how many rows the real server reads for a page; without a cursor just the page."""
        start = self._start(asked, self._keys) if asked.cursor else None
        if start is None:
            return 0
        return start + 1 if asked.newest_first else len(self._keys) - start


class Long(Listed):
    """More users than would fit into memory as JSON: each record is written when it is sent."""

    most_ready_bytes = 0

    def __init__(self, count: int) -> None:
        super().__init__()
        dice = random.Random(0)
        step = SIGN_UP_SPAN / count
        first = LATEST_SIGN_UP - SIGN_UP_SPAN
        self._keys = [
            (
                first + int(number * step),
                f"{number:08x}-{dice.getrandbits(16):04x}-4000-8000-{0:012x}",
            )
            for number in range(count)
        ]
        self._templates = [_template(record) for record in invented(50, dice, LATEST_SIGN_UP)]

    def __len__(self) -> int:
        return len(self._keys)

    def find(self, user_id: str) -> Entry | None:
        asked = Asked(1, user_id, newest_first=False, shown=Shown.ANONYMOUS)
        at = self._start(asked, self._keys)
        return None if at is None else self._entry(at)

    def page(self, asked: Asked) -> tuple[list[Entry], str | None]:
        start = self._start(asked, self._keys)
        if start is None or asked.limit is None:
            return [], None
        if asked.newest_first:
            end = start - asked.limit
            following = self._keys[end][1] if end >= 0 else None
            return [self._entry(at) for at in range(start, max(-1, end), -1)], following
        end = start + asked.limit
        following = self._keys[end][1] if end < len(self._keys) else None
        return [self._entry(at) for at in range(start, min(end, len(self)))], following

    def _start(self, asked: Asked, keys: list[Key]) -> int | None:  # noqa: ARG002
        if asked.cursor is None:
            return len(self) - 1 if asked.newest_first else 0
        # The first part of an id is its number, in the order of the list.
        number = int(asked.cursor[:8], 16)
        there = number < len(self) and self._keys[number][1] == asked.cursor
        return number + first_behind(asked) if there else None

    def _entry(self, place: int) -> Entry:
        key: Key = self._keys[place]
        start, middle, end = self._templates[place % len(self._templates)]
        body = b"%b%b%b%d%b" % (start, key[1].encode(), middle, key[0], end)
        return Entry(key, Shown.DEFAULT, (body, body), active_at=key[0])


def _template(record: dict[str, Any]) -> tuple[bytes, bytes, bytes]:
    """Cut a record at its id and its sign-up."""
    body = orjson.dumps(blank("ID", 0) | record | {"id": "ID", "signed_up_at_millis": 424242})
    start, rest = body.split(b"ID", 1)
    middle, end = rest.split(b"424242", 1)
    return start, middle, end
