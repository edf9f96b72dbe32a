"""A statement as a value: built where its tables are known, run where the transaction is owned."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from psycopg import sql

# A row of what a statement returned; none of ours returns more than one.
Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Statement:
    """One SQL statement with its parameters."""

    query: sql.SQL | sql.Composed
    params: Mapping[str, Any] = field(default_factory=dict)
