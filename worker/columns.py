"""What is known of many users, 40 bytes each: four arrays side by side, ordered by key."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Self

from worker.ids import ID_BYTES, pack, unpack_id
from worker.model import (
    DIGEST_BYTES,
    MARK_BYTES,
    Key,
    Seen,
    User,
    pack_ids,
)

# A rebuilt stretch is in memory as objects for a moment; the users of a page stand nearer together.
LONGEST_STRETCH = 30_000


class Columns:
    """Keys, digests and marks instead of objects: a page of the list is a slice of each."""

    def __init__(self) -> None:
        self.millis = array("q")
        self.ids = bytearray()
        self.digests = bytearray()
        self.marks = bytearray()

    @classmethod
    def of_keys(cls, keys: Iterable[tuple[int, bytes]]) -> Self:
        """Take (millis, 16-byte id) in order; neither digest nor mark is known."""
        columns = cls()
        for millis, packed in keys:
            columns.millis.append(millis)
            columns.ids += packed
        columns.digests = bytearray(DIGEST_BYTES * len(columns))
        columns.marks = bytearray(MARK_BYTES * len(columns))
        return columns

    @classmethod
    def of_users(cls, users: Sequence[User]) -> Self:
        """Take users in order, with what is known of them without work."""
        columns = cls()
        columns.ids += pack_ids(users)
        # The next page begins with the last user again: that digest is worth some work.
        last = users[-1].digest if users else b""
        if isinstance(users, Seen):
            columns.millis = users.millis[:]
            columns.digests += bytes(DIGEST_BYTES * len(users))[len(last) :] + last
            columns.marks += users.marks or bytes(MARK_BYTES * len(users))
        else:
            columns.millis = array("q", [user.millis for user in users])
            columns.digests += b"".join([user.known_digest for user in users[:-1]]) + last
            columns.marks += b"".join([user.mark for user in users])
        return columns

    def __len__(self) -> int:
        return len(self.millis)

    def are(self, users: Sequence[User], low: int, high: int) -> bool:
        """Whether these users are this slice, as far as can be seen without unpacking any."""
        if isinstance(users, Seen):
            millis, ids = users.millis, users.packed
            same = self.marks[low * MARK_BYTES : high * MARK_BYTES] == users.marks
        else:
            millis = array("q", [user.millis for user in users])
            ids = pack_ids(users)
            digests = b"".join([user.digest for user in users])
            same = self.digests[low * DIGEST_BYTES : high * DIGEST_BYTES] == digests
        return same and self._have_keys(millis, ids, low, high)

    def extend(self, others: "Columns") -> None:
        """Put users behind all others."""
        self.millis += others.millis
        self.ids += others.ids
        self.digests += others.digests
        self.marks += others.marks

    def overwrite(self, others: "Columns") -> bool:
        """Take over what is known of users who are one slice; False if they are not."""
        low = self.place(others.key(0))
        high = low + len(others)
        if not self._have_keys(others.millis, others.ids, low, high):
            return False
        self.digests[low * DIGEST_BYTES : high * DIGEST_BYTES] = others.digests
        self.marks[low * MARK_BYTES : high * MARK_BYTES] = others.marks
        return True

    def insert(self, users: Sequence[User]) -> None:
        """Insert new keys, in order, by one rebuilt stretch."""
        low, high = self.place(users[0].key), self.place(users[-1].key)
        if high - low > LONGEST_STRETCH and len(users) > 1:
            half = len(users) // 2
            self.insert(users[:half])
            self.insert(users[half:])
            return
        rows = [(*self.packed_key(at), self.digest(at), self.mark(at)) for at in range(low, high)]
        new = Columns.of_users(users)
        rows += [(*new.packed_key(at), new.digest(at), new.mark(at)) for at in range(len(new))]
        rows.sort()
        self.millis[low:high] = array("q", [row[0] for row in rows])
        self.ids[low * ID_BYTES : high * ID_BYTES] = b"".join([row[1] for row in rows])
        self.digests[low * DIGEST_BYTES : high * DIGEST_BYTES] = b"".join([row[2] for row in rows])
        self.marks[low * MARK_BYTES : high * MARK_BYTES] = b"".join([row[3] for row in rows])

    def cut_out(self, places: Sequence[int]) -> None:
        """Drop what stands at these places, in order."""
        # What stays moves up stretch by stretch: cutting out one by one would move all each time.
        stops = [*places, len(self)]
        end = stops[0]
        for at, next_at in pairwise(stops):
            end = self._move(at + 1, next_at, end)
        del self.millis[end:]
        del self.ids[end * ID_BYTES :]
        del self.digests[end * DIGEST_BYTES :]
        del self.marks[end * MARK_BYTES :]

    def find(self, key: Key) -> int | None:
        at = self.place(key)
        found = at < len(self) and self.packed_key(at) == (key[0], pack(key[1]))
        return at if found else None

    def find_id(self, packed: bytes) -> int | None:
        """Find a user without its sign-up, by a look at every id."""
        at = index(self.ids, packed)
        return None if at < 0 else at // ID_BYTES

    def place(self, key: Key, *, behind: bool = False) -> int:
        """Return the index of the first key that is not below this one, or (behind) above it."""
        millis, packed = key[0], pack(key[1])
        low, high = bisect_left(self.millis, millis), bisect_right(self.millis, millis)
        bisect = bisect_right if behind else bisect_left
        return low + bisect(range(low, high), packed, key=self._packed_id)

    def key(self, at: int) -> Key:
        return self.millis[at], unpack_id(self._packed_id(at))

    def packed_key(self, at: int) -> tuple[int, bytes]:
        return self.millis[at], self._packed_id(at)

    def digest(self, at: int) -> bytes:
        return bytes(self.digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES])

    def mark(self, at: int) -> bytes:
        return bytes(self.marks[at * MARK_BYTES : (at + 1) * MARK_BYTES])

    def set(self, at: int, digest: bytes, mark: bytes) -> None:
        self.digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES] = digest
        self.marks[at * MARK_BYTES : (at + 1) * MARK_BYTES] = mark

    def _have_keys(self, millis: "array[int]", ids: bytes | bytearray, low: int, high: int) -> bool:
        same = self.millis[low:high] == millis
        return same and self.ids[low * ID_BYTES : high * ID_BYTES] == ids

    def _packed_id(self, at: int) -> bytes:
        return bytes(self.ids[at * ID_BYTES : (at + 1) * ID_BYTES])

    def _move(self, low: int, high: int, to: int) -> int:
        """Move a stretch up to a lower place; returns where it ends."""
        end = to + high - low
        self.millis[to:end] = self.millis[low:high]
        for column, width in (
            (self.ids, ID_BYTES),
            (self.digests, DIGEST_BYTES),
            (self.marks, MARK_BYTES),
        ):
            column[to * width : end * width] = column[low * width : high * width]
        return end


def index(ids: bytes | bytearray, packed: bytes) -> int:
    """Find one of these ids, not parts of two neighbours; below zero if it is not there."""
    at = ids.find(packed)
    while at % ID_BYTES and at >= 0:
        at = ids.find(packed, at + 1)
    return at
