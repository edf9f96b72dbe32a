"""A clock that is set, never awaited: of the database as the worker sees it, and of the project."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

_FAKE_TIME = """
create schema faketime;
create table faketime.ahead (by interval not null);
insert into faketime.ahead values ('0 s');
create function faketime.clock_timestamp() returns timestamptz language sql volatile
as 'select pg_catalog.clock_timestamp() + by from faketime.ahead'
"""


@dataclass
class FakeTime:
    """How far the clock of one database is ahead; `query` runs a statement there."""

    query: Callable[..., list[tuple[Any, ...]]]
    seconds: float = 0

    def pass_by(self, seconds: float) -> None:
        self.set(self.seconds + seconds)

    def set(self, seconds: float) -> None:
        self.seconds = seconds
        self.query("update faketime.ahead set by = make_interval(secs => %s)", seconds)

    def now(self) -> datetime:
        """Tell the time as the database does."""
        moment: datetime = self.query("select faketime.clock_timestamp()")[0][0]
        return moment

    def monotonic(self) -> float:
        """Tell seconds as a machine does for which the same time has passed."""
        return time.monotonic() + self.seconds

    def millis(self) -> int:
        return real_millis() + int(self.seconds * 1000)


def real_millis() -> int:
    return time.time_ns() // 1_000_000


@contextmanager
def installed(query: Callable[..., list[tuple[Any, ...]]]) -> Iterator[FakeTime]:
    """Set the clock that whoever connects to the database from now on sees."""
    database = query("select current_database()")[0][0]
    query(_FAKE_TIME)
    query(f"alter database {database} set search_path = faketime, pg_catalog, public")
    yield FakeTime(query)
    query("drop schema faketime cascade")
    query(f"alter database {database} reset search_path")
