"""Reads the body of an answer, and never more of it than may stand in memory."""

import zlib
from collections.abc import Callable, Iterable, Iterator

import httpx

from worker.errors import Transient

# Eight times what a page is tuned to. Parsed, a body takes several times its size in memory.
MAX_BODY_BYTES = 64 * 2**20

# As objects, small values take fifty times the memory of their JSON. A page of the size that pages
# are tuned to has a tenth as many as this, and need not be counted.
MAX_VALUES = 2_000_000
TUNED_BYTES = 12 * 2**20

# Of what was packed, no more than this is unpacked at once: packed twice, 3 KB may be 3 GB.
UNPACKED_BYTES = 2**20
ENCODINGS = {"gzip", "x-gzip"}
GZIP = zlib.MAX_WBITS | 16


def read_body(answer: httpx.Response, host: str) -> bytearray:
    """Read a body to its end. Raises Transient for one that is too much, and what httpx raises."""
    body = bytearray()
    for part in _parts(answer, host):
        body += part
        if len(body) > MAX_BODY_BYTES:
            size = f"{MAX_BODY_BYTES >> 20} MiB"
            raise Transient(f"{host} answered with more than {size}", too_much=True)
    if len(body) > TUNED_BYTES and sum(map(body.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise Transient(f"{host} answered with more than {MAX_VALUES:,} values", too_much=True)
    return body


def _parts(answer: httpx.Response, host: str) -> Iterable[bytes]:
    encoding = answer.headers.get("content-encoding", "").strip().lower()
    if encoding in ENCODINGS:
        return _unpacked(answer.iter_raw())
    if encoding in {"", "identity"}:
        return answer.iter_bytes()
    # httpx would unpack some of them, layer by layer and without a bound.
    raise Transient(f"{host} answered in an encoding that was not asked for")


def _unpacked(packed: Iterable[bytes]) -> Iterator[bytes]:
    """Unpack gzip piece by piece, member by member; zeros behind a member are padding.

    Raises httpx.DecodingError for what is no gzip, or cut off.
    """
    member = zlib.decompressobj(GZIP)
    for part in packed:
        left = part
        while True:
            if member.eof:
                left = left.lstrip(b"\0")
                if not left:
                    break
                member = zlib.decompressobj(GZIP)
            piece = _next_piece(member.decompress, left)
            yield piece
            left = member.unused_data if member.eof else member.unconsumed_tail
            if not left and len(piece) < UNPACKED_BYTES:
                break
    if not member.eof:
        raise httpx.DecodingError("the packed body was cut off")


def _next_piece(decompress: Callable[[bytes, int], bytes], packed: bytes) -> bytes:
    try:
        return decompress(packed, UNPACKED_BYTES)
    except zlib.error as error:
        raise httpx.DecodingError(str(error)) from error
