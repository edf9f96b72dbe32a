"""The worker's picture of the live rows: keys in the list's order, and a digest for each."""

import math
import sys
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import NamedTuple

from worker.columns import Columns, index
from worker.ids import pack, unpack_id
from worker.model import UNKNOWN_DIGEST, UNKNOWN_MARK, Key, Seen, User, pack_ids

_key = attrgetter("key")

# Rows without created_at sort before every sign-up there can be.
NO_MILLIS = -(2**63)


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

    changed: Sequence[User] = field(default_factory=list)
    missing: list[Key] = field(default_factory=list)
    moved: list[Key] = field(default_factory=list)
    newcomers: bool = field(default=False, compare=False)


class Mirror:
    """Keys, digests and marks of all live rows, 40 bytes each, ordered as the list is.

    A page of the list is a slice, and an unchanged page is recognized by comparing memory.
    """

    def __init__(self) -> None:
        self._rows = Columns()
        self._inserted: deque[tuple[float, bytes]] = deque()

    @classmethod
    def load(cls, keys: Iterable[tuple[int, bytes]]) -> "Mirror":
        """Take (millis, 16-byte id) of every live row, in the list's order; no digest is known."""
        mirror = cls()
        mirror._rows = Columns.of_keys(keys)
        return mirror

    def __len__(self) -> int:
        return len(self._rows)

    def compare(self, users: Sequence[User], span: Span, present: Callable[[], set[str]]) -> Delta:
        """Find what differs between a page's users and the mirror, within the page's span.

        `users` ascend by key. `present` gives every id on the page, readable record or not; it is
        asked only if something differs.
        """
        low, high = self._bounds(span)
        if self._equals(low, high, users):
            return Delta()
        if low == high:
            return self._beyond_all(users, span)
        known = {self._rows.packed_key(at): at for at in range(low, high)}
        changed = [user for user in users if not self._is_known(known, user, span)]
        if not known:
            return Delta(changed)
        left = [(millis, unpack_id(packed)) for millis, packed in known]
        there, readable = present(), {user.id for user in users}
        return Delta(
            changed,
            missing=[key for key in left if key[1] not in there],
            moved=[key for key in left if key[1] in readable],
        )

    def _beyond_all(self, users: Sequence[User], span: Span) -> Delta:
        """Compare users of whom the mirror knows nobody within the span: who is there is new."""
        low = bisect_right(users, span.after, key=_key) if span.after else 0
        high = bisect_right(users, span.upto, low, key=_key) if span.upto else len(users)
        inside, outside = users[low:high], [*users[:low], *users[high:]]
        changed = [user for user in outside if not self._is_known({}, user, span)]
        if changed:
            return Delta(sorted([*changed, *inside], key=_key))
        return Delta(inside, newcomers=True) if inside else Delta()

    def accept(self, users: Sequence[User]) -> None:
        """Take over what the database now holds: new keys, and what is known of all of `users`."""
        rows = self._rows
        ordered = users if isinstance(users, Seen) else sorted(users, key=_key)
        behind = bisect_right(ordered, rows.key(len(self) - 1), key=_key) if len(self) else 0
        known = ordered[:behind]
        if known and not rows.overwrite(Columns.of_users(known)):
            self._accept_one_by_one(known)
        rows.extend(Columns.of_users(ordered[behind:]))

    def forget_digest(self, key: Key) -> None:
        """Let the database decide about this user the next time."""
        at = self._rows.find(key)
        if at is not None:
            self._rows.set(at, UNKNOWN_DIGEST, UNKNOWN_MARK)

    def remove(self, keys: Iterable[Key]) -> None:
        """Drop keys whose rows are no longer live, or stand elsewhere; unknown keys are none."""
        self._rows.cut_out(sorted({at for key in keys if (at := self._rows.find(key)) is not None}))

    def replace(self, ids: Iterable[str], keys: Iterable[tuple[int, bytes]]) -> None:
        """Know of these users only what is given: (millis, 16-byte id) of those that are live."""
        found = [at for user_id in ids if (at := self._rows.find_id(pack(user_id))) is not None]
        self._rows.cut_out(sorted(found))
        self.accept([User(unpack_id(packed), at, UNKNOWN_DIGEST, b"") for at, packed in keys])

    def note_inserted(
        self, users: Sequence[User], at: float, kept_seconds: float = math.inf
    ) -> None:
        """Remember for so long when rows were inserted: a list that lags may not have them yet."""
        while self._inserted and self._inserted[0][0] < at - kept_seconds:
            self._inserted.popleft()
        if users:
            self._inserted.append((at, pack_ids(users)))

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

    def keys(self) -> Iterable[Key]:
        """Give every key, in order."""
        return (self._rows.key(at) for at in range(len(self)))

    @property
    def size(self) -> int:
        """Give the bytes that it takes in memory, and those kept in reserve."""
        rows = self._rows
        return sum(map(sys.getsizeof, (rows.millis, rows.ids, rows.digests, rows.marks)))

    def __contains__(self, key: Key) -> bool:
        return self._rows.find(key) is not None

    def _bounds(self, span: Span) -> tuple[int, int]:
        low = 0 if span.after is None else self._rows.place(span.after, behind=True)
        high = len(self) if span.upto is None else self._rows.place(span.upto, behind=True)
        return low, max(low, high)

    def _equals(self, low: int, high: int, users: Sequence[User]) -> bool:
        """Whether the users are this slice, perhaps with rows just before it: the chain's users."""
        extra = len(users) - (high - low)
        return 0 <= extra <= low and self._rows.are(users, low - extra, high)

    def _is_known(self, known: dict[tuple[int, bytes], int], user: User, span: Span) -> bool:
        """Take a user out of the slice, and say whether it is as it was.

        One beyond the slice (a user of the chain) is looked up. Of a user with the same digest, but
        another mark, the mark is learnt.
        """
        rows = self._rows
        at = known.pop((user.millis, pack(user.id)), None) if known else None
        if at is None and not span.covers(user.key):
            at = rows.find(user.key)
        if at is None:
            return False
        if user.mark != UNKNOWN_MARK and rows.mark(at) == user.mark:
            return True
        if rows.mark(at) == UNKNOWN_MARK and rows.digest(at) == UNKNOWN_DIGEST:
            return False
        # Here the digest is found out, if it was not known: what comes in two forms has two marks.
        if rows.digest(at) != user.digest:
            return False
        rows.set(at, user.digest, user.mark)
        return True

    def _accept_one_by_one(self, users: Sequence[User]) -> None:
        rows, others, new = self._rows, Columns.of_users(users), list[User]()
        for number, user in enumerate(users):
            at = rows.find(user.key)
            if at is None:
                new.append(user)
            else:
                rows.set(at, others.digest(number), others.mark(number))
        if new:
            rows.insert(new)
