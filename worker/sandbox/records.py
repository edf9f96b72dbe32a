"""What a user looks like in the JSON of the users API, and users invented to fill a project."""

import json
import random
from collections.abc import Iterator
from typing import Any

import orjson

Record = dict[str, Any]

# What the server adds of itself to these two kinds of users.
ANONYMOUS: Record = {
    "is_anonymous": True,
    "is_restricted": True,
    "restricted_reason": {"type": "anonymous"},
}
RESTRICTED: Record = {
    "is_restricted": True,
    "restricted_reason": {"type": "restricted_by_administrator"},
    "restricted_by_admin": True,
}
UNRESTRICTED: Record = {
    "is_restricted": False,
    "restricted_reason": None,
    "restricted_by_admin": False,
    "restricted_by_admin_reason": None,
    "restricted_by_admin_private_details": None,
}

FIRST_NAMES = ("Ada", "Zoë", "Linus", "Nguyễn", "Grace", "Jürgen", "美咲", "Олена", "Yusuf", "Inés")
LAST_NAMES = ("Lovelace", "O'Neil", "Öztürk", "Hopper", "de la Cruz", "田中", "Шевченко")
# Ten and seven: seventy names before the first one comes again.
NAMES = tuple(f"{FIRST_NAMES[n % 10]} {LAST_NAMES[n % 7]}" for n in range(70))
PLANS = ("free", "pro", "enterprise")

# Invented sign-ups end at a fixed moment (1 October 2025), so that a seed gives the same ones on
# any day, and span two years.
LATEST_SIGN_UP = 1_759_276_800_000
SIGN_UP_SPAN = 2 * 365 * 86_400_000
# About every tenth sign-up shares the millisecond of another: the order then is that of the ids.
SHARED_MILLISECONDS = 0.1
# Few enough to leave the list in shape, enough to meet one on each larger page.
ANONYMOUS_SHARE = 0.02


def blank(user_id: str, millis: int) -> Record:
    """Give every field of a user who has just signed up with nothing."""
    return {
        "id": user_id,
        "display_name": None,
        "primary_email": None,
        "primary_email_verified": False,
        "primary_email_auth_enabled": False,
        "profile_image_url": None,
        "signed_up_at_millis": millis,
        "client_metadata": None,
        "client_read_only_metadata": None,
        "server_metadata": None,
        "has_password": False,
        "otp_auth_enabled": False,
        "auth_with_email": False,
        "requires_totp_mfa": False,
        "passkey_auth_enabled": False,
        "oauth_providers": [],
        "selected_team_id": None,
        "selected_team": None,
        "last_active_at_millis": millis,
        "is_anonymous": False,
        "is_restricted": False,
        "restricted_reason": None,
        "restricted_by_admin": False,
        "restricted_by_admin_reason": None,
        "restricted_by_admin_private_details": None,
        "country_code": None,
        "risk_scores": {"sign_up": {"bot": 0, "free_trial_abuse": 0}},
    }


def merged(record: Record, fields: Record) -> Record:
    """Set `fields` and what the server derives from them; what is given explicitly wins."""
    implied: Record = {}
    if fields.get("is_restricted"):
        implied = RESTRICTED
    if fields.get("is_anonymous"):
        implied = ANONYMOUS
    record = record | implied | fields
    record["display_name"] = record["display_name"] or None
    if record["primary_email"] is not None:
        record["primary_email"] = record["primary_email"].lower()
    return record


def written(record: Record) -> tuple[bytes, bytes]:
    """Write a user in two orders of keys, for the real server does not keep to one, either.

    One order is the other with its halves swapped, so that each field is written only once.
    """
    fields = list(record.items())
    middle = len(fields) // 2
    first, second = _json(dict(fields[:middle])), _json(dict(fields[middle:]))
    return first[:-1] + b"," + second[1:], second[:-1] + b"," + first[1:]


def _json(value: Record) -> bytes:
    """Write JSON, in escapes of ASCII where orjson refuses it: a lone surrogate, a huge integer."""
    try:
        return orjson.dumps(value)
    except TypeError:
        return json.dumps(value, separators=(",", ":")).encode()


def invented(count: int, dice: random.Random, latest: int) -> Iterator[Record]:
    """Make up users who signed up until `latest` (milliseconds), the earliest first.

    About one in fifty is anonymous, as in a real project.
    """
    for number, millis in enumerate(_sign_ups(count, dice, latest)):
        record = blank(_uuid(dice), millis)
        yield record | (ANONYMOUS if dice.random() < ANONYMOUS_SHARE else _profile(number, dice))


def _uuid(dice: random.Random) -> str:
    """Throw a version 4 UUID; going through uuid.UUID takes six times as long."""
    text = f"{dice.getrandbits(128):032x}"
    variant = "89ab"[int(text[16], 16) % 4]
    return f"{text[:8]}-{text[8:12]}-4{text[13:16]}-{variant}{text[17:20]}-{text[20:]}"


def _sign_ups(count: int, dice: random.Random, latest: int) -> list[int]:
    millis = sorted(latest - int(dice.random() * SIGN_UP_SPAN) for _ in range(count))
    for later in range(1, count):
        if dice.random() < SHARED_MILLISECONDS:
            millis[later] = millis[later - 1]
    return millis


def _profile(number: int, dice: random.Random) -> Record:
    chance = dice.random()
    profile: Record = {
        "primary_email": f"user-{number}-{dice.getrandbits(32):08x}@example.com",
        "primary_email_verified": chance > 0.3,  # noqa: PLR2004  a taste, not a rule
        "primary_email_auth_enabled": True,
        "auth_with_email": True,
        "has_password": chance > 0.5,  # noqa: PLR2004
    }
    if chance > 0.1:  # noqa: PLR2004
        profile["display_name"] = NAMES[number % len(NAMES)]
    if chance > 0.6:  # noqa: PLR2004
        profile["profile_image_url"] = f"https://images.example.com/{number}.png"
        profile["client_metadata"] = {"theme": ("dark", "light")[number % 2], "visits": number}
    if chance > 0.8:  # noqa: PLR2004
        profile["server_metadata"] = {"plan": PLANS[number % 3], "tags": ["a", None, 1.5]}
    return profile
