"""Reads answers of the users API so that one odd record never costs the page it stands on.

Takes the pages that the fast reader leaves, and of all pages the records that changed.
"""

import json
import math
import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from datetime import datetime
from decimal import Decimal, InvalidOperation
from functools import partial
from typing import Any, NamedTuple

import orjson

from worker.ids import is_user_id
from worker.model import Page, Place, Single, Unreadable, User, Users, is_sign_up
from worker.stack_auth.canonical_json import canonical, whole
from worker.stack_auth.fingerprint import fingerprint

# Postgres fails on deep nesting (54001), and orjson cannot write more than 254 levels.
MAX_NESTING = 200

# Python refuses to read a longer integer in one go.
MAX_INTEGER_DIGITS = 4300

# No request asks for more, and the API cannot give more: it runs out of bind parameters.
MAX_RECORDS = 30_000

_TO_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = re.compile(rb"[:,\[\s-]\d{19}")
# Possessive, or a string of some megabytes would cost a hundred times its size in memory.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}]', re.DOTALL)
_UNSTORABLE_CHARACTER = re.compile("[\x00\ud800-\udfff]")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class BrokenBody(ValueError):
    """A body that is no answer of the users API: cut off, HTML, or of another form."""


class _Unstorable(ValueError):
    """What this record holds cannot be in the table."""


def parse_page(
    body: bytes | bytearray, observed_at: datetime, ignored_fields: Collection[str]
) -> Page:
    """Read one answer of `GET /users`. Raises BrokenBody if it is none."""
    answer, careful = _load(body)
    match answer:
        case {"items": list(items), "pagination": {"next_cursor": str() | None as next_cursor}}:
            pass
        case _:
            raise BrokenBody("the answer is not a list of users")
    if len(items) > MAX_RECORDS:
        raise BrokenBody(f"the answer has more than {MAX_RECORDS:,} records")
    found: dict[str | bytes, User | Unreadable] = {}
    placed: list[Place] = []
    cleaned: list[str] = []
    # As text a record takes a quarter of the memory: the object is let go as soon as it is read.
    items.reverse()
    while items:
        item = items.pop()
        record, was_cleaned = _read(item, ignored_fields, careful=careful)
        if record.id and record.id not in found:
            placed.append(Place(item["id"], item.get("signed_up_at_millis")))
        found[record.id or record.fingerprint] = record
        if was_cleaned and record.id:
            cleaned.append(record.id)
    keys = [place.key for place in placed if place.key is not None]
    ascending = sorted(keys)
    return Page(
        users=Users.of(record for record in found.values() if isinstance(record, User)),
        unreadable=tuple(record for record in found.values() if isinstance(record, Unreadable)),
        places=placed,
        ascending=keys == ascending,
        descending=keys == ascending[::-1],
        next_cursor=next_cursor,
        observed_at=observed_at,
        cleaned=tuple(cleaned),
    )


def parse_user(
    body: bytes | bytearray, observed_at: datetime, ignored_fields: Collection[str]
) -> Single:
    """Read one answer of `GET /users/{id}`. Raises BrokenBody if it is none."""
    answer, careful = _load(body)
    if not isinstance(answer, dict) or "id" not in answer:
        raise BrokenBody("the answer is not a user")
    record, cleaned = _read(answer, ignored_fields, careful=careful)
    return Single(record, observed_at, cleaned)


class Storable(NamedTuple):
    """Users whose records the database can hold, those it cannot hold, and whose were cleaned."""

    users: Users
    unreadable: Sequence[Unreadable] = ()
    cleaned: Sequence[str] = ()


