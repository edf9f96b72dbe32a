"""The values everything else works with: users, their place in the list, and whole answers."""

import json
from array import array
from bisect import bisect_right
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, Protocol, Self, TypeGuard, overload

from worker.ids import HIGHEST_ID, ID_BYTES, id_before, pack_all, unpack_all, unpack_id

# A fingerprint tells two versions of one user apart, not users from each other: 64 bits are plenty.
FINGERPRINT_BYTES = 8
UNKNOWN_FINGERPRINT = bytes(FINGERPRINT_BYTES)

# What timestamptz holds, in milliseconds: from 4714-11-24 BC to the end of 294276 AD, where the
# double in between rounds the very last one up.
MIN_MILLIS = -210_866_803_200_000
MAX_MILLIS = 9_224_318_015_999_998

# More users in one answer make a server without a cap fail: it runs out of bind parameters.
LARGEST_PAGE = 30_000

# A page may begin with the two users that prove the chain, and needs a third to get on.
SMALLEST_PAGE = 3

# Rows without created_at sort before every sign-up there can be.
NO_MILLIS = -(2**63)

Key = tuple[int, str]
"""A user's place in the list: (signed_up_at_millis, id), compared in that order."""


def key_before(key: Key) -> Key:
    """Give the nearest key below this one, whether or not a user can have it."""
    millis, user_id = key
    below = id_before(user_id)
    return (millis - 1, HIGHEST_ID) if below is None else (millis, below)


class Proof(NamedTuple):
    """That a user is gone: GET answered 404 USER_NOT_FOUND to a request sent at `asked_at`."""

    user_id: str
    asked_at: datetime


def is_sign_up(millis: object) -> TypeGuard[int]:
    """Whether this can be `signed_up_at_millis` of a user in the table."""
    # A bool is an int to isinstance.
    return type(millis) is int and MIN_MILLIS <= millis <= MAX_MILLIS


@dataclass(frozen=True, slots=True)
class User:
    """One record of the users API that the table can hold.

    `json` is all of it, as it goes into the table. `fingerprint` is a short hash of it, without the
    ignored fields.
    """

    id: str
    millis: int
    fingerprint: bytes
    json: bytes

    @property
    def record(self) -> dict[str, Any]:
        """Read `json`, integers of any length included."""
        return dict(json.loads(self.json))

    @property
    def key(self) -> Key:
        return self.millis, self.id


@dataclass(frozen=True, slots=True)
class Users(Sequence[User]):
    """Users in the order of their keys, as columns: objects would take four times the memory.

    `packed` holds the ids, 16 bytes each, `fingerprints` 8 bytes each, `records` the JSON of each.
    Each user is made when it is asked for; a slice is of the same kind.
    """

    millis: "array[int]"
    packed: bytes
    fingerprints: bytes
    records: Sequence[bytes]

    @classmethod
    def of(cls, users: Iterable[User]) -> Self:
        ordered = sorted(users, key=lambda user: user.key)
        return cls(
            array("q", [user.millis for user in ordered]),
            pack_all([user.id for user in ordered]),
            b"".join([user.fingerprint for user in ordered]),
            [user.json for user in ordered],
        )

    def __len__(self) -> int:
        return len(self.millis)

    def __iter__(self) -> Iterator[User]:
        return map(self.__getitem__, range(len(self)))

    @overload
    def __getitem__(self, at: int) -> User: ...

    @overload
    def __getitem__(self, at: slice) -> Self: ...

    def __getitem__(self, at: int | slice) -> User | Self:
        if isinstance(at, slice):
            low, high, step = at.indices(len(self))
            return (
                self._between(low, max(low, high))
                if step == 1
                else self.only(range(low, high, step))
            )
        number = range(len(self))[at]
        millis, user_id = self.key(number)
        return User(user_id, millis, self.fingerprint(number), bytes(self.records[number]))

    def _between(self, low: int, high: int) -> Self:
        return type(self)(
            self.millis[low:high],
            self.packed[low * ID_BYTES : high * ID_BYTES],
            self.fingerprints[low * FINGERPRINT_BYTES : high * FINGERPRINT_BYTES],
            self.records[low:high],
        )

    def only(self, numbers: Sequence[int]) -> Self:
        """Give those of the users that have these numbers, which ascend."""
        if numbers and numbers[-1] - numbers[0] == len(numbers) - 1:
            return self._between(numbers[0], numbers[-1] + 1)
        return type(self)(
            array("q", [self.millis[n] for n in numbers]),
            b"".join([self.packed_id(n) for n in numbers]),
            b"".join([self.fingerprint(n) for n in numbers]),
            [self.records[n] for n in numbers],
        )

    def without(self, ids: Container[str]) -> Self:
        """Give the users that have none of these ids."""
        return self.only([n for n, user_id in enumerate(self.ids) if user_id not in ids])

    def key(self, number: int) -> Key:
        return self.millis[number], unpack_id(self.packed_id(number))

    def packed_id(self, number: int) -> bytes:
        return self.packed[number * ID_BYTES : (number + 1) * ID_BYTES]

    def fingerprint(self, number: int) -> bytes:
        return self.fingerprints[number * FINGERPRINT_BYTES : (number + 1) * FINGERPRINT_BYTES]

    def count_upto(self, key: Key | None) -> int:
        """Count the users up to this key, it included; none up to None."""
        return 0 if key is None else bisect_right(range(len(self)), key, key=self.key)

    @property
    def ids(self) -> list[str]:
        return unpack_all(self.packed)

    @property
    def size(self) -> int:
        """The length of all records in bytes."""
        return sum(map(len, self.records))

    @property
    def json(self) -> bytes:
        """All records as one JSON array."""
        # In one go: memory for a second copy of a page takes longer than all of this.
        parts = [b"[", *([b","] * (2 * len(self) - 1)), b"]"]
        parts[1:-1:2] = self.records
        return b"".join(parts)


