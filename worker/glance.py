"""Reads a page at a glance: who is on it, and a mark of each record as it came.

Nearly every user of nearly every page is unchanged, and to see that nothing need be unpacked. Of
each record the fields are cut out as they came, put in one order and hashed: equal marks mean equal
records. Whoever has another mark than before is unpacked after all, and compared by the digest.
"""

import re
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from typing import Any

import msgspec
import orjson
from msgspec.structs import astuple

from worker.ids import pack_all
from worker.model import KeyPlaces, Page, Seen
from worker.outline import are_users, ascend
from worker.unpacking import Unpacking, cut

# Records with more names than this are not worth learning.
MOST_FIELDS = 400

_NOTHING = msgspec.Raw(b"")
_FLAG = bool | None | msgspec.UnsetType
# A name with these is not written in JSON as it is.
_ESCAPED = re.compile(r'["\\\x00-\x1f]')


@dataclass(frozen=True, slots=True)
class _Names:
    """The names of all fields but id and sign-up, in this order.

    Those that do not count, flags (true, false or null) and any others.
    """

    ignored: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    others: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[str]:
        return chain(self.ignored, self.flags, self.others)


@dataclass(frozen=True, slots=True)
class _Form:
    """How a record is cut up: into id, sign-up and one field for each of the names."""

    names: _Names
    decoder: msgspec.json.Decoder[Any]

    def look_at(self, records: Sequence[msgspec.Raw]) -> tuple[list[str], list[int], list[int]]:
        """Give id, sign-up and mark of each record. Raises what msgspec does."""
        ids: list[str] = []
        millis: list[int] = []
        marks: list[int] = []
        first_flag = 2 + len(self.names.ignored)
        first_other = first_flag + len(self.names.flags)
        # One after another: the fields of all of them are too many for the processor's caches.
        for fields in map(astuple, map(self.decoder.decode, records)):
            ids.append(fields[0])
            millis.append(fields[1])
            # A name that was learnt later does not change the marks of those who do not have it.
            others = b",".join(fields[first_other:]).rstrip(b",")
            # Python's own hash of bytes, 64 bits and keyed anew in each process, takes a third of
            # the time of blake2b; a mark never leaves the process. Zero would be UNKNOWN_MARK.
            marks.append(hash((fields[first_flag:first_other], others)) or 1)
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
        count = len(users)
        # As they came: newest first, the last of the users is the first record.
        key = (lambda n: users[n].key) if ascending else (lambda n: users[count - 1 - n].key)
        return Page(
            users=users,
            unreadable=(),
            places=KeyPlaces(count, key),
            ascending=ascending,
            descending=not ascending or count == 1,
            next_cursor=next_cursor,
            observed_at=observed_at,
            cleaned=unpacking.cleaned,
            size=len(body),
            in_full=in_full,
        )

    def learn(self, records: Iterable[bytes]) -> None:
        """Learn the names that the records of a page hold, and which of them are flags.

        What comes later is no flag, for each more of those gives everybody another mark.
        """
        kinds: dict[str, set[type]] = {}
        for record in records:
            with suppress(orjson.JSONDecodeError):  # as it may hold what only `json` reads
                for name, value in orjson.loads(record).items():
                    kinds.setdefault(name, set()).add(type(value))
        for name in ("id", "signed_up_at_millis"):
            kinds.pop(name, None)
        known = self._form.names if self._form else None
        names = _learnt(known, kinds, self._ignored)
        learnable = len(list(names)) <= MOST_FIELDS and not _ESCAPED.search("".join(names))
        if names != known and learnable:
            self._form = _form(names)


def _learnt(
    known: _Names | None, kinds: Mapping[str, set[type]], ignored: Collection[str]
) -> _Names:
    """Add names, with the types of their values, to those that were known.

    Names are never forgotten: another set of as many might give another record equal marks. They
    stay in the order in which they come, which is found again the quickest.
    """
    if known is None:
        flags = [name for name in kinds if bool in kinds[name] and name not in ignored]
        known = _Names(flags=tuple(flags))
    flags = [name for name in known.flags if kinds.get(name, set()) <= {bool, type(None)}]
    others = [name for name in kinds if name not in ignored and name not in flags]
    return _Names(
        ignored=tuple(dict.fromkeys([*known.ignored, *(n for n in kinds if n in ignored)])),
        flags=tuple(flags),
        others=tuple(dict.fromkeys([*known.others, *others])),
    )


def _order(ids: list[str], millis: list[int]) -> bool | None:
    """Whether the users ascend; None if they do not descend either, or not all are users."""
    if not are_users(ids, millis):
        return None
    if ascend(millis, ids):
        return True
    return False if ascend(millis[::-1], ids[::-1]) else None


def _form(names: _Names) -> _Form:
    """Say how to cut up records with these names."""
    attributes = {name: f"field_{number}" for number, name in enumerate(names)}
    record = msgspec.defstruct(
        "Record",
        [
            ("id", str),
            ("millis", int),
            *((attributes[name], msgspec.Raw, _NOTHING) for name in names.ignored),
            *((attributes[name], _FLAG, msgspec.UNSET) for name in names.flags),
            *((attributes[name], msgspec.Raw, _NOTHING) for name in names.others),
        ],
        rename={"millis": "signed_up_at_millis", **{attributes[name]: name for name in names}},
        forbid_unknown_fields=True,
        gc=False,
    )
    return _Form(names, msgspec.json.Decoder(record))
