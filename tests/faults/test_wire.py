"""The network between the worker and either side breaks: in mid-word, or without a word."""

import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import psycopg
import pytest

from tests.faults.watched import Watched, at_request, logged, stopped_cleanly, watched
from tests.faults.wire import Wire, wire_to
from tests.support.processes import Ended, Running
from tests.support.users_apis import both_servers
from tests.support.waiting import until

beside_api = pytest.mark.beside_api

# How many bytes a sweep with some changes sends to the server, and gets from it, at the least.
BYTES = {"database": (30_000, 600), "api": (3_000, 100_000)}

# A question that reads, the fence of a transaction, and its end.
QUESTIONS = (b"coalesce(sum(deleted)", b"set writes = writes + 1", b"commit")

# In the transactions of many round trips: the first of all, and the one that reads the keys.
OPENINGS = (b"pg_advisory_xact_lock", b"users_sync_keys")
UNPREPARED = "drop schema users_sync_worker cascade"
LEFT_OPEN = """
select from pg_stat_activity
where datname = current_database() and state = 'idle in transaction'
"""


# Five are promised; the others are for a machine that has much else to do. Waits after a stop that
# shared no deadline took up to twelve, and a job is left behind after seven.
LONGEST_STOP_SECONDS = 10


@dataclass(kw_only=True)
class World(Watched):
    """A project and a table, each at the other end of a wire."""

    database: Wire
    stack_auth: Wire


@pytest.fixture
def world(database_url: str, tmp_path: Path, users_api: str) -> Iterator[World]:
    with ExitStack() as ends:
        world = ends.enter_context(watched(database_url, tmp_path, users_api))
        address = urlsplit(world.shell.variables["STACK_API_URL"])
        database = ends.enter_context(wire_to(way_to(database_url)))
        api = ends.enter_context(
            wire_to(lambda: socket.create_connection((address.hostname, address.port)))
        )
        world.project.populate(300)
        shell = world.shell.having(
            STACK_API_URL=f"http://127.0.0.1:{api.port}",
            DATABASE_URL=through(database, database_url),
        )
        yield World(site=world.site, shell=shell, database=database, stack_auth=api)
        shell.close()


def way_to(database_url: str) -> Callable[[], socket.socket]:
    with psycopg.connect(database_url) as conn:
        host, port = conn.info.host, conn.info.port

    def connect() -> socket.socket:
        if not host.startswith("/"):
            return socket.create_connection((host, port))
        far = socket.socket(socket.AF_UNIX)
        far.connect(f"{host}/.s.PGSQL.{port}")
        return far

    return connect


def through(wire: Wire, database_url: str) -> str:
    with psycopg.connect(database_url) as conn:
        info = conn.info
        return psycopg.conninfo.make_conninfo(
            host="127.0.0.1",
            port=wire.port,
            user=info.user,
            password=info.password,
            dbname=info.dbname,
        )


def wire_of(world: World, side: str) -> Wire:
    return world.database if side == "database" else world.stack_auth


@both_servers
@pytest.mark.fault(
    "the connection to one side is cut or reset after some bytes, in either direction",
    held="the worker outlives it, the table equals the project, no living user is marked deleted",
    quick=2,
    thorough=50,
)
@pytest.mark.parametrize("side", BYTES)
def test_a_worker_outlives_connections_that_are_cut(world: World, side: str, tries: int) -> None:
    dice = Random(tries)
    worker = world.shell.start()
    world.catches_up()
    for number in range(tries):
        direction = number % 2
        sent = dice.randint(1, BYTES[side][direction])
        wire_of(world, side).cut_after(sent, direction, reset=dice.random() < 0.5)
        world.change(dice, edits=60, deletions=2)
        until("the connection is cut", wire_of(world, side).broken.is_set)
        world.catches_up()
    until("the deletions are there", lambda: world.buried() == world.gone)
    stopped_cleanly(worker)


@both_servers
@pytest.mark.fault(
    "the connection to one side stays open, but nothing comes through any more",
    held="noticed within the time limits, outlived, and the table equals the project afterwards",
    quick=1,
    thorough=10,
)
def test_a_worker_notices_a_connection_that_fell_silent(world: World, attempt: int) -> None:
    dice, side = Random(attempt), list(BYTES)[attempt % 2]
    wire = wire_of(world, side)
    worker = world.shell.start()
    world.catches_up()
    with at_request(world.api, dice.randint(1, 16), dice.uniform(0, 0.01), wire.silent.set):
        world.change(dice, edits=100)
        until("it fell silent", wire.silent.is_set)
    until("the worker notices", lambda: logged(worker, "trouble.began") > 0)
    wire.silent.clear()
    world.catches_up()
    until("the worker is content", lambda: logged(worker, "trouble.ended") > 0)
    stopped_cleanly(worker)


