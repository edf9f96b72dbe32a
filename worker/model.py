"""The values everything else works with: users, their place in the list, and whole answers."""

import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol, TypeGuard, overload

from worker.ids import ID_BYTES, pack_all, unpack_all

# A digest tells two versions of one user apart, not users from each other: 64 bits are plenty.
DIGEST_BYTES = 8
UNKNOWN_DIGEST = bytes(DIGEST_BYTES)

MARK_BYTES = 8  # a hash of a record as it came
UNKNOWN_MARK = bytes(MARK_BYTES)

# What timestamptz holds, in milliseconds: from 4714-11-24 BC to the end of 294276 AD, where the
# double in between rounds the very last one up.
MIN_MILLIS = -210_866_803_200_000
MAX_MILLIS = 9_224_318_015_999_998

Key = tuple[int, str]
"""A user's place in the list: (signed_up_at_millis, id), compared in that order."""


def is_sign_up(millis: object) -> TypeGuard[int]:
    """Whether this can be `signed_up_at_millis` of a user in the table."""
    # A bool is an int to isinstance.
    return type(millis) is int and MIN_MILLIS <= millis <= MAX_MILLIS


@dataclass(frozen=True, slots=True)
class User:
    """One record of the users API that the table can hold.

    `json` is all of it, as it goes into the table: an object would take four times the memory.
    """

    id: str
    millis: int
    digest: bytes
    json: bytes
    mark: bytes = UNKNOWN_MARK

    @property
    def known_digest(self) -> bytes:
        """Give the digest, or UNKNOWN_DIGEST where finding it out would be work."""
        return self.digest

    @property
    def is_readable(self) -> bool:
        """Whether it is a user indeed, for all that can be seen."""
        return True

    @property
    def record(self) -> dict[str, Any]:
        """Read `json`, integers of any length included."""
        return dict(json.loads(self.json))

    @property
    def key(self) -> Key:
        return self.millis, self.id


class Records(Protocol):
    """What is on a page, by number in the order of the list."""

    def json(self, number: int) -> bytes: ...

    def joined(self, low: int, high: int) -> bytes: ...

    def are_readable(self, numbers: Iterable[int]) -> bool: ...

    def digest(self, number: int) -> bytes: ...


class SeenUser(User):
    """A user that is unpacked once somebody wants to know more than the mark."""

    __slots__ = ("_digest", "_number", "_records")

    _records: Records
    _number: int
    _digest: bytes

    def __init__(self, user_id: str, millis: int, mark: bytes, at: tuple[Records, int]) -> None:
        set_value = object.__setattr__
        set_value(self, "id", user_id)
        set_value(self, "millis", millis)
        set_value(self, "mark", mark)
        set_value(self, "_records", at[0])
        set_value(self, "_number", at[1])
        set_value(self, "_digest", UNKNOWN_DIGEST)

    @property
    def digest(self) -> bytes:
        if self._digest == UNKNOWN_DIGEST:
            object.__setattr__(self, "_digest", self._records.digest(self._number))
        return self._digest

    @property
    def known_digest(self) -> bytes:
        return self._digest

    @property
    def json(self) -> bytes:
        return self._records.json(self._number)

    @property
    def is_readable(self) -> bool:
        return self._records.are_readable((self._number,))


@dataclass(frozen=True, slots=True)
class Seen(Sequence[User]):
    """Users of a page whose records are still packed, ascending by key: columns, not objects.

    `packed` are the ids, 16 bytes each; `marks` are 8 bytes each, or none where nobody needs
    them. The first user has the number `first` among the records. A slice is one, too.
    """

    millis: "array[int]"
    packed: bytes
    marks: bytes
    records: Records
    first: int = 0

    def __len__(self) -> int:
        return len(self.millis)

    def __iter__(self) -> Iterator[User]:
        for number, (user_id, millis) in enumerate(zip(self.ids, self.millis, strict=True)):
            mark = self.marks[number * MARK_BYTES : (number + 1) * MARK_BYTES] or UNKNOWN_MARK
            yield SeenUser(user_id, millis, mark, (self.records, self.first + number))

    @overload
    def __getitem__(self, at: int) -> User: ...

    @overload
    def __getitem__(self, at: slice) -> "Seen": ...

    def __getitem__(self, at: "int | slice") -> "User | Seen":
        if isinstance(at, slice):
            return self._between(*at.indices(len(self)))
        number = range(len(self))[at]
        [user] = self._between(number, number + 1)
        return user

    def _between(self, low: int, high: int, step: int = 1) -> "Seen":
        if step != 1:
            raise ValueError("users of a page are a slice only in their order")
        return Seen(
            self.millis[low:high],
            self.packed[low * ID_BYTES : high * ID_BYTES],
            self.marks[low * MARK_BYTES : high * MARK_BYTES],
            self.records,
            self.first + low,
        )

    @property
    def ids(self) -> list[str]:
        return unpack_all(self.packed)

    @property
    def are_readable(self) -> bool:
        return self.records.are_readable(range(self.first, self.first + len(self)))

    @property
    def json(self) -> bytes:
        """Give all records as one JSON array."""
        return b"[%b]" % self.records.joined(self.first, self.first + len(self))


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A record that cannot be stored as it is; `id` is None if not even that could be read.

    `payload` is the record as ASCII JSON, `error` a reason that quotes nothing of it.
    """

    id: str | None
    digest: bytes
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
    the moment it was asked for, on the database's clock; `size` is the length of the body in bytes.
    `in_full` reads every record of a page of whose records some may be unreadable after all.
    """

    users: Sequence[User]
    unreadable: tuple[Unreadable, ...]
    places: Places
    ascending: bool
    descending: bool
    next_cursor: str | None
    observed_at: datetime
    cleaned: Sequence[str] = ()
    size: int = 0
    in_full: "Callable[[], Page] | None" = field(default=None, repr=False, compare=False)

    @property
    def ids(self) -> set[str]:
        """Every id that can be read: who is on the page is present, whatever the record holds."""
        return {*ids_of(self.users), *(bad.id for bad in self.unreadable if bad.id)}


@dataclass(frozen=True, slots=True)
class Single:
    """One answer about one user; `found` is None where the API proved that there is none."""

    found: User | Unreadable | None
    observed_at: datetime
    cleaned: bool = False


def ids_of(users: Sequence[User]) -> list[str]:
    """Give the ids of users, in order."""
    return users.ids if isinstance(users, Seen) else [user.id for user in users]


def pack_ids(users: Sequence[User]) -> bytes:
    """Write the ids of users, 16 bytes each."""
    return users.packed if isinstance(users, Seen) else pack_all(ids_of(users))


def are_readable(users: Sequence[User]) -> bool:
    """Whether all of them are users indeed, for all that can be seen."""
    return users.are_readable if isinstance(users, Seen) else all(u.is_readable for u in users)


def json_array(users: Sequence[User]) -> bytes:
    """Write the records of users as one JSON array."""
    return users.json if isinstance(users, Seen) else b"[%b]" % b",".join([u.json for u in users])
