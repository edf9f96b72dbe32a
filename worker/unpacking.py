"""The records of one page, each of them unpacked only if somebody asks for it.

Most need not be: an unchanged user is known by the mark, and a new one goes into the table in the
very bytes that came.
"""

from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime

import msgspec

from worker.decode import MAX_INTEGER_DIGITS, MAX_NESTING, has_long_number, parse_record
from worker.ids import pack_all
from worker.model import Page, Seen, Unreadable, User
from worker.outline import Outline, Pagination


class _Answer(msgspec.Struct):
    items: list[msgspec.Raw]
    pagination: Pagination


_decoder = msgspec.json.Decoder(_Answer)


def cut(body: bytes | bytearray) -> tuple[list[msgspec.Raw], str | None]:
    """Cut an answer of the list into its records, and give the cursor of the next page.

    Raises what msgspec does.
    """
    answer = _decoder.decode(body)
    return answer.items, answer.pagination.next_cursor


@dataclass(slots=True)
class Unpacking:
    """The records of a body that was decoded before, numbered in the order of the list.

    `records` are those of the body in this order, if it has been cut into them already. `cleaned`
    are the ids of those that had to be cleaned, as far as they were unpacked.
    """

    body: bytes | bytearray
    ignored_fields: Collection[str]
    newest_first: bool = False
    records: list[msgspec.Raw] | None = None
    cleaned: list[str] = field(default_factory=list)
    _plain: bool = False

    def json(self, number: int) -> bytes:
        """Give a record as it goes into the table; the database judges one that is odd."""
        raw = bytes(self._cut()[number])
        if self._plain or is_plain(raw):
            return raw
        record = self._parsed(raw)
        return record.json if isinstance(record, User) else raw

    def joined(self, low: int, high: int) -> bytes:
        """Give records as they go into the table, with commas between them."""
        joined = b",".join(self._cut()[low:high])
        if self._plain or is_plain(joined):
            return joined
        return b",".join([self.json(number) for number in range(low, high)])

    def digest(self, number: int) -> bytes:
        return self._parsed(bytes(self._cut()[number])).digest

    def raws(self) -> Iterable[bytes]:
        """Give all records as they came."""
        return map(bytes, self._cut())

    def are_readable(self, numbers: Iterable[int]) -> bool:
        """Whether each of them can be stored, cleaned if need be, for all that can be seen."""
        records = self._cut()
        return self._plain or not any(_may_be_unreadable(bytes(records[n])) for n in numbers)

    def are_plain(self) -> bool:
        """Whether all of them can be stored as they came."""
        if not self._plain:
            self._plain = is_plain(self.body) and not any(map(_may_be_too_deep, self.raws()))
        return self._plain

    def _cut(self) -> list[msgspec.Raw]:
        if self.records is None:
            self.records, _ = cut(self.body)
            if self.newest_first:
                self.records.reverse()
        return self.records

    def _parsed(self, raw: bytes) -> User | Unreadable:
        record, was_cleaned = parse_record(raw, self.ignored_fields)
        if was_cleaned and record.id and record.id not in self.cleaned:
            self.cleaned.append(record.id)
        return record


def packed_page(outline: Outline, records: Unpacking, observed_at: datetime) -> Page:
    """Make the page of an outline whose records are plain; nobody gets a mark."""
    millis, ids = zip(*outline.keys, strict=True)
    return Page(
        users=Seen(array("q", millis), pack_all(ids), b"", records),
        unreadable=(),
        places=outline.places,
        ascending=True,
        descending=outline.descending,
        next_cursor=outline.next_cursor,
        observed_at=observed_at,
        cleaned=records.cleaned,
        size=outline.size,
    )


def _may_be_too_deep(raw: bytes) -> bool:
    # A level costs a bracket; some of them may be in strings.
    return raw.count(b"{") + raw.count(b"[") > MAX_NESTING


def _may_be_unreadable(raw: bytes) -> bool:
    return _may_be_too_deep(raw) or (len(raw) > MAX_INTEGER_DIGITS and has_long_number(raw))


def is_plain(records: bytes | bytearray) -> bool:
    """Whether what was decoded by msgspec can be stored as it is: it refuses all else that is odd.

    jsonb has no room for NUL, text must be UTF-8, and of long numbers a float would lose digits.
    """
    try:
        records.decode()
    except UnicodeDecodeError:
        return False
    return b"\\u0000" not in records and not has_long_number(records)
