"""Reads a page fast: cuts it into records and fingerprints them without looking inside.

Nearly every user of nearly every page is unchanged, and to see that nothing need be decoded.
A page that is odd in any way is left to the careful reader.
"""

from array import array
from collections.abc import Collection, Sequence
from datetime import datetime
from itertools import islice
from operator import eq

import msgspec

from worker.ids import are_user_ids, pack_all
from worker.model import MAX_MILLIS, MIN_MILLIS, KeyPlaces, Page, Single, User, Users
from worker.stack_auth.careful_reader import MAX_RECORDS, storable
from worker.stack_auth.fingerprint import read_columns


class _Pagination(msgspec.Struct):
    next_cursor: str | None


class _Answer(msgspec.Struct):
    items: list[msgspec.Raw]
    pagination: _Pagination


_answer = msgspec.json.Decoder(_Answer)


def read_page(
    body: bytes | bytearray, observed_at: datetime, ignored_fields: Collection[str]
) -> Page | None:
    """Read one answer of `GET /users`; None if it needs a careful look.

    Ids and sign-ups are right then, and the order of the page. Whether the database can hold the
    records is not looked at: see `careful_reader.storable`.
    """
    try:
        answer = _answer.decode(body)
        ids, millis, fingerprints = read_columns(answer.items, ignored_fields)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if not _are_users(ids, millis):
        return None
    ascending = _ascend(millis, ids)
    if not ascending and not _ascend(millis[::-1], ids[::-1]):
        return None
    if not ascending:
        for column in (millis, ids, fingerprints, answer.items):
            column.reverse()
    users = Users(array("q", millis), pack_all(ids), b"".join(fingerprints), answer.items)
    count = len(users)
    return Page(
        users=users,
        unreadable=(),
        places=KeyPlaces(count, users.key if ascending else lambda n: users.key(count - 1 - n)),
        ascending=ascending,
        descending=not ascending or count == 1,
        next_cursor=answer.pagination.next_cursor,
        observed_at=observed_at,
    )


def read_unordered(
    body: bytes | bytearray, observed_at: datetime, ignored_fields: Collection[str]
) -> Page | None:
    """Read users in any order, such as that of their activity; None if it needs a careful look.

    They are put into the order of their keys; the page proves nothing about its neighbours.
    """
    try:
        records = _answer.decode(body).items
        ids, millis, fingerprints = read_columns(records, ignored_fields)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if records and not _are_users(ids, millis):
        return None
    found = (
        User(*each) for each in zip(ids, millis, fingerprints, map(bytes, records), strict=True)
    )
    return Page(
        users=Users.of(found),
        unreadable=(),
        places=(),
        ascending=False,
        descending=False,
        next_cursor=None,
        observed_at=observed_at,
    )


def read_user(
    body: bytes | bytearray, observed_at: datetime, ignored_fields: Collection[str]
) -> Single | None:
    """Read one answer of `GET /users/{id}`; None if it needs a careful look.

    The fingerprint is the one that the user has on a page that is read fast.
    """
    try:
        ids, millis, fingerprints = read_columns([msgspec.Raw(bytes(body).strip())], ignored_fields)
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if not _are_users(ids, millis):
        return None
    found = User(ids[0], millis[0], fingerprints[0], bytes(body).strip())
    users, unreadable, cleaned = storable(Users.of([found]), ignored_fields)
    return Single((*users, *unreadable)[0], observed_at, bool(cleaned))


def _are_users(ids: Sequence[str], millis: Sequence[int]) -> bool:
    """Whether there are some, each of them once, and all have ids and sign-ups as users have."""
    return (
        0 < len(ids) <= MAX_RECORDS
        and are_user_ids(ids)
        and len(set(ids)) == len(ids)
        and MIN_MILLIS <= min(millis) <= max(millis) <= MAX_MILLIS
    )


def _ascend(millis: list[int], ids: Sequence[str]) -> bool:
    """Whether users, each of whom is there once, stand in the order of the list."""
    if sorted(millis) != millis:
        return False
    # Few share a millisecond: only those are compared by their ids.
    ties = [at for at, tie in enumerate(map(eq, millis, islice(millis, 1, None))) if tie]
    return all(ids[at] < ids[at + 1] for at in ties)
