"""The connection: what becomes of every error, and that a broken one is replaced."""

import math
import re
import socket
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from tests.conftest import remove_data
from tests.support.store_target import IGNORED, PROJECT, Target, people, person
from tests.support.sweep_world import Nobody
from tests.support.waiting import until
from worker.clock import Clock
from worker.errors import (
    Blocked,
    DatabaseUnavailable,
    DataRefused,
    Misconfigured,
    Stopped,
    Transient,
    UsersSyncError,
)
from worker.ids import pack
from worker.model import Users
from worker.retry import Retry
from worker.sandbox.postgres import EmbeddedPostgres
from worker.store.connection import (
    TIDYING_SECONDS,
    Connection,
    DeadlineConnection,
    Stopping,
    unless_stopped,
)
from worker.store.database import Database, connect, names_code
from worker.store.lease import Lease, LeaseRequest
from worker.store.migrate import prepare
from worker.store.table import Table
from worker.store.transaction import Statement, long_transaction

RAISE = """
do $$ begin
    raise exception 'words' using errcode = '{state}', detail = 'Key (email)=(ada@example.com)';
end $$
"""

# Much shorter than a connection is waited for, and much longer than anything else takes.
PATIENCE_SECONDS = 5

SSL_REQUEST = bytes([0, 0, 0, 8, 4, 210, 22, 47])


def ping(conn: Connection) -> int:
    return conn.info.backend_pid


def database_at(url: str, retry_seconds: float = 0) -> Database:
    retry = Retry("the database", retry_seconds / 60, Event(), DatabaseUnavailable)
    return Database(url, Clock(), retry)


def chain(error: BaseException | None) -> str:
    """Give the words of an error and of all that it came from, as a traceback would show them."""
    words = []
    while error is not None:
        words.append(str(error))
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    return "\n".join(words)


@contextmanager
def refusing_server(words: str, state: str = "XX000", severity: str = "FATAL") -> Iterator[str]:
    """Answer every connection with this error, and no TLS; gives the URL, with a password."""
    texts = (f"S{severity}", "VFATAL", f"C{state}", f"M{words}", "Lauth_failed", "Rauth.c")
    over = Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = Thread(target=_refuse, args=(listener, texts, over))
        thread.start()
        try:
            yield f"postgresql://ada:hunter2@127.0.0.1:{listener.getsockname()[1]}/app"
        finally:
            over.set()
            thread.join()


def _refuse(listener: socket.socket, texts: Sequence[str], over: Event) -> None:
    listener.settimeout(0.05)
    fields = b"".join(f"{text}\0".encode() for text in texts)
    answer = b"E" + (len(fields) + 5).to_bytes(4, "big") + fields + b"\0"
    while not over.is_set():
        with suppress(TimeoutError, OSError), listener.accept()[0] as client:
            client.settimeout(5)
            while client.recv(4096) == SSL_REQUEST:
                client.sendall(b"N")
            client.sendall(answer)


def test_nothing_is_opened_before_it_is_needed() -> None:
    database_at("postgresql://nobody@127.0.0.1:1/none").close()


def test_connection_is_opened_once(empty_target: Target) -> None:
    database = empty_target.database()
    pids = {database.call(ping) for _ in range(3)}
    assert len(pids) == 1


def test_closed_connection_is_opened_again(empty_target: Target) -> None:
    database = empty_target.database()
    before = database.call(ping)
    database.close()
    database.close()
    assert database.call(ping) != before


def test_opening_sets_the_clock(empty_target: Target) -> None:
    database = empty_target.database(monotonic=lambda: 1000.0)
    before = empty_target.now()
    database.call(ping)
    assert before < database.clock.now() < empty_target.now()


@pytest.mark.parametrize("style", ["SQL, DMY", "German"])
def test_moments_are_read_whatever_style_the_server_writes_them_in(
    connection: psycopg.Connection, database_url: str, style: str
) -> None:
    name = sql.Identifier(connection.info.dbname)
    connection.execute(sql.SQL("alter database {} set datestyle to {}").format(name, style))
    database = database_at(database_url)
    try:
        prepare(database, "neon_auth")
        lease = Lease(database, LeaseRequest("neon_auth", PROJECT, "one", 60))
        assert lease.acquire()
        lease.bind()
        lease.commit([], 1)
    finally:
        database.close()


