"""What an answer of the users API asks of the caller, if it is not what was asked for."""

import json
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx

from worker.errors import LimitRefused, Misconfigured, Transient, UsersSyncError
from worker.settings.names import Names

# Request Timeout, Too Early, Too Many Requests: the only 4xx that pass by themselves.
PASSING_STATUSES = frozenset({408, 425, 429})

# Servers since the renaming send both, older ones the first alone.
KNOWN_ERROR_HEADERS = ("x-stack-known-error", "x-hexclave-known-error")

# The vendor's own client tells the API's errors from a proxy's by these two kinds of headers.
REQUEST_ID_HEADERS = ("x-stack-request-id", "x-hexclave-request-id")

# The only code that proves a deletion.
GONE = "USER_NOT_FOUND"

_HTML = {"text/html", "application/xhtml+xml"}

_HEADERS_LOST = "see that {url} is right and nothing in front of it drops or changes them"

_HEADER_NEEDED = "which proves nothing: a proxy may have made the answer up, or dropped the header"

# What a person must do about each of the API's own error codes, and about which settings.
REMEDIES = {
    "INVALID_SECRET_SERVER_KEY": (
        "the secret server key is wrong, revoked, or another project's:"
        " set {key} to a key of the project in {project}"
    ),
    "SERVER_AUTHENTICATION_REQUIRED": (
        "no secret server key arrived: set {key}; if it is set,"
        f" x-stack- headers get lost on the way: {_HEADERS_LOST}"
    ),
    "INSUFFICIENT_ACCESS_TYPE": f"x-stack- headers arrived changed: {_HEADERS_LOST}",
    "ACCESS_TYPE_REQUIRED": f"no x-stack- headers arrived: {_HEADERS_LOST}",
    "CURRENT_PROJECT_NOT_FOUND": (
        "the server has no such project: set {project} to the project's id,"
        " or {url} to the server that has it"
    ),
}

