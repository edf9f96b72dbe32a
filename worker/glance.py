"""Reads a page at a glance: who is on it, and a mark of each record as it came.

Nearly every user of nearly every page is unchanged, and to see that nothing need be unpacked. Of
each record the fields are cut out as they came, put in one order and hashed: equal marks mean equal
records. Whoever has another mark than before is unpacked after all, and compared by the digest.
"""

import re
from array import array
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
import orjson
from msgspec.structs import astuple

from worker.ids import pack_all
from worker.model import Page, Place, Seen
from worker.outline import are_users, ascend
from worker.unpacking import Unpacking, cut

# Records with more names than this are not worth learning.
MOST_FIELDS = 400

_NOTHING = msgspec.Raw(b"")
# A name with these is not written in JSON as it is.
_ESCAPED = re.compile(r'["\\\x00-\x1f]')


@dataclass(frozen=True, slots=True)
class _Form:
    """How a record is cut up: into id and sign-up, and one raw field for each of the names.

    The first `ignored` names do not count.
    """

    names: tuple[str, ...]
    ignored: int
    decoder: msgspec.json.Decoder[Any]

    def look_at(self, records: Sequence[msgspec.Raw]) -> tuple[list[str], list[int], list[int]]:
        """Give id, sign-up and mark of each record. Raises what msgspec does."""
        ids: list[str] = []
        millis: list[int] = []
        marks: list[int] = []
        counting = slice(2 + self.ignored, None)
        # One after another: the fields of all of them are too many for the processor's caches.
        for fields in map(astuple, map(self.decoder.decode, records)):
            ids.append(fields[0])
            millis.append(fields[1])
            # A name that was learnt later does not change the marks of those who do not have it.
            # Python's own hash of bytes, 64 bits and keyed anew in each process, takes a third of
            # the time of blake2b; a mark never leaves the process. Zero would be UNKNOWN_MARK.
            marks.append(hash(b",".join(fields[counting]).rstrip(b",")) or 1)
        return ids, millis, marks


class Glance:
    """Reads pages whose records hold no other names than those that were learnt."""

    def __init__(self, ignored_fields: Collection[str]) -> None:
        self._ignored = tuple(ignored_fields)
        self._form: _Form | None = None

    def read_page(
        self, body: bytes | bytearray, observed_at: datetime, in_full: Callable[[], Page]
    ) -> Page | None:
        """Read one answer of `GET /users`; None if it needs a closer look.

        Whether records can be stored is not looked at: `in_full` reads them all again, and should
        be asked as soon as one that may be unreadable counts.
        """
        form = self._form
        if form is None:
            return None
        try:
            records, next_cursor = cut(body)
            ids, millis, marks = form.look_at(records)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        ascending = _order(ids, millis)
        if ascending is None:
            return None
        if not ascending:
            for column in (records, ids, millis, marks):
                column.reverse()
        unpacking = Unpacking(body, self._ignored, not ascending, records)
        users = Seen(array("q", millis), pack_all(ids), array("q", marks).tobytes(), unpacking)
        first, last = (users[0], users[-1]) if ascending else (users[-1], users[0])
        return Page(
            users=users,
            unreadable=(),
            first=Place(first.id, first.millis),
            last=Place(last.id, last.millis),
            end=last.key,
            ascending=ascending,
            next_cursor=next_cursor,
            observed_at=observed_at,
            cleaned=unpacking.cleaned,
            size=len(body),
            in_full=in_full,
        )

    def learn(self, records: Iterable[bytes]) -> None:
        """Learn the names that the records of a page hold."""
        known = self._form.names if self._form else ()
        # Names are never forgotten: another set of as many might give another record equal marks.
        # They stay in the order in which they come, which is found again the quickest.
        names = dict.fromkeys(known)
        for record in records:
            with suppress(orjson.JSONDecodeError):  # as it may hold what only `json` reads
                names.update(dict.fromkeys(orjson.loads(record)))
        for name in ("id", "signed_up_at_millis"):
            names.pop(name, None)
        if len(known) < len(names) <= MOST_FIELDS and not _ESCAPED.search("".join(names)):
            self._form = _form(tuple(names), self._ignored)


def _order(ids: list[str], millis: list[int]) -> bool | None:
    """Whether the users ascend; None if they do not descend either, or not all are users."""
    if not are_users(ids, millis):
        return None
    if ascend(millis, ids):
        return True
    return False if ascend(millis[::-1], ids[::-1]) else None


def _attribute(number: int) -> str:
    return f"field_{number}"


def _form(names: Sequence[str], ignored_fields: Collection[str]) -> _Form:
    """Say how to cut up records with these names; those that do not count come first."""
    ignored = [name for name in names if name in ignored_fields]
    names = (*ignored, *(name for name in names if name not in ignored_fields))
    attributes = {_attribute(number): name for number, name in enumerate(names)}
    record = msgspec.defstruct(
        "Record",
        [("id", str), ("millis", int), *((each, msgspec.Raw, _NOTHING) for each in attributes)],
        rename={"millis": "signed_up_at_millis", **attributes},
        forbid_unknown_fields=True,
        gc=False,
    )
    return _Form(names, len(ignored), msgspec.json.Decoder(record))
