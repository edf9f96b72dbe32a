"""The proxy breaks off where it is told to, and nowhere else."""

from collections.abc import Callable, Iterator

import psycopg
import pytest

from tests.faults.proxy import Cut, Proxy, opened_proxy
from tests.support.waiting import until


@pytest.fixture
def proxy(database_url: str) -> Iterator[Proxy]:
    with psycopg.connect(database_url) as conn:
        conn.execute("create table t (n int)")
    with opened_proxy(database_url) as proxy:
        yield proxy


def write(url: str) -> None:
    with psycopg.connect(url) as conn:
        conn.execute("insert into t values (1)")
        conn.execute("insert into t values (%s)", (2,))


def test_passes_everything_on(proxy: Proxy, connection: psycopg.Connection) -> None:
    write(proxy.url)
    with psycopg.connect(proxy.url) as conn, conn.pipeline():
        conn.execute("insert into t values (%s)", (3,))
    assert numbers(connection) == [1, 2, 3]
    assert proxy.happened == []


@pytest.mark.parametrize(
    ("cut", "left"),
    [
        (Cut(1), []),  # begin
        (Cut(3, after=True), []),  # the second insert
        (Cut(4), []),  # commit
        (Cut(4, after=True), [1, 2]),
        (Cut(text=b"COMMIT", after=True), [1, 2]),
        (Cut(2, text=b"insert"), []),
    ],
)
def test_breaks_off_before_or_after_a_statement(
    proxy: Proxy, connection: psycopg.Connection, cut: Cut, left: list[int]
) -> None:
    proxy.cut(cut)
    with pytest.raises(psycopg.OperationalError):
        write(proxy.url)
    assert numbers(connection) == left
    until("it is known to have happened", lambda: len(proxy.happened) == 1)
    assert sessions(connection) == 0


def test_breaks_off_only_once(proxy: Proxy, connection: psycopg.Connection) -> None:
    proxy.cut(Cut(2))
    with pytest.raises(psycopg.OperationalError):
        write(proxy.url)
    write(proxy.url)
    assert (numbers(connection), proxy.happened) == ([1, 2], ["before insert"])


def test_after_death_no_connection_is_left_and_none_is_taken(
    proxy: Proxy, connect: Callable[[], psycopg.Connection]
) -> None:
    with psycopg.connect(proxy.url) as conn:
        conn.execute("insert into t values (1)")
        proxy.die()
        assert (numbers(connect()), sessions(connect())) == ([], 0)
        with pytest.raises(psycopg.OperationalError):
            conn.execute("select 1")
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(proxy.url)


def numbers(conn: psycopg.Connection) -> list[int]:
    return [row[0] for row in conn.execute("select n from t order by n")]


def sessions(conn: psycopg.Connection) -> int:
    """Count the sessions that came through the proxy: those by TCP."""
    row = conn.execute(
        "select count(*) from pg_locks where relation = 't'::regclass and pid <> pg_backend_pid()"
    ).fetchone()
    assert row
    return int(row[0])
