"""Bodies are read whole, packed or not, but never more of them than may stand in memory."""

import gzip
import tracemalloc
import zlib
from collections.abc import Iterator

import httpx
import pytest

from worker.errors import Transient
from worker.stack_auth.body import (
    MAX_BODY_BYTES,
    MAX_VALUES,
    TUNED_BYTES,
    UNPACKED_BYTES,
    read_body,
)

TEXT = b'{"items":[]}' * 300_000


class Parts(httpx.SyncByteStream):
    """A body that comes in parts of this size."""

    def __init__(self, body: bytes, size: int = 65_536) -> None:
        self.parts = [body[at : at + size] for at in range(0, len(body), size)]

    def __iter__(self) -> Iterator[bytes]:
        yield from self.parts


def answer(encoding: str, body: bytes, size: int = 65_536) -> httpx.Response:
    return httpx.Response(200, headers={"content-encoding": encoding}, stream=Parts(body, size))


@pytest.mark.parametrize("size", [1000, 65_536])
@pytest.mark.parametrize("encoding", ["gzip", "x-gzip", " GZIP "])
def test_gzip_is_unpacked(encoding: str, size: int) -> None:
    assert read_body(answer(encoding, gzip.compress(TEXT), size), "host") == TEXT


@pytest.mark.parametrize("length", [0, 1, UNPACKED_BYTES - 1, UNPACKED_BYTES, UNPACKED_BYTES + 1])
def test_every_length_is_unpacked_whole(length: int) -> None:
    body = bytes(length)
    assert read_body(answer("gzip", gzip.compress(body)), "host") == body


@pytest.mark.parametrize("size", [1, 7, 1000, 65_536])
@pytest.mark.parametrize("padding", [b"", b"\0", bytes(1000)])
def test_every_member_is_unpacked_and_padding_is_not(padding: bytes, size: int) -> None:
    texts = [b'{"items":[', b"", b" " * 3000, b"]}"]
    packed = b"".join(gzip.compress(text) + padding for text in texts)
    assert read_body(answer("gzip", packed, size), "host") == b"".join(texts)


@pytest.mark.parametrize("length", [UNPACKED_BYTES - 1, UNPACKED_BYTES, 2 * UNPACKED_BYTES])
def test_member_behind_one_of_any_length_is_unpacked(length: int) -> None:
    packed = gzip.compress(bytes(length)) + gzip.compress(b"end")
    assert read_body(answer("gzip", packed, len(packed)), "host") == bytes(length) + b"end"


@pytest.mark.parametrize("encoding", ["", "identity"])
def test_what_is_not_packed_is_left_as_it_is(encoding: str) -> None:
    assert read_body(answer(encoding, TEXT), "host") == TEXT


@pytest.mark.parametrize("encoding", ["gzip, gzip", "deflate", "br", "zstd", "compress", "gzip,"])
def test_what_was_not_asked_for_is_not_unpacked(encoding: str) -> None:
    with pytest.raises(Transient, match="host answered in an encoding"):
        read_body(answer(encoding, gzip.compress(gzip.compress(TEXT))), "host")


# Without the time of day: it names tests, which must be the same in every process.
PACKED = gzip.compress(b"1", mtime=0)


@pytest.mark.parametrize("size", [1, 65_536])
@pytest.mark.parametrize(
    "body",
    [
        PACKED[:-9],
        b"not gzip",
        zlib.compress(b"1"),
        b"",
        b"\0" + PACKED,
        PACKED + PACKED[:1],
        PACKED + PACKED[:-9],
        PACKED + PACKED[:-1],
        PACKED + b"\0garbage",
        PACKED + b"{}",
    ],
)
def test_what_is_no_gzip_or_cut_off_is_an_error_of_httpx(body: bytes, size: int) -> None:
    with pytest.raises(httpx.DecodingError):
        read_body(answer("gzip", body, size), "host")


@pytest.mark.parametrize("members", [1, 64])
def test_bomb_is_not_unpacked_whole(members: int) -> None:
    body = gzip.compress(bytes(4 * MAX_BODY_BYTES // members), 1) * members
    tracemalloc.start()
    try:
        with pytest.raises(Transient, match="more than 64 MiB") as caught:
            read_body(answer("gzip", body, len(body)), "host")
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert caught.value.too_much
    assert most < 2 * MAX_BODY_BYTES


def test_body_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    values = b'{"a":[' + b"0," * MAX_VALUES
    body = values + b" " * (TUNED_BYTES - len(values) + 1)
    with pytest.raises(Transient, match="more than 2,000,000 values") as caught:
        read_body(answer("", body), "host")
    assert caught.value.too_much


def test_long_body_of_few_values_is_read() -> None:
    body = b'"' + b"x" * TUNED_BYTES + b'"'
    assert len(read_body(answer("", body), "host")) == len(body)
