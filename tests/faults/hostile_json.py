"""JSON as an enemy writes it: values, records and whole answers, as bytes."""

import json
from typing import Any
from uuid import UUID

from hypothesis import strategies as st

# What has another meaning somewhere on the way: in Python, SQL, JSON, logs, shells and browsers.
TEXTS = [
    "__proto__",
    "constructor",
    "id",
    "signed_up_at_millis",
    "'; drop table neon_auth.users_sync; --",
    '" or 1=1 --',
    "\\",
    "\\\\'",
    "$1 %s %(id)s {users_sync}",
    "$$",
    "\u2028\u202e\ufeff",
    "<script>alert(1)</script>",
    "\n\r\t\x1b[31m",
    "\x7f\x80\uffff",
    "\U0001f600",
    "",
]

# Values that one parser reads in another way than the next one, or not at all.
RAW = [
    b"null",
    b"true",
    b"-0",
    b"-0.0",
    b"1.0",
    b"1e0",
    b"1E+2",
    b"18446744073709551616",
    b"-9223372036854775809",
    b"1" * 4300,
    b"1" * 4301,
    b"1e400",
    b"-1e400",
    b"1e-400",
    b"1e99999999999999999999",
    b"0e99999999999999999999",
    b"1e131072",
    b"0." + b"3" * 400,
    b'"\\u0000"',
    b'"\\ud800"',
    b'"\\ud83d\\ude00"',
    b'"\xff\xfe"',
    b'"\xed\xa0\x80"',
    b'"\x01"',
    b"NaN",
    b"-Infinity",
    b"01",
    b"[" * 199 + b"]" * 199,
    b"[" * 500 + b"]" * 500,
    b'{"a":' * 2000 + b"1" + b"}" * 2000,
    b'{"a":1,"a":2}',
    b'{"\\u0061":1,"a":2}',
    b'{"":0,"\\u0000":1,"\\ufffd":2}',
    b"[1,]",
    b"'a'",
    b"",
]

# Shown in an error by its number: as a whole it is too long to be shown.
odd: st.SearchStrategy[bytes] = st.integers(0, len(RAW) - 1).map(lambda number: RAW[number])
texts = st.sampled_from(TEXTS) | st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12
)
"""What a column of text can hold."""

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e15, 1e15) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=8,
)
"""What a table can hold as it is, but hostile in its texts."""

values: st.SearchStrategy[bytes] = odd | plain.map(
    lambda value: json.dumps(value, ensure_ascii=False).encode()
)
"""Values as they come over the wire."""


def user_id(number: int) -> str:
    return str(UUID(int=(number << 80) + 0x4000_8000_0000_0000_0000))


def written(fields: dict[str, bytes]) -> bytes:
    """Write an object whose values are written already."""
    return b"{%b}" % b",".join(b"%b:%b" % (json.dumps(n).encode(), v) for n, v in fields.items())


def page_of(items: bytes, cursor: bytes = b"null") -> bytes:
    """Write an answer of the list."""
    return b'{"items":%b,"is_paginated":true,"pagination":{"next_cursor":%b}}' % (items, cursor)


_ids = st.integers(0, 5).map(lambda number: b'"%b"' % user_id(number).encode()) | values
_millis = st.integers(0, 9).map(lambda number: b"%d" % number) | values
_fields = st.dictionaries(texts, values)
records: st.SearchStrategy[bytes] = (
    st.builds(
        lambda id_, millis, fields: written({"id": id_, "signed_up_at_millis": millis, **fields}),
        _ids,
        _millis,
        _fields,
    )
    | values
)
"""Mostly objects with an id and a sign-up."""

lists: st.SearchStrategy[bytes] = st.lists(records, max_size=4).map(
    lambda items: b"[%b]" % b",".join(items)
)


@st.composite
def ascending(draw: st.DrawFn) -> bytes:
    """Draw a list in order, for which nobody looks closer than needed, with odd values in it."""
    numbers = sorted(draw(st.sets(st.integers(0, 30), min_size=1, max_size=4)))
    items = []
    for number in numbers:
        keys: dict[str, Any] = {
            "id": b'"%b"' % user_id(number).encode(),
            "signed_up_at_millis": b"%d" % (number // 2),
        }
        items.append(written({**draw(_fields), **keys}))
    return b"[%b]" % b",".join(items)


answers: st.SearchStrategy[bytes] = st.builds(
    page_of, lists | ascending() | values, st.just(b"null") | values
)
"""Whole answers of the list, of which few are right."""


@st.composite
def damaged(draw: st.DrawFn, bodies: st.SearchStrategy[bytes] = answers) -> bytes:
    """Draw a body with a piece cut out, or put in."""
    body = draw(bodies)
    at = draw(st.integers(0, len(body)))
    end = draw(st.integers(at, min(len(body), at + 40)))
    piece = draw(st.binary(max_size=6) | st.sampled_from([b'"', b"\\", b"[", b"}", b"9" * 25]))
    return body[:at] + piece + body[end:]
