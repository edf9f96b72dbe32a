"""What a value must be like. What a check says quotes nothing: any value may be a secret."""

import json
import re
from base64 import b64decode
from typing import Annotated, Any
from urllib.parse import SplitResult, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr

from worker.model import LARGEST_PAGE, SMALLEST_PAGE
from worker.net import is_loopback
from worker.settings.names import API_URL, PROJECT_ID, Setting

EMBEDDED = "embedded"
# A change of these must reach the table: its columns are made of them.
NEVER_IGNORED = {"id", "signed_up_at_millis", "display_name", "primary_email"}
# Stack Auth's keys tell their kind.
SERVER_KEY_PREFIX = "ssk_"
OTHER_KEYS = {
    "pck_": "a publishable client key (pck_)",
    "sak_": "a super secret admin key (sak_)",
}
LEAST_WEBHOOK_SECRET_BYTES = 16
RESERVED_SCHEMAS = {"information_schema", "users_sync_worker"}
# Postgres cuts longer identifiers off silently.
LONGEST_IDENTIFIER_BYTES = 63


def is_safe_for_secrets(url: str) -> bool:
    """Whether the connection to the URL's host cannot be read on the way."""
    parts = _split(url)
    return parts.scheme == "https" or is_loopback(parts.hostname or "")


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        _ = parts.port  # parsed on access only
    except ValueError:  # it quotes the URL, which may hold a password
        raise ValueError("should be a URL such as https://api.stack-auth.com") from None
    return parts


def _api_url(text: str) -> str:
    """Return the base URL, to which paths that begin with /api/v1 are appended."""
    url = text.strip()
    parts = _split(url)
    if "@" in url:
        raise ValueError("should hold no user or password")
    if parts.scheme not in {"http", "https"} or not parts.hostname:
        raise ValueError("should begin with https:// and a host")
    if set(url) & set("?#") or not url.isprintable() or " " in url:
        raise ValueError("should have no query, fragment or space")
    # Today's server redirects paths with an empty part, and a redirect is not followed.
    scheme, _, rest = url.partition("://")
    base = f"{scheme}://{re.sub('/+', '/', rest)}"
    return base.rstrip("/").removesuffix("/api/v1").rstrip("/")


def comparable(setting: Setting, value: str) -> object:
    """Give what two values of a setting have in common if they mean the same."""
    if setting == PROJECT_ID:
        return value.lower()
    if setting == API_URL:
        try:
            parts = _split(_api_url(value))
        except ValueError:  # it will be refused in other words
            return value
        port = parts.port or {"http": 80, "https": 443}[parts.scheme]
        return parts.scheme, parts.hostname, port, parts.path
    return value


def _header_value(text: str) -> str:
    """Refuse what cannot stand in a header, before a library quotes it in its error."""
    if text[:1] in {'"', "'"} and text[:1] == text[-1:]:
        raise ValueError("should have no quotes around it: `docker --env-file` takes them as given")
    if not (text and text.isascii() and text.isprintable() and " " not in text):
        raise ValueError("should be letters, digits and punctuation without spaces")
    return text


def _project_id(text: str) -> str:
    """Refuse a key in its place; the server takes an id in either case, and gives it in lower."""
    if text.startswith((SERVER_KEY_PREFIX, *OTHER_KEYS)):
        raise ValueError("should be the project's id, but this is a key")
    return _header_value(text).lower()


def _secret_server_key(secret: SecretStr) -> SecretStr:
    text = _header_value(secret.get_secret_value())
    kind = next((kind for prefix, kind in OTHER_KEYS.items() if text.startswith(prefix)), None)
    if kind:
        raise ValueError(
            f"should be a secret server key, which begins with {SERVER_KEY_PREFIX}: this is {kind}"
        )
    return secret


def _database_url(secret: SecretStr) -> SecretStr:
    """Let libpq read it, and drop libpq's own message, which quotes what it stumbled over."""
    text = secret.get_secret_value()
    if text[:1] in {'"', "'"} and text[:1] == text[-1:]:
        raise ValueError("should have no quotes around it: `docker --env-file` takes them as given")
    if text != EMBEDDED and not _is_conninfo(text):
        raise ValueError(
            "should be postgresql://user:password@host:5432/database (special characters of the"
            f" password percent-encoded, parameters known to libpq only), or {EMBEDDED}"
        )
    return secret