STATEMENTS = {
    "select 2147483647 + 1": ("22003", DataRefused),
    "select 'ada@example.com'::int": ("22P02", DataRefused),
    "select set_config('lock_timeout', '999999999999', true)": ("22023", DataRefused),
    "set statement_timeout = 50; select pg_sleep(9)": ("57014", Blocked),
    "set default_transaction_read_only = on; create table t ()": ("25006", DatabaseUnavailable),
    "create sequence s; select currval('s')": ("55000", DatabaseUnavailable),
    "select pg_terminate_backend(pg_backend_pid())": ("57P01", DatabaseUnavailable),
    "select count(*) from pg_class for update": ("0A000", Misconfigured),
    "create table no_such_schema.t ()": ("3F000", Misconfigured),
    "create database d template no_such_database": ("3D000", Misconfigured),
    "select * from no_such_table": ("42P01", Misconfigured),
}


@pytest.mark.parametrize("statement", STATEMENTS)
def test_error_says_what_to_do(empty_target: Target, statement: str) -> None:
    state, kind = STATEMENTS[statement]
    *before, last = statement.split("; ")

    def work(conn: Connection) -> None:
        for each in before:
            conn.execute(each.encode())
        conn.execute(last.encode())

    with pytest.raises(kind) as caught:
        empty_target.database().call(work)
    assert state in str(caught.value)
    assert "example.com" not in chain(caught.value)


@pytest.mark.parametrize(
    "state",
    [
        "22003",
        "23505",
        "54001",
        "P0001",
        "44000",
        "U0001",
        "HV000",
        "20000",
        "34000",
        "55P03",
        "57014",
        "08006",
        "25006",
        "40001",
        "40P01",
        "53300",
        "55000",
        "57P01",
        "58030",
        "XX000",
        "0A000",
        "28000",
        "3D000",
        "3F000",
        "42501",
    ],
)
def test_error_that_an_author_raises_is_about_a_row_and_never_tells_its_words(
    empty_target: Target, state: str
) -> None:
    database = empty_target.database()
    with pytest.raises(DataRefused) as caught:
        database.call(lambda conn: conn.execute(RAISE.format(state=state).encode()))
    assert (caught.value.code, caught.value.sqlstate) == (state, state)
    assert f"({state})" in str(caught.value)
    # Not even the words of the error itself, which somebody's trigger may have chosen.
    assert not {"words", "example.com"} & set(re.findall(r"[a-z.]+", chain(caught.value)))


@pytest.mark.parametrize(
    ("work", "state", "kind"),
    [
        ("perform 1 / 0", "22012", DataRefused),
        ("perform * from no_such_table", "42P01", DataRefused),
        ("set local transaction_read_only = on; create table t ()", "25006", DataRefused),
        ("perform pg_sleep(9)", "57014", Blocked),
        ("perform pg_terminate_backend(pg_backend_pid())", "57P01", DatabaseUnavailable),
    ],
)
def test_what_fails_in_code_is_about_a_row_unless_it_was_held_up_or_cut_off(
    empty_target: Target, work: str, state: str, kind: type[UsersSyncError]
) -> None:
    def block(conn: Connection) -> None:
        conn.execute("set statement_timeout = '100ms'")
        conn.execute(f"do $$ begin {work}; end $$".encode())

    with pytest.raises(kind, match=state):
        empty_target.database().call(block)


@pytest.mark.parametrize(
    ("context", "code"),
    [
        ("PL/pgSQL function g() line 1 at RAISE", True),
        ('SQL function "f" during inlining', True),
        ("PL/pgSQL-Funktion g() Zeile 1 bei RAISE", True),
        ("在RETURN的第1行的PL/pgSQL函数g()", True),
        ('SQL関数"f"のインライン化処理中', True),
        ('PL/pgSQL 함수 "g()" 의 1번째 RETURN', True),
        ("while updating tuple (0,1) in relation users_sync", False),
        ("", False),
    ],
)
def test_context_that_names_code_is_known_in_any_language(context: str, *, code: bool) -> None:
    assert names_code(context) is code


