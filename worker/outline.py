"""Reads of a page who is on it and no more: enough to prove the chain and to ask for the next page.

The server can work on the next page while this one is read, compared and written.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import eq

import msgspec

from worker.decode import MAX_RECORDS
from worker.ids import are_user_ids
from worker.model import MAX_MILLIS, MIN_MILLIS, Key, KeyPlaces, Page


class _Who(msgspec.Struct, gc=False):
    id: str
    signed_up_at_millis: int


class Pagination(msgspec.Struct):
    """Where the list goes on."""

    next_cursor: str | None


class _Answer(msgspec.Struct):
    items: list[_Who]
    pagination: Pagination


_decoder = msgspec.json.Decoder(_Answer)


@dataclass(frozen=True, slots=True)
class Outline:
    """What a `Page` says of its place in the list, the same by the same names.

    All of its users ascend by key; `size` is in bytes.
    """

    keys: Sequence[Key]
    next_cursor: str | None
    size: int
    ascending: bool = True

    @property
    def descending(self) -> bool:
        return len(self.keys) == 1

    @property
    def places(self) -> KeyPlaces:
        return KeyPlaces(len(self.keys), self.keys.__getitem__)


@dataclass(frozen=True, slots=True)
class Arrival:
    """A page that came, and how to read all of it; that may raise Transient, but hardly ever does.

    A page that is odd in any way has been read already, and is its own outline.
    """

    outline: Outline | Page
    read: Callable[[], Page]


def outline_of(body: bytes | bytearray) -> Outline | None:
    """Read the outline of one answer of `GET /users`; None if it needs a closer look."""
    try:
        answer = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    ids = [who.id for who in answer.items]
    millis = [who.signed_up_at_millis for who in answer.items]
    if not are_users(ids, millis):
        return None
    if not ascend(millis, ids):
        return None
    keys = list(zip(millis, ids, strict=True))
    return Outline(keys, answer.pagination.next_cursor, len(body))


def are_users(ids: Sequence[str], millis: Sequence[int]) -> bool:
    """Whether there are some, each of them once, and all have ids and sign-ups as users have."""
    return (
        len(ids) <= MAX_RECORDS
        and are_user_ids(ids)
        and len(set(ids)) == len(ids)
        and MIN_MILLIS <= min(millis) <= max(millis) <= MAX_MILLIS
    )


def ascend(millis: list[int], ids: Sequence[str]) -> bool:
    """Whether users, each of whom is there once, stand in the order of the list."""
    if sorted(millis) != millis:
        return False
    # Few share a millisecond: only those are compared by their ids.
    ties = [at for at, tie in enumerate(map(eq, millis, islice(millis, 1, None))) if tie]
    return all(ids[at] < ids[at + 1] for at in ties)