def _control_url(secret: SecretStr) -> SecretStr:
    if secret.get_secret_value() == EMBEDDED:
        raise ValueError("should be postgresql://…: every worker of the fleet must reach it")
    return secret


def _is_conninfo(text: str) -> bool:
    try:
        parameters = conninfo_to_dict(text)
    except (psycopg.Error, ValueError):  # ValueError: lone surrogates
        return False
    # libpq takes what stands before a / in a password for the port, and what stands behind an @ for
    # the host, and says so on connecting. A socket may well have one in its name.
    ports = str(parameters.get("port") or "").split(",")
    hosts = str(parameters.get("host") or "").split(",")
    return (
        bool(parameters)
        and all(port.isdigit() or not port for port in ports)
        and not any("@" in host and host[0] not in "/@" for host in hosts)
    )


def _schema_name(text: str) -> str:
    if text.startswith("pg_") or text in RESERVED_SCHEMAS:
        raise ValueError("should be a schema for users_sync alone: this one is Postgres' or ours")
    if not 0 < len(text.encode()) <= LONGEST_IDENTIFIER_BYTES or "\0" in text:
        raise ValueError(f"should be 1 to {LONGEST_IDENTIFIER_BYTES} bytes long, without NUL")
    return text


def _names(value: Any) -> Any:
    """Read a list of TOML, or one from the environment: as JSON, or separated by commas."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.lstrip().startswith("[") else value.split(",")
        except ValueError:
            raise ValueError("should be a JSON list or names separated by commas") from None
    if not isinstance(value, list | tuple):
        return value
    names = [name.strip() if isinstance(name, str) else name for name in value]
    return [name for name in names if name != ""]


def _ignorable(names: tuple[str, ...]) -> tuple[str, ...]:
    if kept := sorted(NEVER_IGNORED.intersection(names)):
        raise ValueError(f"should not contain {', '.join(kept)}: the table is made of it")
    return names


def _webhook_secrets(secrets: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
    for secret in secrets:
        key = secret.get_secret_value().removeprefix("whsec_")
        try:
            decoded = b64decode(key + "==", validate=False) if key.isascii() else b""
        except ValueError:
            decoded = b""
        if len(decoded) < LEAST_WEBHOOK_SECRET_BYTES:
            raise ValueError("should be a signing secret of the webhook's endpoint (whsec_…)")
    return secrets


def _ping_url(secret: SecretStr) -> SecretStr:
    """Refuse what cannot be called, without quoting it: the URL may hold a secret."""
    url = secret.get_secret_value()
    try:
        parts = urlsplit(url)
        usable = bool((parts.hostname or "").encode("idna")) and parts.port != 0
    except ValueError:
        usable = False
    if not usable or parts.scheme not in {"http", "https"} or re.search(r"\s", url):
        raise ValueError("should be an address such as https://monitor.example/ping")
    return secret


ApiUrl = Annotated[str, AfterValidator(_api_url)]
ProjectId = Annotated[str, AfterValidator(_project_id)]
SecretServerKey = Annotated[SecretStr, AfterValidator(_secret_server_key)]
DatabaseUrl = Annotated[SecretStr, AfterValidator(_database_url)]
ControlUrl = Annotated[SecretStr, AfterValidator(_control_url), AfterValidator(_database_url)]
SchemaName = Annotated[str, AfterValidator(_schema_name)]
IgnoredFields = Annotated[tuple[str, ...], BeforeValidator(_names), AfterValidator(_ignorable)]
WebhookSecrets = Annotated[
    tuple[SecretStr, ...], BeforeValidator(_names), AfterValidator(_webhook_secrets)
]
PingUrl = Annotated[SecretStr, AfterValidator(_ping_url)]
any_case = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)

# Longer waits than a day are mistakes, and overflow the millisecond time-outs of Postgres.
DAY_SECONDS = 86_400
Seconds = Annotated[float, Field(gt=0, le=DAY_SECONDS)]
# Nor is anything awaited for longer than a year; Postgres counts intervals in 64 bits.
YEAR_HOURS = 8_760
Hours = Annotated[float, Field(gt=0, le=YEAR_HOURS)]
Minutes = Annotated[float, Field(ge=0, le=YEAR_HOURS * 60)]
PageSize = Annotated[int, Field(ge=SMALLEST_PAGE, le=LARGEST_PAGE)]