def storable(users: Users, ignored_fields: Collection[str]) -> Storable:
    """Look into records as they came: clean what can be cleaned, and put the rest aside.

    Fingerprints stay those of the records as they came, so that each is known the next time.
    """
    records = [bytes(record) for record in users.records]
    odd = [number for number, record in enumerate(records) if not _is_plain(record)]
    if not odd:
        return Storable(replace(users, records=records))
    unreadable, put_aside, cleaned = [], set(), []
    for number in odd:
        item, careful = _load(records[number])
        record, was_cleaned = _read(item, ignored_fields, careful=careful)
        if isinstance(record, Unreadable):
            unreadable.append(replace(record, fingerprint=users.fingerprint(number)))
            put_aside.add(number)
        elif was_cleaned:
            records[number] = record.json
            cleaned.append(record.id)
    kept = replace(users, records=records).only(
        [n for n in range(len(users)) if n not in put_aside]
    )
    return Storable(kept, unreadable, cleaned)


def _is_plain(record: bytes) -> bool:
    """Whether jsonb has room for this JSON, as far as is cheap to tell.

    It has none for NUL, for what is no UTF-8, for the longest numbers, and for deep nesting: a
    level costs a bracket, some of which may be in strings. Lone surrogates were refused by the fast
    reader. A number with a huge exponent passes, and the database refuses its record.
    """
    return (
        record.count(b"{") + record.count(b"[") <= MAX_NESTING
        and not (b"\\" in record and b"\\u0000" in record)
        and (len(record) <= MAX_INTEGER_DIGITS or not _has_long_number(record))
        and (record.isascii() or _is_text(record))
    )


def _is_text(record: bytes) -> bool:
    try:
        record.decode()
    except UnicodeDecodeError:
        return False
    return True


def _load(body: bytes | bytearray) -> tuple[Any, bool]:
    """Read JSON, and say whether its records need a careful look.

    orjson reads nearly every page. It refuses a page for one lone surrogate, and turns integers
    over 64 bits into floats: the standard library reads those, slower.
    """
    if _has_long_number(body):
        return _load_slowly(body), True
    try:
        return orjson.loads(body), b"\\u0000" in body
    except orjson.JSONDecodeError:
        return _load_slowly(body), True


def _has_long_number(body: bytes | bytearray) -> bool:
    """Whether there may be an integer of over 64 bits; it may also be in a string."""
    return b"0" * 19 in body.translate(_TO_ZEROS) and _LONG_NUMBER.search(body) is not None


def _load_slowly(body: bytes | bytearray) -> Any:
    # Bytes that are no UTF-8 become lone surrogates, which cleaning then replaces.
    text = body.decode("utf-8", "surrogateescape")
    load = partial(json.loads, parse_int=_parse_int, parse_float=_parse_float, strict=False)
    try:
        try:
            return load(text)
        except RecursionError:
            return load(_cut_nesting(text))
    except ValueError:
        # The parser's own words quote the body, which holds personal data.
        raise BrokenBody("the answer is not JSON") from None


def _parse_int(digits: str) -> int | float:
    return int(digits) if len(digits.lstrip("-")) <= MAX_INTEGER_DIGITS else math.inf


def _parse_float(digits: str) -> int | float:
    """Read what no float holds as the integer that it is: jsonb has room for it."""
    number = float(digits)
    if math.isfinite(number):
        return number
    try:
        exact = Decimal(digits)
    except InvalidOperation:  # an exponent of more digits than even a Decimal takes
        return number
    return int(exact) if exact.adjusted() < MAX_INTEGER_DIGITS else number


def _cut_nesting(text: str) -> str:
    """Put null for what is nested too deep for any parser; its record is refused for its depth."""
    kept: list[str] = []
    depth, start, deepest = 0, 0, MAX_NESTING + 50
    for token in _STRING_OR_BRACKET.finditer(text):
        if token[0] in "[{":
            depth += 1
            if depth == deepest:
                kept.append(text[start : token.start()] + "null")
                start = len(text)  # if this is never closed, nothing is left to keep
        elif token[0] in "]}":
            if depth == deepest:
                start = token.end()
            depth -= 1
    return "".join(kept) + text[start:]