# Only what looks like a name is quoted from an answer: the rest may be personal data.
_CODE = re.compile(r"[A-Z][A-Z_]{0,60}")
_PARAMETERS = re.compile(
    r"unknown properties: ([a-z_]{1,40}(?:, [a-z_]{1,40}){0,9})|\b(?:query|params)\.([a-z_]{1,40})"
)
_BODY_FIELDS = re.compile(r"\bbody\.([a-z_]{1,40})")
_LIMIT = re.compile(r"\bquery\.limit\b(?:[^\d\n]{0,80}(\d[\d,_]{0,9}))?")
SAME_HOST = "the same host"
_SECONDS = re.compile(r"\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer as it came, with the moment it was asked for."""

    status: int
    headers: httpx.Headers
    body: bytes | bytearray
    observed_at: datetime

    @property
    def known_error(self) -> dict[str, Any]:
        """The API's own description of an error, or nothing where something else answered."""
        try:
            found = json.loads(self.body)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def header_codes(self) -> list[str]:
        """The codes in the API's headers: two where it sends one under each of its names."""
        return [self.headers[name] for name in KNOWN_ERROR_HEADERS if name in self.headers]

    @property
    def code(self) -> str:
        found = self.known_error.get("code") or next(iter(self.header_codes), None)
        return found if isinstance(found, str) and _CODE.fullmatch(found) else ""

    @property
    def is_from_api(self) -> bool:
        """Whether it has a header of the API; what a proxy answers by itself has none."""
        return not self.headers.keys().isdisjoint({*KNOWN_ERROR_HEADERS, *REQUEST_ID_HEADERS})

    @property
    def is_html(self) -> bool:
        """Whether it says so, or begins like it, as no JSON does."""
        media_type = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        return media_type in _HTML or self.body[:200].lstrip()[:1] == b"<"


def proves_absence(answer: Answer) -> bool:
    """Whether the API itself says that the user does not exist.

    A plain 404 comes from a wrong api_url, or from a proxy. Every version of the API says the code
    in a header, too; a body alone may be one that something in front of it keeps or makes up.
    """
    if answer.status != httpx.codes.NOT_FOUND or not answer.header_codes:
        return False
    codes = [answer.known_error.get("code"), *answer.header_codes]
    return all(code == GONE for code in codes)


def error_for(answer: Answer, host: str, names: Names) -> UsersSyncError:
    """Say what an answer that is no success asks of the caller."""
    status, code = answer.status, answer.code
    said = f"{host} answered {status} {code}".rstrip()
    if status >= httpx.codes.INTERNAL_SERVER_ERROR or status in PASSING_STATUSES:
        return Transient(
            said,
            retry_after=_retry_after(answer.headers),
            too_much=status >= httpx.codes.INTERNAL_SERVER_ERROR,
            # A proxy may answer 408 or 425 to a request that it has passed on.
            unsent=status == httpx.codes.TOO_MANY_REQUESTS,
        )
    if code == GONE and not answer.header_codes:
        return Transient(f"{said} without its header {KNOWN_ERROR_HEADERS[0]}, {_HEADER_NEEDED}")
    if code == GONE:
        return Transient(f"{said}, but in a form that proves nothing")
    if complaint := _complaint_about_limit(answer):
        largest = int(re.sub("[,_]", "", complaint[1])) if complaint[1] else None
        few = "the server gives so few users a page that no list can be proven: raise its cap"
        return LimitRefused(f"{said}: {few}", largest)
    return Misconfigured(f"{said}: {_remedy(answer, names)}")


def error_for_new_user(answer: Answer, host: str, names: Names) -> UsersSyncError:
    """Say what a refusal to create a user asks of the caller; names fields, quotes no value."""
    said = f"{host} refused the user: {answer.status} {answer.code}".rstrip()
    if answer.status == httpx.codes.CONFLICT:
        return Misconfigured(f"{said}: another user has this email address")
    if answer.code in REMEDIES or answer.status in PASSING_STATUSES:
        return error_for(answer, host, names)
    fields = sorted(set(_BODY_FIELDS.findall(_schema_complaint(answer))))
    return Misconfigured(f"{said}: correct {' and '.join(fields)}" if fields else said)


def refuses_order(answer: Answer) -> bool:
    """Whether the server does not know the order that was asked for."""
    if answer.status != httpx.codes.BAD_REQUEST or answer.code != "SCHEMA_ERROR":
        return False
    return "order_by" in _schema_complaint(answer) or "last_active_at" in _schema_complaint(answer)


def _complaint_about_limit(answer: Answer) -> re.Match[str] | None:
    """Find a complaint about the parameter `limit`; group 1 is the cap, if it is named."""
    if answer.code != "SCHEMA_ERROR":
        return None
    return _LIMIT.search(_schema_complaint(answer))


def _schema_complaint(answer: Answer) -> str:
    details = answer.known_error.get("details")
    message = details.get("message") if isinstance(details, dict) else None
    return str(message or answer.known_error.get("error"))


def _remedy(answer: Answer, names: Names) -> str:
    if answer.status < httpx.codes.BAD_REQUEST:
        return _redirect_remedy(answer, names)
    if answer.code == "SCHEMA_ERROR":
        return _schema_remedy(answer, names)
    if answer.code in REMEDIES:
        return REMEDIES[answer.code].format(
            url=names.api_url, project=names.project_id, key=names.secret_server_key
        )
    if answer.status == httpx.codes.NOT_FOUND:
        return f"no users API there; correct {names.api_url}, and leave out /api/v1"
    places = (
        f"{names.api_url} and {names.secret_server_key}, and at what stands in front of the API"
    )
    if answer.is_from_api:
        return f"look at {places}"
    return f"no header of the API is on it, so a proxy may have sent it: look at {places}"


def _redirect_remedy(answer: Answer, names: Names) -> str:
    redirect = f"a redirect to {_target(answer)}, not followed because the key would go along"
    if answer.status == httpx.codes.PERMANENT_REDIRECT and _target(answer) == SAME_HOST:
        # Today's server answers so to paths with an empty part, on the host that was asked.
        return (
            f"{redirect}: write {names.api_url} without a double or trailing slash, and see that no"
            " proxy adds one"
        )
    return f"{redirect}: set {names.api_url} to the address that answers itself"


def _target(answer: Answer) -> str:
    """Name the host and port of a redirect; the rest of its address may hold anything."""
    try:
        url = httpx.URL(answer.headers.get("location", ""))
    except httpx.InvalidURL:
        return "an unreadable address"
    return f"{url.scheme}://{url.netloc.decode()}" if url.host else SAME_HOST


def _schema_remedy(answer: Answer, names: Names) -> str:
    """Name the parameter that the server did not take; an older one knows fewer of them."""
    found = _PARAMETERS.search(str(answer.known_error.get("error")))
    parameter = f"the parameter {found[1] or found[2]}" if found else "a parameter of ours"
    if "include_anonymous" in parameter:
        return (
            "the server does not know the parameter include_anonymous: set stack.include_anonymous"
            " = false (USERS_SYNC_STACK__INCLUDE_ANONYMOUS=false), or update the server"
        )
    return f"the server does not take {parameter}: is {names.api_url} a Stack Auth of 2026?"


def _retry_after(headers: httpx.Headers) -> float | None:
    """Read how many seconds to wait; None for what is no number and no date, or has passed."""
    value = headers.get("retry-after", "").strip()
    seconds = float(value) if _SECONDS.fullmatch(value) else _seconds_until(value, headers)
    return seconds if 0 <= seconds < math.inf else None


def _seconds_until(date: str, headers: httpx.Headers) -> float:
    # Both moments by the server's clock, if it says its own: ours may be wrong.
    until, now = _read_date(date), _read_date(headers.get("date", "")) or datetime.now(UTC)
    return (until - now).total_seconds() if until else math.inf


def _read_date(text: str) -> datetime | None:
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # a year or an offset that no integer of C holds
        return None
    return date if date.tzinfo else date.replace(tzinfo=UTC)
