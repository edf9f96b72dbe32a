"""The worker's picture of the live rows: keys in the list's order, and a digest for each."""

import math
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from operator import attrgetter
from typing import NamedTuple

from worker.model import (
    DIGEST_BYTES,
    ID_BYTES,
    MARK_BYTES,
    UNKNOWN_DIGEST,
    UNKNOWN_MARK,
    Key,
    Seen,
    User,
    pack,
    pack_all,
    unpack_id,
)

_key = attrgetter("key")

# Rows without created_at sort before every sign-up there can be.
NO_MILLIS = -(2**63)

# A rebuilt stretch is in memory as objects for a moment; the users of a page stand nearer together.
LONGEST_STRETCH = 30_000


class Span(NamedTuple):
    """The part of the list a page covers: after the first key, up to and with the second.

    None means no end in that direction: the spans of a walk cover everything.
    """

    after: Key | None
    upto: Key | None

    def covers(self, key: Key) -> bool:
        above = self.after is None or key > self.after
        return above and (self.upto is None or key <= self.upto)


@dataclass(frozen=True, slots=True)
class Delta:
    """What a page and the mirror disagree on.

    `changed` are users whose key or digest differs or is unknown; `missing` are keys that the
    mirror has within the span while their ids are not on the page; `moved` are such keys whose
    users are on the page under another key. `newcomers` says that the mirror knows nobody of
    `changed`.
    """

    changed: list[User] = field(default_factory=list)
    missing: list[Key] = field(default_factory=list)
    moved: list[Key] = field(default_factory=list)
    newcomers: bool = field(default=False, compare=False)