def _read(
    item: Any, ignored_fields: Collection[str], *, careful: bool
) -> tuple[User | Unreadable, bool]:
    """Turn one record into a user or say why it is none; and whether it had to be cleaned."""
    try:
        _check_form(item)
        cleaned = _clean(item) if careful else item
        canonical_json, text = _write(cleaned, ignored_fields)
    except _Unstorable as error:
        return _unreadable(item, ignored_fields, str(error)), False
    mark = fingerprint(canonical_json)
    user = User(cleaned["id"], cleaned["signed_up_at_millis"], mark, text)
    return user, cleaned is not item and cleaned != item


def _check_form(item: Any) -> None:
    """Be strict on what the table needs, and on nothing else."""
    if not isinstance(item, dict):
        raise _Unstorable("not a JSON object")
    if not is_user_id(item.get("id")):
        raise _Unstorable("id is not a lower-case UUID")
    millis = item.get("signed_up_at_millis")
    if type(millis) is not int:
        raise _Unstorable("signed_up_at_millis is not an integer")
    if not is_sign_up(millis):
        raise _Unstorable("signed_up_at_millis is out of the range of timestamptz")


def _write(record: dict[str, Any], ignored_fields: Collection[str]) -> tuple[bytes, bytes]:
    """Write a record's canonical JSON and all of its JSON."""
    too_deep = _Unstorable(f"nested deeper than {MAX_NESTING} levels")
    try:
        canonical_json = canonical(record, ignored_fields)
        text = whole(record, canonical_json, ignored_fields)
    except RecursionError:
        raise too_deep from None
    # A level costs a bracket, and few users have enough brackets to need a closer look.
    if text.count(b"{") + text.count(b"[") > MAX_NESTING and nesting(record) > MAX_NESTING:
        raise too_deep
    return canonical_json, text


def nesting(value: Any) -> int:
    """Count the levels of arrays and objects, without recursion."""
    depth, level = 0, [value]
    while level := [item for item in level if isinstance(item, dict | list)]:
        depth += 1
        level = [
            child for item in level for child in (item.values() if isinstance(item, dict) else item)
        ]
    return depth


def _clean(record: dict[str, Any]) -> dict[str, Any]:
    """Put U+FFFD for NUL and lone surrogates, in keys and values at any depth."""
    if nesting(record) > MAX_NESTING:
        raise _Unstorable(f"nested deeper than {MAX_NESTING} levels")
    return _clean_object(record)


def _clean_object(value: dict[str, Any]) -> dict[str, Any]:
    # Two names may become one; in sorted order the same one of them counts in every answer.
    return {_clean_text(name): _clean_value(value[name]) for name in sorted(value)}


def _clean_value(value: Any) -> Any:
    match value:
        case str():
            return _clean_text(value)
        case dict():
            return _clean_object(value)
        case list():
            return [_clean_value(item) for item in value]
        case float() if not math.isfinite(value):
            raise _Unstorable("a number that JSON does not have, or of more than 4300 digits")
        case _:
            return value


def _clean_text(text: str) -> str:
    return _UNSTORABLE_CHARACTER.sub(_REPLACEMENT, text)


def _unreadable(item: Any, ignored_fields: Collection[str], error: str) -> Unreadable:
    is_record = isinstance(item, dict)
    kept = {n: v for n, v in item.items() if n not in ignored_fields} if is_record else item
    found_id = item.get("id") if is_record else None
    return Unreadable(
        id=found_id if is_user_id(found_id) else None,
        fingerprint=fingerprint(_ascii_json(kept).encode()),
        payload=_ascii_json(item),
        error=error,
    )


def _ascii_json(value: Any) -> str:
    """Write JSON that any text column takes: NUL and surrogates stay escaped."""
    try:
        return json.dumps(value, sort_keys=True)
    except RecursionError:
        return json.dumps({"id": value.get("id")} if isinstance(value, dict) else None)
