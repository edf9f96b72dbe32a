"""A short hash of a user's record, the same in every process: equal ones mean equal records."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from hashlib import blake2b
from operator import itemgetter

from worker.model import FINGERPRINT_BYTES, UNKNOWN_FINGERPRINT

# Fingerprints are kept between runs: another way to make them takes another number.
FINGERPRINT_VERSION = 1


def fingerprint(text: bytes) -> bytes:
    """Hash to 8 bytes, never to UNKNOWN_FINGERPRINT."""
    short = blake2b(text, digest_size=FINGERPRINT_BYTES).digest()
    return short if short != UNKNOWN_FINGERPRINT else b"\1" * FINGERPRINT_BYTES


def fingerprint_of_fields(fields: Mapping[str, bytes]) -> bytes:
    """Hash the fields of a record, each as its JSON came; their order does not matter."""
    names, values = _in_order(tuple(fields))
    return fingerprint(names + b",".join(values(fields)))


# Users of one project have few sets of names, in two orders each.
@lru_cache(maxsize=256)
def _in_order(
    names: tuple[str, ...],
) -> tuple[bytes, Callable[[Mapping[str, bytes]], Sequence[bytes]]]:
    """Give the text of the names, sorted, and what takes the values in this order."""
    ordered = sorted(names)
    # Without a second name itemgetter gives the value itself; an empty one does no harm.
    values = itemgetter(*ordered) if len(ordered) > 1 else lambda fields: list(fields.values())
    return "\0".join([*ordered, ""]).encode(), values
