"""Writes a user's JSON in one form, whichever way it came."""

import json
from collections.abc import Collection
from typing import Any

import orjson


def dump(value: Any) -> bytes:
    """Write JSON with sorted keys: the same bytes for the same value, whichever parser read it.

    orjson does not write integers over 64 bits; the standard library does. Raises RecursionError
    for nesting that neither of them writes.
    """
    try:
        return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
    except TypeError:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return text.encode()


def canonical(record: dict[str, Any], ignored_fields: Collection[str]) -> bytes:
    """Write a user's JSON without the fields whose change is no change."""
    kept = record.copy()
    for name in ignored_fields:
        kept.pop(name, None)
    return dump(kept)


def whole(record: dict[str, Any], canonical_json: bytes, ignored_fields: Collection[str]) -> bytes:
    """Write all of a user's JSON: what `canonical` wrote is copied, not written again."""
    ignored = {name: record[name] for name in ignored_fields if name in record}
    if not ignored:
        return canonical_json
    added = dump(ignored)
    return b"%b,%b" % (canonical_json[:-1], added[1:]) if canonical_json != b"{}" else added