def ended_soon(worker: Running) -> Ended:
    """Wait until it has ended by itself, soon, and without leaving a job behind."""
    began = time.monotonic()
    ended = worker.end()
    assert [line for line in ended.log if line["event"] == "jobs.abandoned"] == []
    assert time.monotonic() - began < LONGEST_STOP_SECONDS
    return ended


@beside_api
@pytest.mark.fault(
    "SIGTERM while the connection to one side is silent",
    held="it ends within five seconds: a long-running worker with 0, `--once` with 143",
    quick=1,
    thorough=8,
)
def test_a_stop_ends_a_worker_whose_connection_fell_silent(world: World, attempt: int) -> None:
    dice, side, once = Random(attempt), list(BYTES)[attempt // 2 % 2], attempt % 2 == 1
    wire = wire_of(world, side)
    with at_request(world.api, dice.randint(1, 12), dice.uniform(0, 0.01), wire.silent.set):
        worker = world.shell.start(*["--once"] * once)
        until("it fell silent", wire.silent.is_set)
    worker.signal(signal.SIGTERM)
    assert ended_soon(worker).code == (143 if once else 0)
    wire.silent.clear()


@beside_api
@pytest.mark.fault(
    "SIGTERM while the database's host accepts a connection and never says a word",
    held="it ends at once: a long-running worker with 0, `--once` with 143",
    quick=2,
    thorough=3,
)
def test_a_stop_ends_a_worker_that_is_connecting(world: World, attempt: int) -> None:
    once, at_work, wire = attempt == 1, attempt == 2, world.database
    if not at_work:
        wire.silent.set()
    worker = world.shell.start(*["--once"] * once)
    if at_work:
        world.catches_up()
        wire.silent.set()
        wire.accepted = 0
        wire.break_all()
    until("it connects", lambda: wire.accepted > 0)
    worker.signal(signal.SIGTERM)
    ended = ended_soon(worker)
    assert (ended.code, ended.stderr) == (143 if once else 0, "")


@beside_api
@pytest.mark.fault(
    "SIGTERM while each connection to the database falls silent as soon as it is open",
    held="it ends within five seconds: a long-running worker with 0, `--once` with 143",
    quick=2,
    thorough=6,
)
def test_a_stop_ends_a_worker_whose_connections_fall_silent_at_once(
    world: World, attempt: int
) -> None:
    once = attempt % 2 == 1
    world.database.lose_at(b"select clock_timestamp()", again=True)
    worker = world.shell.start(*["--once"] * once)
    until("it is lost", world.database.lost.is_set)
    worker.signal(signal.SIGTERM)
    ended = ended_soon(worker)
    assert (ended.code, ended.stderr) == (143 if once else 0, "")


@beside_api
@pytest.mark.fault(
    "SIGTERM at work, when each connection to the database falls silent at the next statement",
    held="it ends within five seconds: a long-running worker with 0",
    quick=1,
    thorough=3,
)
def test_a_stop_at_work_shares_its_deadline_among_all_connections(
    world: World, attempt: int
) -> None:
    worker = world.shell.start()
    world.catches_up()
    world.database.lose_at(b"clock_timestamp()", again=True)
    world.change(Random(attempt), edits=10)
    until("it is lost", world.database.lost.is_set)
    worker.signal(signal.SIGTERM)
    ended = ended_soon(worker)
    assert (ended.code, ended.stderr) == (0, "")


@beside_api
@pytest.mark.fault(
    "a question to the database is lost on a connection that stays open on both sides",
    held="given up within a lease and asked again; the table equals the project afterwards",
    quick=1,
    thorough=3,
)
def test_a_worker_asks_again_what_the_database_never_answers(world: World, attempt: int) -> None:
    worker = world.shell.start()
    world.catches_up()
    world.database.lose_at(QUESTIONS[attempt])
    world.change(Random(attempt), edits=10, deletions=2)
    until("it is lost", world.database.lost.is_set)
    world.catches_up()
    until("the deletions are there", lambda: world.buried() == world.gone)
    stopped_cleanly(worker)


@beside_api
@pytest.mark.fault(
    "a worker is lost, without a word to the server, while it creates the tables or reads the keys",
    held="its transaction is ended by the server within seconds, and the next worker goes on",
    quick=1,
    thorough=2,
)
def test_a_lost_worker_leaves_no_transaction_open(world: World, attempt: int) -> None:
    world.site.execute(UNPREPARED)
    world.database.lose_at(OPENINGS[attempt])
    lost = world.shell.start("--once")
    until("it is lost", world.database.lost.is_set)
    lost.process.kill()
    worker = world.shell.start()
    world.catches_up()
    until("no transaction is left", lambda: not world.site.rows(LEFT_OPEN))
    stopped_cleanly(worker)