def test_error_that_means_a_bug_is_passed_on(empty_target: Target) -> None:
    database = empty_target.database()
    with pytest.raises(psycopg.Error):
        database.call(lambda conn: conn.execute("close none_such"))
    with pytest.raises(ZeroDivisionError):
        database.call(lambda _: 1 // 0)
    assert database.call(ping)


def test_work_that_breaks_off_leaves_no_transaction_to_whoever_comes_next(
    empty_target: Target,
) -> None:
    database = empty_target.database()

    def break_off(conn: Connection) -> None:
        conn.execute("begin")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        database.call(break_off)
    status = database.call(lambda conn: conn.info.transaction_status)
    assert status is psycopg.pq.TransactionStatus.IDLE


def test_refused_row_is_known_by_its_constraint_alone(generated: Target) -> None:
    generated.apply([person(1)])
    database = generated.database()
    generated.query("create unique index one_each on users_sync (email)")
    statement = generated.table().apply(
        Users.of(people(2, primary_email="1@example.com")), generated.now()
    )
    with pytest.raises(DataRefused) as caught:
        database.call(lambda conn: conn.execute(statement.query, statement.params))
    assert caught.value.code == "23505 one_each"
    assert "example.com" not in chain(caught.value)


def test_refused_row_leaves_the_connection_as_it_was(empty_target: Target) -> None:
    database = empty_target.database()
    pid = database.call(ping)
    with pytest.raises(DataRefused):
        database.call(lambda conn: conn.execute("select 1 / 0"))
    assert database.call(ping) == pid


def test_database_that_cannot_hold_every_name_is_refused(postgres_url: str) -> None:
    name = f"latin_{time.time_ns()}"
    options = "encoding 'LATIN1' locale 'C' template template0"
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"create database {name} {options}".encode())
        with pytest.raises(Misconfigured, match=r"encoding is LATIN1.*UTF8.*DATABASE_URL"):
            database_at(make_conninfo(postgres_url, dbname=name)).call(ping)
        conn.execute(f"drop database {name} with (force)".encode())


def test_work_is_tried_again_until_it_passes(empty_target: Target) -> None:
    database = empty_target.database(retry_seconds=30)
    pids = []

    def work(conn: Connection) -> None:
        pids.append(conn.info.backend_pid)
        if len(pids) < 2:
            conn.execute("select pg_terminate_backend(pg_backend_pid())")

    database.call(work)
    assert len(set(pids)) == 2


def test_time_is_told_of_each_call_that_succeeds_and_of_no_attempt_that_fails(
    empty_target: Target,
) -> None:
    told: list[tuple[str, float]] = []

    class Watch(Nobody):
        def took(self, service: str, seconds: float) -> None:
            told.append((service, seconds))

    retry = Retry("the database", 1, Event(), DatabaseUnavailable, Watch())
    database = Database(empty_target.url, Clock(), retry)
    failures = iter([Transient("in passing"), None])

    def work(conn: Connection) -> None:
        if (failure := next(failures)) is not None:
            raise failure
        conn.execute("select pg_sleep(0.05)")

    database.call(work)
    [(service, seconds)] = told
    assert service == "the database"
    assert 0.05 <= seconds < PATIENCE_SECONDS
    database.close()


def test_stop_ends_the_wait_for_a_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as caller:
        silent.settimeout(PATIENCE_SECONDS)
        database = database_at(f"postgresql://ada@127.0.0.1:{silent.getsockname()[1]}/app", 30)
        call = caller.submit(database.call, ping)
        with silent.accept()[0]:
            database.retry.stop.set()
            assert isinstance(call.exception(PATIENCE_SECONDS), Stopped)


def test_reading_that_is_cancelled_as_it_ends_is_an_outage(empty_target: Target) -> None:
    """The rows of a FETCH are sent without a look at the clock: the error comes behind its end."""
    database = empty_target.database()
    empty_target.query(
        "create table wide as select repeat('x', 150000) from generate_series(1, 500)"
    )

    wide = sql.Identifier(empty_target.schema, "wide")

    def read(conn: Connection) -> None:
        with long_transaction(conn), conn.cursor("wide", binary=True) as cursor:
            conn.execute("set local statement_timeout = '20ms'")
            cursor.execute(sql.SQL("select * from {}").format(wide))
            cursor.fetchall()

    with pytest.raises(DatabaseUnavailable, match="out of step: received 2 results"):
        database.call(read)
    assert database.call(ping)


def test_all_that_begins_after_a_stop_shares_one_deadline() -> None:
    stop = Event()
    stopping = Stopping(stop)
    assert (stopping.patience(3), stopping.ends_at(3)) == (3, math.inf)
    stop.set()
    assert stopping.patience(3) == stopping.patience(0) == TIDYING_SECONDS
    assert stopping.ends_at(TIDYING_SECONDS) == stopping.ends_at(TIDYING_SECONDS)