class Mirror:
    """Keys, digests and marks of all live rows, 40 bytes each, ordered as the list is.

    Four arrays side by side instead of objects: a page of the list is a slice of each, and an
    unchanged page is recognized by comparing memory.
    """

    def __init__(self) -> None:
        self._millis = array("q")
        self._ids = bytearray()
        self._digests = bytearray()
        self._marks = bytearray()
        self._inserted: deque[tuple[float, bytes]] = deque()

    @classmethod
    def load(cls, keys: Iterable[tuple[int, bytes]]) -> "Mirror":
        """Take (millis, 16-byte id) of every live row, in the list's order; no digest is known."""
        mirror = cls()
        for millis, packed in keys:
            mirror._millis.append(millis)
            mirror._ids += packed
        mirror._digests = bytearray(DIGEST_BYTES * len(mirror))
        mirror._marks = bytearray(MARK_BYTES * len(mirror))
        return mirror

    def __len__(self) -> int:
        return len(self._millis)

    def compare(self, users: Sequence[User], span: Span, present: Callable[[], set[str]]) -> Delta:
        """Find what differs between a page's users and the mirror, within the page's span.

        `users` ascend by key. `present` gives every id on the page, readable record or not; it is
        asked only if something differs.
        """
        low, high = self._bounds(span)
        if self._equals(low, high, users):
            return Delta()
        known = {self._packed_key(at): at for at in range(low, high)}
        changed = [user for user in users if not self._is_known(known, user, span)]
        if not known:
            ends = (*changed[:1], *changed[-1:])
            nobody = low == high and all(span.covers(user.key) for user in ends)
            return Delta(changed, newcomers=nobody)
        left = [(millis, unpack_id(packed)) for millis, packed in known]
        there, readable = present(), {user.id for user in users}
        return Delta(
            changed,
            missing=[key for key in left if key[1] not in there],
            moved=[key for key in left if key[1] in readable],
        )

    def accept(self, users: Iterable[User]) -> None:
        """Take over what the database now holds: new keys, and what is known of all of `users`."""
        ordered = sorted(users, key=_key)
        behind = bisect_right(ordered, self._key(len(self) - 1), key=_key) if len(self) else 0
        if behind and not self._overwrite(ordered[:behind]):
            self._accept_one_by_one(ordered[:behind])
        self._append(ordered[behind:])

    def _overwrite(self, users: Sequence[User]) -> bool:
        """Take over what is known of users who are one slice; False if they are not."""
        low = self._place(users[0].key)
        high = low + len(users)
        millis, ids, digests, marks = _columns(users)
        if self._millis[low:high] != millis or self._ids[low * ID_BYTES : high * ID_BYTES] != ids:
            return False
        self._digests[low * DIGEST_BYTES : high * DIGEST_BYTES] = digests
        self._marks[low * MARK_BYTES : high * MARK_BYTES] = marks
        return True

    def _accept_one_by_one(self, users: Sequence[User]) -> None:
        new: list[User] = []
        for user in users:
            at = self._find(user.key)
            if at is None:
                new.append(user)
            else:
                self._set(at, user.known_digest, user.mark)
        if new:
            self._insert(new)

    def _append(self, users: Sequence[User]) -> None:
        millis, ids, digests, marks = _columns(users)
        self._millis += millis
        self._ids += ids
        self._digests += digests
        self._marks += marks

    def forget_digest(self, key: Key) -> None:
        """Let the database decide about this user the next time."""
        at = self._find(key)
        if at is not None:
            self._set(at, UNKNOWN_DIGEST, UNKNOWN_MARK)

    def remove(self, keys: Iterable[Key]) -> None:
        """Drop keys whose rows are no longer live, or stand elsewhere; unknown keys are none."""
        gone = sorted({at for key in keys if (at := self._find(key)) is not None})
        # What stays moves up stretch by stretch: cutting out one by one would move all each time.
        stops = [*gone, len(self)]
        end = stops[0]
        for at, next_at in pairwise(stops):
            end = self._move(at + 1, next_at, end)
        del self._millis[end:]
        del self._ids[end * ID_BYTES :]
        del self._digests[end * DIGEST_BYTES :]
        del self._marks[end * MARK_BYTES :]

    def replace(self, ids: Iterable[str], keys: Iterable[tuple[int, bytes]]) -> None:
        """Know of these users only what is given: (millis, 16-byte id) of those that are live."""
        found = [at for user_id in ids if (at := self._find_id(pack(user_id))) is not None]
        self.remove([self._key(at) for at in found])
        self.accept([User(unpack_id(packed), at, UNKNOWN_DIGEST, b"") for at, packed in keys])

    def note_inserted(
        self, users: Sequence[User], at: float, kept_seconds: float = math.inf
    ) -> None:
        """Remember for so long when rows were inserted: a list that lags may not have them yet."""
        while self._inserted and self._inserted[0][0] < at - kept_seconds:
            self._inserted.popleft()
        if users:
            self._inserted.append((at, pack_all(user.id for user in users)))

    def inserted_since(self, user_id: str, since: float) -> bool:
        """Whether the row was inserted after that moment; what is older is forgotten."""
        while self._inserted and self._inserted[0][0] < since:
            self._inserted.popleft()
        packed = pack(user_id)
        return any(_index(ids, packed) >= 0 for _, ids in self._inserted)

    def below(self, key: Key) -> Key | None:
        """Return the nearest key below this one that has a sign-up."""
        at = self._place(key) - 1
        return self._key(at) if at >= 0 and self._millis[at] != NO_MILLIS else None

    def keys(self) -> Iterable[Key]:
        """Give every key, in order."""
        return (self._key(at) for at in range(len(self)))

    def __contains__(self, key: Key) -> bool:
        return self._find(key) is not None

    def _bounds(self, span: Span) -> tuple[int, int]:
        low = 0 if span.after is None else self._place(span.after, behind=True)
        high = len(self) if span.upto is None else self._place(span.upto, behind=True)
        return low, max(low, high)

    def _equals(self, low: int, high: int, users: Sequence[User]) -> bool:
        """Whether the users are this slice, or the chain user before it and then this slice."""
        extra = len(users) - (high - low)
        if extra not in {0, 1} or low < extra:
            return False
        low -= extra
        if isinstance(users, Seen):
            return (
                self._marks[low * MARK_BYTES : high * MARK_BYTES] == users.marks
                and self._millis[low:high] == users.millis
                and self._ids[low * ID_BYTES : high * ID_BYTES] == users.packed
            )
        return (
            self._digests[low * DIGEST_BYTES : high * DIGEST_BYTES]
            == b"".join([user.digest for user in users])
            and self._millis[low:high] == array("q", [user.millis for user in users])
            and self._ids[low * ID_BYTES : high * ID_BYTES] == pack_all(user.id for user in users)
        )

    def _is_known(self, known: dict[tuple[int, bytes], int], user: User, span: Span) -> bool:
        """Take a user out of the slice, and say whether it is as it was.

        One beyond the slice (the chain user) is looked up. Of a user with the same digest, but
        another mark, the mark is learnt.
        """
        at = known.pop((user.millis, pack(user.id)), None) if known else None
        if at is None and not span.covers(user.key):
            at = self._find(user.key)
        if at is None:
            return False
        if user.mark != UNKNOWN_MARK and self._mark(at) == user.mark:
            return True
        if self._mark(at) == UNKNOWN_MARK and self._digest(at) == UNKNOWN_DIGEST:
            return False
        # Here the digest is found out, if it was not known: what comes in two forms has two marks.
        if self._digest(at) != user.digest:
            return False
        self._set(at, user.digest, user.mark)
        return True

    def _insert(self, users: Sequence[User]) -> None:
        """Insert new keys, in order, by one rebuilt stretch."""
        low, high = self._place(users[0].key), self._place(users[-1].key)
        if high - low > LONGEST_STRETCH and len(users) > 1:
            half = len(users) // 2
            self._insert(users[:half])
            self._insert(users[half:])
            return
        rows = [
            (*self._packed_key(at), self._digest(at), self._mark(at)) for at in range(low, high)
        ]
        rows += [(user.millis, pack(user.id), user.known_digest, user.mark) for user in users]
        rows.sort()
        self._millis[low:high] = array("q", [row[0] for row in rows])
        self._ids[low * ID_BYTES : high * ID_BYTES] = b"".join([row[1] for row in rows])
        self._digests[low * DIGEST_BYTES : high * DIGEST_BYTES] = b"".join([row[2] for row in rows])
        self._marks[low * MARK_BYTES : high * MARK_BYTES] = b"".join([row[3] for row in rows])

    def _move(self, low: int, high: int, to: int) -> int:
        """Move a stretch up to a lower place; returns where it ends."""
        end = to + high - low
        self._millis[to:end] = self._millis[low:high]
        self._ids[to * ID_BYTES : end * ID_BYTES] = self._ids[low * ID_BYTES : high * ID_BYTES]
        self._digests[to * DIGEST_BYTES : end * DIGEST_BYTES] = self._digests[
            low * DIGEST_BYTES : high * DIGEST_BYTES
        ]
        self._marks[to * MARK_BYTES : end * MARK_BYTES] = self._marks[
            low * MARK_BYTES : high * MARK_BYTES
        ]
        return end

    def _find(self, key: Key) -> int | None:
        at = self._place(key)
        found = at < len(self) and self._packed_key(at) == (key[0], pack(key[1]))
        return at if found else None

    def _find_id(self, packed: bytes) -> int | None:
        """Find a user without its sign-up, by a look at every id."""
        at = _index(self._ids, packed)
        return None if at < 0 else at // ID_BYTES

    def _place(self, key: Key, *, behind: bool = False) -> int:
        """Return the index of the first key that is not below this one, or (behind) above it."""
        millis, packed = key[0], pack(key[1])
        low, high = bisect_left(self._millis, millis), bisect_right(self._millis, millis)
        bisect = bisect_right if behind else bisect_left
        return low + bisect(range(low, high), packed, key=self._packed_id)

    def _packed_id(self, at: int) -> bytes:
        return bytes(self._ids[at * ID_BYTES : (at + 1) * ID_BYTES])

    def _packed_key(self, at: int) -> tuple[int, bytes]:
        return self._millis[at], self._packed_id(at)

    def _key(self, at: int) -> Key:
        return self._millis[at], unpack_id(self._packed_id(at))

    def _digest(self, at: int) -> bytes:
        return bytes(self._digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES])

    def _mark(self, at: int) -> bytes:
        return bytes(self._marks[at * MARK_BYTES : (at + 1) * MARK_BYTES])

    def _set(self, at: int, digest: bytes, mark: bytes) -> None:
        self._digests[at * DIGEST_BYTES : (at + 1) * DIGEST_BYTES] = digest
        self._marks[at * MARK_BYTES : (at + 1) * MARK_BYTES] = mark


def _columns(users: Sequence[User]) -> tuple["array[int]", bytes, bytes, bytes]:
    """Give millis, ids, digests and marks, as far as they are known without work."""
    # The next page begins with the last user again: that digest is worth some work.
    digests = [*(user.known_digest for user in users[:-1]), *(user.digest for user in users[-1:])]
    return (
        array("q", [user.millis for user in users]),
        pack_all(user.id for user in users),
        b"".join(digests),
        b"".join([user.mark for user in users]),
    )


def _index(ids: bytes | bytearray, packed: bytes) -> int:
    """Find one of these ids, not parts of two neighbours; below zero if it is not there."""
    at = ids.find(packed)
    while at % ID_BYTES and at >= 0:
        at = ids.find(packed, at + 1)
    return at
