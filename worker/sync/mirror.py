"""The worker's picture of the live rows: keys in the list's order, and a fingerprint for each."""

import math
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

from worker.ids import LOWEST_ID, pack, unpack_id
from worker.model import NO_MILLIS, NO_USERS, UNKNOWN_FINGERPRINT, Chunk, Key, User, Users
from worker.sync.mirror_columns import Columns, index

# Users of a chunk: one changed user writes the fingerprints of all of it, 32 KB.
CHUNK = 4_096
LONGEST_CHUNK = 2 * CHUNK


class Span(NamedTuple):
    """The part of the list a page covers: after the first key, up to and with the second.

    None means no end in that direction: the spans of a walk cover everything.
    """

    after: Key | None
    upto: Key | None


@dataclass(frozen=True, slots=True)
class Delta:
    """What a page and the mirror disagree on.

    `changed` are users whose key or fingerprint differs or is unknown. `missing` and `moved` are
    keys that the mirror has within the span, but the page has not: of users who are not on the page
    at all, or there under another key. An unreadable record is on the page.
    """

    changed: Users = NO_USERS
    missing: list[Key] = field(default_factory=list)
    moved: list[Key] = field(default_factory=list)


class Mirror:
    """Keys and fingerprints of all live rows, 32 bytes each, ordered as the list is.

    A page of the list is a slice, and an unchanged page is recognized by comparing memory.
    """

    def __init__(self) -> None:
        self._rows = Columns()
        self._inserted: deque[tuple[float, bytes]] = deque()

    @classmethod
    def load(cls, keys: Iterable[tuple[int, bytes]]) -> "Mirror":
        """Take (millis, 16-byte id) of every live row, in the list's order; no more is known."""
        mirror = cls()
        mirror._rows = Columns.of_keys(keys)
        return mirror

    @classmethod
    def of_chunks(cls, chunks: Iterable[Chunk]) -> "Mirror":
        """Take what `chunks` gave."""
        mirror = cls()
        for chunk in chunks:
            mirror._rows.extend_packed(chunk.keys, chunk.fingerprints)
        return mirror

    def __len__(self) -> int:
        return len(self._rows)

    def cut(self, starts: Iterable[Key]) -> list[Key]:
        """Give the first key of each chunk: where these keys stand, and where one grew too long."""
        places = sorted({0, len(self), *map(self._rows.place, starts)})
        return [
            self._rows.key(at)
            for low, high in pairwise(places)
            for at in range(low, high, high - low if high - low <= LONGEST_CHUNK else CHUNK)
        ]

    def chunks(self, starts: Sequence[Key]) -> Iterator[Chunk]:
        """Give all that is known, cut at these keys."""
        places = [*map(self._rows.place, starts), len(self)]
        return (Chunk(*self._rows.packed(low, high)) for low, high in pairwise(places))

    def compare(self, users: Users, span: Span, present: Callable[[], set[str]]) -> Delta:
        """Find what differs between a page's users and the mirror, within the page's span.

        `present` gives every id on the page, readable record or not; it is asked only if a row has
        no user.
        """
        low, high = self._bounds(span)
        before = users.count_upto(span.after)
        behind = users.count_upto(span.upto) if span.upto else len(users)
        if behind - before == high - low and before <= low and self._rows.are(users, low - before):
            return Delta()
        left = {self._rows.packed_key(at): at for at in range(low, high)}
        places = [
            left.pop((users.millis[number], users.packed_id(number)), None)
            if before <= number < behind
            else self._rows.find(users.key(number))  # a user of the chain, met before
            for number in range(len(users))
        ]
        delta = Delta(self._differing(users, places))
        return self._with_rows_left(delta, users, left, present) if left else delta

    @staticmethod
    def _with_rows_left(
        delta: Delta,
        users: Users,
        left: Iterable[tuple[int, bytes]],
        present: Callable[[], set[str]],
    ) -> Delta:
        """Add the keys of rows whose users are not at their place on the page."""
        keys = [(millis, unpack_id(packed)) for millis, packed in left]
        there, readable = present(), set(users.ids)
        return replace(
            delta,
            missing=[key for key in keys if key[1] not in there],
            moved=[key for key in keys if key[1] in readable],
        )

    def differing(self, users: Users) -> Users:
        """Give those of these users, from anywhere in the list, whose rows are not as they are."""
        return self._differing(
            users, [self._rows.find(users.key(number)) for number in range(len(users))]
        )

    def _differing(self, users: Users, places: Sequence[int | None]) -> Users:
        """Give those of these users whose rows, at these places, are not as they are."""
        return users.only(
            [
                number
                for number, at in enumerate(places)
                if at is None or self._rows.fingerprint(at) != users.fingerprint(number)
            ]
        )

    def key_of(self, user_id: str) -> Key | None:
        """Give the key of a user's live row, if there is one; takes a look at every id."""
        at = self._rows.find_id(pack(user_id))
        return None if at is None else self._rows.key(at)

    def accept(self, users: Users) -> None:
        """Take over what the database now holds: new keys, and the fingerprints of all `users`."""
        rows = self._rows
        known = users.count_upto(rows.key(len(self) - 1)) if len(self) else 0
        if known:
            self._accept_known(users[:known])
        rows.extend(users[known:])

    def forget_fingerprint(self, key: Key) -> None:
        """Let the database decide about this user the next time."""
        at = self._rows.find(key)
        if at is not None:
            self._rows.set(at, UNKNOWN_FINGERPRINT)

    def remove(self, keys: Iterable[Key]) -> None:
        """Drop keys whose rows are no longer live, or stand elsewhere; unknown keys are none."""
        self._rows.cut_out(sorted({at for key in keys if (at := self._rows.find(key)) is not None}))

    def replace(self, ids: Iterable[str], keys: Iterable[tuple[int, bytes]]) -> None:
        """Know of these users only what is given: (millis, 16-byte id) of those that are live."""
        found = [at for user_id in ids if (at := self._rows.find_id(pack(user_id))) is not None]
        self._rows.cut_out(sorted(found))
        self.accept(
            Users.of(
                User(unpack_id(packed), millis, UNKNOWN_FINGERPRINT, b"") for millis, packed in keys
            )
        )

    def note_inserted(self, users: Users, at: float, kept_seconds: float = math.inf) -> None:
        """Remember for so long when rows were inserted: a list that lags may not have them yet."""
        while self._inserted and self._inserted[0][0] < at - kept_seconds:
            self._inserted.popleft()
        if users:
            self._inserted.append((at, users.packed))

    def inserted_since(self, user_id: str, since: float) -> bool:
        """Whether the row was inserted after that moment; what is older is forgotten."""
        while self._inserted and self._inserted[0][0] < since:
            self._inserted.popleft()
        packed = pack(user_id)
        return any(index(ids, packed) >= 0 for _, ids in self._inserted)

    def below(self, key: Key) -> Key | None:
        """Return the nearest key below this one that has a sign-up."""
        at = self._rows.place(key) - 1
        return self._rows.key(at) if at >= 0 and self._rows.millis[at] != NO_MILLIS else None

    def pairs_before(self, key: Key) -> Iterator[tuple[Key, Key]]:
        """Give pairs of neighbours below this key, the nearest first, then ever further down."""
        step = 1
        while (at := self._rows.place(key) - step) > 0 and self._rows.millis[at - 1] != NO_MILLIS:
            yield self._rows.key(at - 1), self._rows.key(at)
            step *= 2

    def pairs_after(self, key: Key) -> Iterator[tuple[Key, Key]]:
        """Give pairs of neighbours above this key, each from above, the nearest first."""
        at, step = self._rows.place(key, behind=True), 1
        while at + step < len(self):
            yield self._rows.key(at + step), self._rows.key(at + step - 1)
            step *= 2

    def middle(self, least: int) -> tuple[Key, Key] | None:
        """Give the two neighbours in the middle, where at least so many users have signed up."""
        first = self._rows.place((NO_MILLIS + 1, LOWEST_ID))
        if len(self) - first < least:
            return None
        at = (first + len(self)) // 2
        return self._rows.key(at - 1), self._rows.key(at)

    def keys(self) -> Iterable[Key]:
        """Give every key, in order."""
        return (self._rows.key(at) for at in range(len(self)))

    @property
    def size(self) -> int:
        """Give the bytes that it takes in memory, and those kept in reserve."""
        rows = self._rows
        return sum(map(sys.getsizeof, (rows.millis, rows.ids, rows.fingerprints)))

    def __contains__(self, key: Key) -> bool:
        return self._rows.find(key) is not None

    def _bounds(self, span: Span) -> tuple[int, int]:
        low = 0 if span.after is None else self._rows.place(span.after, behind=True)
        high = len(self) if span.upto is None else self._rows.place(span.upto, behind=True)
        return low, max(low, high)

    def _accept_known(self, users: Users) -> None:
        """Accept users up to the last row: mostly they are one slice, as a page is."""
        rows = self._rows
        low = rows.place(users.key(0))
        if rows.have_keys(users, low):
            rows.overwrite(users, low)
            return
        new = []
        for number in range(len(users)):
            at = rows.find(users.key(number))
            if at is None:
                new.append(number)
            else:
                rows.set(at, users.fingerprint(number))
        if new:
            rows.insert(users.only(new))