NO_USERS = Users.of(())


class Chunk(NamedTuple):
    """What is known of neighbouring live rows, as it is saved.

    `keys` are 8 bytes of sign-up each, then 16 bytes of id each; `fingerprints` 8 bytes each.
    """

    keys: bytes
    fingerprints: bytes


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that cannot be stored as it is; `id` is None if not even that could be read.

    `payload` is the record as ASCII JSON, `error` a reason that quotes nothing of it.
    """

    id: str | None
    fingerprint: bytes
    payload: str
    error: str


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands in the list: its id and its sign-up, both as they came."""

    id: str
    millis: object

    @property
    def key(self) -> Key | None:
        """The key of a user, or None: the list is not sorted by what is no sign-up."""
        return (self.millis, self.id) if is_sign_up(self.millis) else None


class Places(Protocol):
    """Where the records of an answer stand, in its order; negative numbers count from the end."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> Place: ...


@dataclass(frozen=True, slots=True)
class KeyPlaces:
    """Places of users who all have a key, each made when it is asked for.

    `key` gives the nth key, counted from 0.
    """

    count: int
    key: Callable[[int], Key]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Place:
        millis, user_id = self.key(range(self.count)[number])
        return Place(user_id, millis)


def last_key(places: Places) -> Key | None:
    """Give the key of the last record that has one."""
    keys = (places[number].key for number in reversed(range(len(places))))
    return next((key for key in keys if key is not None), None)


@dataclass(frozen=True, slots=True)
class Page:
    """One answer of the list; of an id that comes twice the later record counts at the first place.

    `users` ascend by key. `places` are those of the records with a readable id, as they came;
    `ascending` and `descending` say whether they came in the order of their keys. `observed_at` is
    the moment it was asked for, on the database's clock.
    """

    users: Users
    unreadable: tuple[Unreadable, ...]
    places: Places
    ascending: bool
    descending: bool
    next_cursor: str | None
    observed_at: datetime
    cleaned: Sequence[str] = ()

    @property
    def ids(self) -> set[str]:
        """Every id that can be read: who is on the page is present, whatever the record holds."""
        return {*self.users.ids, *(bad.id for bad in self.unreadable if bad.id)}


@dataclass(frozen=True, slots=True)
class Single:
    """One answer about one user; `found` is None where the API proved that there is none."""

    found: User | Unreadable | None
    observed_at: datetime
    cleaned: bool = False
