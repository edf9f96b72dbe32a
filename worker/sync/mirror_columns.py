"""What is known of many users, 32 bytes each: three arrays side by side, ordered by key."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Self

from worker.ids import ID_BYTES, pack, unpack_id
from worker.model import FINGERPRINT_BYTES, Key, Users

# A rebuilt stretch is in memory as objects for a moment; the users of a page stand nearer together.
LONGEST_STRETCH = 30_000


class Columns:
    """Keys and fingerprints instead of objects: a page of the list is a slice of each."""

    def __init__(self) -> None:
        self.millis = array("q")
        self.ids = bytearray()
        self.fingerprints = bytearray()

    @classmethod
    def of_keys(cls, keys: Iterable[tuple[int, bytes]]) -> Self:
        """Take (millis, 16-byte id) in order; no fingerprint is known."""
        columns = cls()
        for millis, packed in keys:
            columns.millis.append(millis)
            columns.ids += packed
        columns.fingerprints = bytearray(FINGERPRINT_BYTES * len(columns))
        return columns

    def __len__(self) -> int:
        return len(self.millis)

    def are(self, users: Users, low: int) -> bool:
        """Whether these users, as they are, stand here from this place on."""
        return self.have_keys(users, low) and (
            self.fingerprints[low * FINGERPRINT_BYTES : (low + len(users)) * FINGERPRINT_BYTES]
            == users.fingerprints
        )

    def have_keys(self, users: Users, low: int) -> bool:
        """Whether the keys of these users stand here from this place on."""
        high = low + len(users)
        same = self.millis[low:high] == users.millis
        return same and self.ids[low * ID_BYTES : high * ID_BYTES] == users.packed

    def extend(self, users: Users) -> None:
        """Put users behind all others."""
        self.millis += users.millis
        self.ids += users.packed
        self.fingerprints += users.fingerprints

    def packed(self, low: int, high: int) -> tuple[bytes, bytes]:
        """Give the sign-ups and ids of these rows as bytes, and their fingerprints."""
        keys = self.millis[low:high].tobytes() + self.ids[low * ID_BYTES : high * ID_BYTES]
        return keys, bytes(self.fingerprints[low * FINGERPRINT_BYTES : high * FINGERPRINT_BYTES])

    def extend_packed(self, keys: bytes, fingerprints: bytes) -> None:
        """Put rows behind all others, as `packed` gave them."""
        millis = len(fingerprints) // FINGERPRINT_BYTES * self.millis.itemsize
        self.millis.frombytes(keys[:millis])
        self.ids += keys[millis:]
        self.fingerprints += fingerprints

    def overwrite(self, users: Users, low: int) -> None:
        """Take over the fingerprints of users who stand here from this place on."""
        high = low + len(users)
        self.fingerprints[low * FINGERPRINT_BYTES : high * FINGERPRINT_BYTES] = users.fingerprints

    def insert(self, users: Users) -> None:
        """Insert new keys by one rebuilt stretch."""
        low, high = self.place(users.key(0)), self.place(users.key(len(users) - 1))
        if high - low > LONGEST_STRETCH and len(users) > 1:
            half = len(users) // 2
            self.insert(users[:half])
            self.insert(users[half:])
            return
        rows = [(*self.packed_key(at), self.fingerprint(at)) for at in range(low, high)]
        rows += zip(
            users.millis,
            map(users.packed_id, range(len(users))),
            map(users.fingerprint, range(len(users))),
            strict=True,
        )
        rows.sort()
        self.millis[low:high] = array("q", [row[0] for row in rows])
        self.ids[low * ID_BYTES : high * ID_BYTES] = b"".join([row[1] for row in rows])
        self.fingerprints[low * FINGERPRINT_BYTES : high * FINGERPRINT_BYTES] = b"".join(
            [row[2] for row in rows]
        )

    def cut_out(self, places: Sequence[int]) -> None:
        """Drop what stands at these places, in order."""
        # What stays moves up stretch by stretch: cutting out one by one would move all each time.
        stops = [*places, len(self)]
        end = stops[0]
        for at, next_at in pairwise(stops):
            end = self._move(at + 1, next_at, end)
        del self.millis[end:]
        del self.ids[end * ID_BYTES :]
        del self.fingerprints[end * FINGERPRINT_BYTES :]

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

    def fingerprint(self, at: int) -> bytes:
        return bytes(self.fingerprints[at * FINGERPRINT_BYTES : (at + 1) * FINGERPRINT_BYTES])

    def set(self, at: int, fingerprint: bytes) -> None:
        self.fingerprints[at * FINGERPRINT_BYTES : (at + 1) * FINGERPRINT_BYTES] = fingerprint

    def _packed_id(self, at: int) -> bytes:
        return bytes(self.ids[at * ID_BYTES : (at + 1) * ID_BYTES])

    def _move(self, low: int, high: int, to: int) -> int:
        """Move a stretch up to a lower place; returns where it ends."""
        end = to + high - low
        self.millis[to:end] = self.millis[low:high]
        for column, width in ((self.ids, ID_BYTES), (self.fingerprints, FINGERPRINT_BYTES)):
            column[to * width : end * width] = column[low * width : high * width]
        return end


def index(ids: bytes | bytearray, packed: bytes) -> int:
    """Find one of these ids, not parts of two neighbours; below zero if it is not there."""
    at = ids.find(packed)
    while at % ID_BYTES and at >= 0:
        at = ids.find(packed, at + 1)
    return at
