"""The ids of users: canonical UUIDs, and the 16 bytes that each of them is."""

from collections.abc import Iterable, Sequence

ID_BYTES = 16

# A regular expression takes ten times as long, for every user of every page.
_HEX_TO_ZERO = str.maketrans("123456789abcdef", "0" * 15)
HIGHEST_ID = "ffffffff-ffff-ffff-ffff-ffffffffffff"
LOWEST_ID = "00000000-0000-0000-0000-000000000000"


def is_user_id(text: object) -> bool:
    """Whether this is a canonical lower-case UUID: another spelling would be another row."""
    return isinstance(text, str) and text.translate(_HEX_TO_ZERO) == LOWEST_ID


def are_user_ids(ids: Sequence[str]) -> bool:
    """Whether all of these are canonical lower-case UUIDs."""
    text = "".join(ids)
    return set(map(len, ids)) == {len(LOWEST_ID)} and text.translate(
        _HEX_TO_ZERO
    ) == LOWEST_ID * len(ids)


def pack(user_id: str) -> bytes:
    """Write a canonical UUID as 16 bytes, which compare as the text does."""
    return bytes.fromhex(user_id.replace("-", ""))


def pack_all(ids: Iterable[str]) -> bytes:
    """Write canonical UUIDs, 16 bytes each."""
    return bytes.fromhex("".join(ids).replace("-", ""))


def id_before(user_id: str) -> str | None:
    """Give the nearest UUID below this one; None below the lowest."""
    number = int(user_id.replace("-", ""), 16)
    return _hyphened(f"{number - 1:032x}") if number else None


def unpack_id(packed: bytes) -> str:
    """Write 16 bytes as the UUID that they are."""
    return _hyphened(packed.hex())


def unpack_all(packed: bytes) -> list[str]:
    """Write ids of 16 bytes each as the UUIDs that they are."""
    text, width = packed.hex(), 2 * ID_BYTES
    return [_hyphened(text[at : at + width]) for at in range(0, len(text), width)]


def _hyphened(text: str) -> str:
    return f"{text[:8]}-{text[8:12]}-{text[12:16]}-{text[16:20]}-{text[20:]}"
