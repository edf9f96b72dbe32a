"""A short hash of a user's record, the same in every process: equal ones mean equal records.

Equal records may have two: the careful reader hashes canonical JSON, not what came. The users of a
page that changes readers are compared by the database once.
"""

from collections.abc import Collection, Sequence
from hashlib import blake2b

import msgspec

from worker.model import FINGERPRINT_BYTES, UNKNOWN_FINGERPRINT

# Fingerprints are kept between runs: another way to make them takes another number.
FINGERPRINT_VERSION = 2

_ABSENT = msgspec.Raw(b"")


class _Fields(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """What the API says of a user, each field as its JSON came, in an order of our own.

    It is read in half the time of a dict. A record with a field that is not here is read as a dict.
    Another set of names, or another order, takes another FINGERPRINT_VERSION.
    """

    id: msgspec.Raw = _ABSENT
    signed_up_at_millis: msgspec.Raw = _ABSENT
    display_name: msgspec.Raw = _ABSENT
    primary_email: msgspec.Raw = _ABSENT
    primary_email_verified: msgspec.Raw = _ABSENT
    primary_email_auth_enabled: msgspec.Raw = _ABSENT
    profile_image_url: msgspec.Raw = _ABSENT
    client_metadata: msgspec.Raw = _ABSENT
    client_read_only_metadata: msgspec.Raw = _ABSENT
    server_metadata: msgspec.Raw = _ABSENT
    has_password: msgspec.Raw = _ABSENT
    otp_auth_enabled: msgspec.Raw = _ABSENT
    auth_with_email: msgspec.Raw = _ABSENT
    requires_totp_mfa: msgspec.Raw = _ABSENT
    passkey_auth_enabled: msgspec.Raw = _ABSENT
    oauth_providers: msgspec.Raw = _ABSENT
    selected_team_id: msgspec.Raw = _ABSENT
    selected_team: msgspec.Raw = _ABSENT
    last_active_at_millis: msgspec.Raw = _ABSENT
    is_anonymous: msgspec.Raw = _ABSENT
    is_restricted: msgspec.Raw = _ABSENT
    restricted_reason: msgspec.Raw = _ABSENT
    restricted_by_admin: msgspec.Raw = _ABSENT
    restricted_by_admin_reason: msgspec.Raw = _ABSENT
    restricted_by_admin_private_details: msgspec.Raw = _ABSENT
    country_code: msgspec.Raw = _ABSENT
    risk_scores: msgspec.Raw = _ABSENT


KNOWN = frozenset(_Fields.__struct_fields__)

_known = msgspec.json.Decoder(_Fields)
_any = msgspec.json.Decoder(dict[str, msgspec.Raw])


def fingerprint(text: bytes) -> bytes:
    """Hash to 8 bytes, never to UNKNOWN_FINGERPRINT."""
    short = blake2b(text, digest_size=FINGERPRINT_BYTES).digest()
    return short if short != UNKNOWN_FINGERPRINT else b"\1" * FINGERPRINT_BYTES


def read_columns(
    records: Sequence[msgspec.Raw], ignored_fields: Collection[str]
) -> tuple[list[str], list[int], list[bytes]]:
    """Give id, sign-up and fingerprint of each record.

    Raises msgspec.MsgspecError, ValueError or RecursionError for a record that is not as users are.
    """
    ignored = KNOWN.intersection(ignored_fields)
    ids, millis, fingerprints = [], [], []
    # One after another: the fields of all of them are too many for the processor's caches.
    for record in records:
        others = b""
        try:
            fields = _known.decode(record)
        except msgspec.ValidationError:
            fields, others = _read_with_others(record, ignored_fields)
        ids.append(bytes(fields.id).decode("ascii")[1:-1])
        millis.append(int(bytes(fields.signed_up_at_millis)))
        for name in ignored:
            setattr(fields, name, _ABSENT)
        # Two records have the same text only if they are equal: no value of JSON is empty.
        fingerprints.append(fingerprint(b",".join(msgspec.structs.astuple(fields)) + others))
    return ids, millis, fingerprints


def _read_with_others(
    record: msgspec.Raw, ignored_fields: Collection[str]
) -> tuple[_Fields, bytes]:
    """Read a record that has other fields as well; returns a comma and those as a JSON object."""
    found = _any.decode(record)
    known = {name: found.pop(name) for name in KNOWN & found.keys()}
    for name in ignored_fields:
        found.pop(name, None)
    return _Fields(**known), b"," + msgspec.json.encode(found, order="sorted") if found else b""
