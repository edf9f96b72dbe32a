"""Whatever comes over the connection, a request ends in time and takes no memory without end."""

import gzip
import socket
import time
import tracemalloc
from contextlib import suppress
from threading import Event

import pytest

from tests.support.faulty_server import Behaviour, FaultyServer, send, serving, trickle
from worker.clock import Clock
from worker.errors import Misconfigured, Transient, UsersSyncError
from worker.model import Page
from worker.stack_auth.body import MAX_BODY_BYTES
from worker.stack_auth.client import Access, StackApi

# A machine may be slow, but nothing here is to hang.
PATIENCE_SECONDS = 60
MOST_MEMORY = 2 * MAX_BODY_BYTES

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
CHUNKED = OK + b"transfer-encoding: chunked\r\n\r\n"
PAGE = b'{"items":[],"pagination":{"next_cursor":null}}'
LENGTH = b"content-length: %d\r\n\r\n" % len(PAGE)
WHOLE = OK + LENGTH + PAGE
CHUNK = b"%x\r\n%b\r\n" % (len(PAGE), PAGE)


def endless(begin: bytes, part: bytes) -> Behaviour:
    """Send `begin`, and then `part` again and again until the client hangs up."""
    much = part * max(1, 65_536 // len(part))

    def behave(connection: socket.socket, server: FaultyServer) -> None:
        with suppress(OSError):
            connection.sendall(begin)
            while not server.over.is_set():
                connection.sendall(much)

    return behave


def packed(times: int, encoding: bytes) -> bytes:
    """Answer with a bomb: spaces for more than there may be, packed again and again."""
    body = b" " * (3 * MAX_BODY_BYTES)
    for _ in range(times):
        body = gzip.compress(body, 1)
    head = b"content-encoding: %b\r\ncontent-length: %d\r\n\r\n" % (encoding, len(body))
    return OK + head + body


# Each of them is a whole answer of its own kind, or none at all.
PASSES: dict[str, Behaviour] = {
    "a header whose value is no text": send(OK + b"x: \xfe\xff\r\n" + LENGTH + PAGE),
    "a thousand answers before the answer": send(b"HTTP/1.1 102 Wait\r\n\r\n" * 1000 + WHOLE),
    "a reason of 90 KB": send(WHOLE.replace(b"OK", b"O" * 90_000, 1)),
    "a second answer behind the first": send(WHOLE * 2),
    "line feeds alone": send(WHOLE.replace(b"\r\n", b"\n")),
}
REFUSED: dict[str, Behaviour] = {
    "a header without end": endless(OK + b"x: ", b"a"),
    "headers without end": endless(OK, b"x: a\r\n"),
    "a header with NUL": send(OK + b"x: a\0b\r\n" + LENGTH + PAGE),
    "a header without a colon": send(OK + b"x\r\n" + LENGTH + PAGE),
    "a header whose name is no text": send(OK + b"x-\xff: a\r\n" + LENGTH + PAGE),
    "two lengths": send(OK + b"content-length: 5\r\n" + LENGTH + PAGE),
    "a length below zero": send(OK + b"content-length: -1\r\n\r\n" + PAGE),
    "a length of thirty digits": send(OK + b"content-length: %d\r\n\r\n" % 10**30 + PAGE),
    "a length that is too short": send(OK + b"content-length: 3\r\n\r\n" + PAGE),
    "a body without end": endless(OK + b"\r\n", b" "),
    "a body without end, and a length": endless(OK + b"content-length: 9999999999\r\n\r\n", b" "),
    "a chunk without end": endless(CHUNKED + b"FFFFFFFFFFFFFFFF\r\n", b" "),
    "a chunk below zero": send(CHUNKED + b"-5\r\nhello\r\n0\r\n\r\n"),
    "chunks of one byte without end": endless(CHUNKED, b"1\r\n \r\n"),
    "an extension of a chunk without end": endless(CHUNKED + b"1;a=", b"b"),
    "extensions of chunks without end": endless(CHUNKED, b"1;%b\r\n \r\n" % (b"a" * 60)),
    "trailers without end": endless(CHUNKED + CHUNK + b"0\r\n", b"x: a\r\n"),
    "answers before the answer without end": endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a byte now and then": trickle(WHOLE),
    "another protocol": send(b"HTTP/1.1 101 Go\r\nupgrade: x\r\nconnection: upgrade\r\n\r\n"),
    "a status of two digits": send(WHOLE.replace(b"200", b"20")),
    "a status that is none": send(WHOLE.replace(b"200", b"000")),
    "a status of 999": send(WHOLE.replace(b"200", b"999")),
    "a status without a body": send(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "HTTP/0.9": send(PAGE),
    "HTTP/2": send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "a redirect to itself": send(b"HTTP/1.1 302 Found\r\nlocation: /\r\ncontent-length: 0\r\n\r\n"),
    "an encoding that nobody asked for": send(OK + b"content-encoding: br\r\n" + LENGTH + PAGE),
}


# What only the time-out ends; all others end by themselves, on however slow a machine.
ENDED_BY_TIME = {
    "a byte now and then",
    "answers before the answer without end",
    "chunks of one byte without end",
    "extensions of chunks without end",
}
TIMEOUT_SECONDS = 0.3


def behaviour(case: str) -> Behaviour:
    """Make the bombs only when they are needed: that takes a second."""
    match case:
        case "a bomb":
            return send(packed(1, b"gzip"))
        case "a bomb in a bomb":
            return send(packed(2, b"gzip, gzip"))
        case _:
            return REFUSED[case]


@pytest.mark.fault(
    "the connection brings headers, chunks, lengths, bodies without end, bombs, or no HTTP at all",
    held="refused in time, at most 128 MB of memory, and asked only once",
)
@pytest.mark.parametrize("case", [*REFUSED, "a bomb", "a bomb in a bomb"])
def test_hostile_connection_is_left_in_time_and_in_little_memory(case: str) -> None:
    behave = behaviour(case)
    with serving(behave) as server:
        tracemalloc.start()
        try:
            began = time.monotonic()
            answer = ask(server, TIMEOUT_SECONDS if case in ENDED_BY_TIME else PATIENCE_SECONDS)
            seconds = time.monotonic() - began
            most = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert isinstance(answer, Transient | Misconfigured)
    assert isinstance(answer, Misconfigured) == (case == "a redirect to itself")
    assert seconds < PATIENCE_SECONDS
    assert most < MOST_MEMORY
    assert len(server.requests) <= 1  # time may be up before it is sent


@pytest.mark.fault(
    "the connection brings a whole answer in an odd form", held="the answer is understood"
)
@pytest.mark.parametrize("case", PASSES)
def test_odd_connection_brings_the_answer(case: str) -> None:
    with serving(PASSES[case]) as server:
        answer = ask(server, PATIENCE_SECONDS)
    assert isinstance(answer, Page)
    assert len(answer.users) == 0


def ask(server: FaultyServer, timeout_seconds: float) -> Page | UsersSyncError:
    access = Access(server.url, "p1", "ssk_very_secret", timeout_seconds=timeout_seconds)
    with StackApi(access, clock=Clock(), stop=Event()) as api:
        try:
            return api.fetch_page(None, 2)
        except UsersSyncError as error:
            return error