def test_connection_that_comes_too_late_is_closed(database_url: str) -> None:
    stop, answer = Event(), Event()
    opened: list[DeadlineConnection] = []

    def connect_late() -> DeadlineConnection:
        answer.wait(PATIENCE_SECONDS)
        opened.append(connect(database_url))
        return opened[0]

    with ThreadPoolExecutor() as caller:
        call = caller.submit(unless_stopped, connect_late, Stopping(stop))
        stop.set()
        assert isinstance(call.exception(PATIENCE_SECONDS), Stopped)
    answer.set()
    until("it is closed", lambda: bool(opened) and opened[0].closed)


def test_stopped_worker_connects_to_tidy_up(empty_target: Target) -> None:
    database = empty_target.database()
    database.retry.stop.set()
    assert database.call(ping)


def test_killed_backend_is_replaced(empty_target: Target) -> None:
    database = empty_target.database(retry_seconds=30)
    before = database.call(ping)
    empty_target.query("select pg_terminate_backend(%s, 5000)", before)
    after = database.call(lambda conn: conn.execute("select pg_backend_pid()").fetchone())
    assert after != (before,)


def test_restarted_server_is_found_again(tmp_path: Path) -> None:
    server = EmbeddedPostgres(tmp_path)
    try:
        with server:
            database = database_at(server.url(), retry_seconds=30)
            assert database.call(ping)
        with server:
            assert database.call(lambda conn: conn.execute("select 1").fetchone()) == (1,)
            database.close()
    finally:
        remove_data(server)


def test_refused_connection_is_an_outage() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        url = f"postgresql://ada:hunter2@127.0.0.1:{taken.getsockname()[1]}/app"
        with pytest.raises(DatabaseUnavailable, match=r"127\.0\.0\.1.*refused") as caught:
            database_at(url).call(ping)
    assert "hunter2" not in chain(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        'password authentication failed for user "ada"',
        "SASL authentication failed",
        'no pg_hba.conf entry for host "127.0.0.1", user "ada", database "app", no encryption',
        'pg_hba.conf rejects connection for host "127.0.0.1", user "ada", database "app"',
        'role "ada" does not exist',
        'role "ada" is not permitted to log in',
        'database "app" does not exist',
        'permission denied for database "app"',
        "no such database: app",
        "no such user: ada",
        'PAM authentication failed for user "ada"',
        'server login failed: FATAL password authentication failed for user "ada"',
        "server login has been failing, cached error: no such user (server_login_retry)",
        "unsupported startup parameter: options",
        "Tenant or user not found",
        "(ENOTFOUND) tenant/user postgres.app not found",
        "Endpoint ID is not specified. Either please upgrade the postgres client library (libpq)",
        "The requested endpoint could not be found, or you don't have access to it.",
    ],
)
def test_whom_the_server_does_not_let_in_has_to_be_mended_by_a_person(words: str) -> None:
    with refusing_server(words) as url, pytest.raises(Misconfigured) as caught:
        database_at(url).call(ping)
    assert str(caught.value) == (
        f"the database does not let us in: {words} (XX000); see database.url (DATABASE_URL)"
    )
    assert "hunter2" not in chain(caught.value)


@pytest.mark.parametrize("severity", ["FATAL", "ВАЖНО", "ÖLÜMCÜL (FATAL)", "致命错误"])
@pytest.mark.parametrize("state", ["28P01", "28000", "3D000", "42501", "42704", "22023"])
def test_refusal_is_known_by_its_sqlstate_in_any_language(state: str, severity: str) -> None:
    words = "пользователь «ada» не прошёл проверку"
    with refusing_server(words, state, severity) as url, pytest.raises(Misconfigured) as caught:
        database_at(url).call(ping)
    assert str(caught.value) == (
        f"the database does not let us in: {words} ({state}); see database.url (DATABASE_URL)"
    )


@pytest.mark.parametrize("state", ["57P03", "53300", "08006", "XX000", "55000"])
def test_outage_in_any_language_says_what_the_server_said(state: str) -> None:
    words = "Datenbanksystem startet"
    with refusing_server(words, state) as url, pytest.raises(DatabaseUnavailable) as caught:
        database_at(url).call(ping)
    assert f"FATAL:  {state}: {words}" in str(caught.value)
    assert "auth.c" not in str(caught.value)
    told = "if it keeps saying so, see database.url" in str(caught.value)
    assert told is (state[:2] not in {"53", "57"})


