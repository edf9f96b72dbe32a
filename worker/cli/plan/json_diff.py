"""What differs between two records, path by path, as Postgres would compare them."""

import json
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")

# Python refuses to read a longer integer in one go.
_MAX_INTEGER_DIGITS = 4300


class _Absent:
    """What a record holds where it has no such key: not even null."""

    def __repr__(self) -> str:
        return "(absent)"


ABSENT: Final = _Absent()


@dataclass(frozen=True, slots=True)
class Difference:
    """One path into a record, as in `client_metadata.theme`, and what stands there."""

    path: str
    old: Any = ABSENT
    new: Any = ABSENT


def read_exactly(text: str | bytes) -> Any:
    """Read JSON without rounding numbers: `jsonb` keeps every digit.

    Raises RecursionError for nesting that is too deep.
    """
    return json.loads(text, parse_float=Decimal, parse_int=_parse_int)


def differences(
    old: dict[str, Any], new: dict[str, Any], ignored_fields: Collection[str] = ()
) -> Iterator[Difference]:
    """Give every path at which two records differ, in order; a list that differs is one."""
    for name in sorted((old.keys() | new.keys()) - set(ignored_fields)):
        yield from _within(_quoted(name), old.get(name, ABSENT), new.get(name, ABSENT))


def _within(path: str, old: Any, new: Any) -> Iterator[Difference]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            below = f"{path}.{_quoted(name)}"
            yield from _within(below, old.get(name, ABSENT), new.get(name, ABSENT))
    elif not _same(old, new):
        yield Difference(path, old, new)


def _same(old: Any, new: Any) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_same(old[name], new[name]) for name in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_same, old, new))
    # To Python true is 1.
    return isinstance(old, bool) is isinstance(new, bool) and bool(old == new)


def _quoted(name: str) -> str:
    return name if _IDENTIFIER.fullmatch(name) else readable(name)


def readable(value: Any) -> str:
    """Write a value as JSON on one line, without anything that a terminal would act upon."""
    text = json.dumps(value, ensure_ascii=False, default=_plain)
    return "".join(char if char.isprintable() else json.dumps(char)[1:-1] for char in text)


def as_json(value: Any) -> str:
    """Write a value as JSON in ASCII."""
    return json.dumps(value, default=_plain)


def _plain(number: Decimal) -> float | str:
    """Give a number in a form that is written; what no double holds is written as text."""
    return float(number) if Decimal(repr(float(number))) == number else str(number)


def _parse_int(digits: str) -> int | Decimal:
    return int(digits) if len(digits) <= _MAX_INTEGER_DIGITS else Decimal(digits)