def test_service_that_is_not_defined_is_for_a_person() -> None:
    with pytest.raises(Misconfigured, match='definition of service "none such" not found'):
        database_at("service='none such'").call(ping)


def test_open_connection_tells_errors_as_briefly_as_ever(database_url: str) -> None:
    with connect(database_url) as conn, pytest.raises(psycopg.Error) as caught:
        conn.execute("select none_such")
    assert "LOCATION" not in str(caught.value)


@pytest.mark.parametrize(
    "words",
    [
        "the database system is starting up",
        "the database system is in recovery mode",
        "sorry, too many clients already",
        'too many connections for role "ada"',
        "remaining connection slots are reserved for roles with the SUPERUSER attribute",
        "terminating connection due to administrator command",
    ],
)
def test_server_that_is_not_ready_is_an_outage(words: str) -> None:
    with refusing_server(words) as url, pytest.raises(DatabaseUnavailable) as caught:
        database_at(url).call(ping)
    assert isinstance(caught.value.__cause__, Transient)
    assert words in str(caught.value)
    assert "hunter2" not in chain(caught.value)


@pytest.mark.parametrize("option", ["sslmode=require", "sslmode=nonsense", "sslrootcert=/none"])
def test_tls_that_cannot_be_had_has_to_be_mended_by_a_person(option: str) -> None:
    url_option = option if "mode" in option else f"sslmode=verify-full&{option}"
    with refusing_server("") as url, pytest.raises(Misconfigured, match=r"DATABASE_URL") as caught:
        database_at(f"{url}?{url_option}").call(ping)
    assert "hunter2" not in chain(caught.value)


@pytest.mark.parametrize("wrong", [{"user": "nobody at all"}, {"dbname": "none such"}])
def test_real_server_does_not_know_us(empty_target: Target, wrong: dict[str, str]) -> None:
    database = empty_target.database(url=make_conninfo(empty_target.url, **wrong))
    with pytest.raises(Misconfigured, match="does not let us in"):
        database.call(ping)


def test_role_that_may_not_connect_has_to_be_mended_by_a_person(
    connection: psycopg.Connection, database_url: str, plain_role: str
) -> None:
    role = sql.Identifier(plain_role)
    name = sql.Identifier(connection.info.dbname)
    connection.execute(sql.SQL("alter role {} login").format(role))
    connection.execute(sql.SQL("revoke connect on database {} from public").format(name))
    with pytest.raises(Misconfigured, match="does not let us in"):
        database_at(make_conninfo(database_url, user=plain_role)).call(ping)


@pytest.fixture
def pooled(database_url: str, pgbouncer_url: str) -> Iterator[Database]:
    """Return a worker's connection by way of PgBouncer, whose sessions are everybody's."""
    database = database_at(pgbouncer_url)
    yield database
    database.close()


def test_pooler_by_the_transaction_is_no_hindrance(
    pooled: Database, connection: psycopg.Connection
) -> None:
    table = Table("neon_auth", prepare(pooled, "neon_auth"), (IGNORED,), 0)
    lease = Lease(pooled, LeaseRequest("neon_auth", PROJECT, "one", 60))
    users = people(1, 2, 3)

    assert prepare(pooled, "neon_auth") is table.shape
    assert lease.acquire()
    lease.bind()
    for letters in ("iii", "==="):
        rows = lease.commit([table.apply(Users.of(users), pooled.clock.now())], 1)
        assert rows == [(letters, None, None)]
    lease.resync()
    keys = pooled.call(lambda conn: list(table.load_keys(conn)))
    lease.release()

    assert keys == [(user.millis, pack(user.id)) for user in users]
    assert connection.execute("select count(*) from neon_auth.users_sync").fetchone() == (3,)


def test_nothing_of_ours_is_left_in_a_poolers_session(pooled: Database, pgbouncer_url: str) -> None:
    query = "select current_setting('lock_timeout'), current_setting('statement_timeout')"
    before = pooled.call(lambda conn: conn.execute(query).fetchone())
    prepare(pooled, "neon_auth")
    lease = Lease(pooled, LeaseRequest("neon_auth", PROJECT, "one", 60))
    assert lease.acquire()
    lease.bind()
    lease.commit([], 1)
    with pytest.raises(DataRefused):
        lease.commit([Statement(sql.SQL("select 1 / 0"))], 1)
    with psycopg.connect(pgbouncer_url, prepare_threshold=None) as other:
        assert before == other.execute(query).fetchone()
