"""What can be set, within which bounds, and where each value comes from."""

import difflib
import json
import os
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import SplitResult, urlsplit

import psycopg
from psycopg.conninfo import conninfo_to_dict
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails, PydanticCustomError
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from worker.errors import Misconfigured

EMBEDDED = "embedded"
PREFIX = "USERS_SYNC_"
CONFIG_VARIABLE = "USERS_SYNC_CONFIG"
# Names that the people of Stack Auth and Postgres have set already, strongest first.
WELL_KNOWN = {
    ("stack", "api_url"): ("STACK_API_URL",),
    ("stack", "project_id"): ("STACK_PROJECT_ID", "NEXT_PUBLIC_STACK_PROJECT_ID"),
    ("stack", "secret_server_key"): ("STACK_SECRET_SERVER_KEY",),
    ("database", "url"): ("DATABASE_URL",),
}
_WELL_KNOWN_NAMES = {name for names in WELL_KNOWN.values() for name in names}
# A change of these must reach the table: its columns are made of them.
NEVER_IGNORED = {"id", "signed_up_at_millis", "display_name", "primary_email"}
# Postgres cuts longer identifiers off silently.
LONGEST_IDENTIFIER_BYTES = 63


def is_loopback(url: str) -> bool:
    """Whether the URL's host is this machine: nobody in between can read or needs a proxy."""
    host = urlsplit(url).hostname or ""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


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
    return url.rstrip("/").removesuffix("/api/v1").rstrip("/")


def _header_value(text: str) -> str:
    """Refuse what cannot stand in a header, before a library quotes it in its error."""
    if not (text and text.isascii() and text.isprintable() and " " not in text):
        raise ValueError("should be letters, digits and punctuation without spaces")
    return text


def _secret_header_value(secret: SecretStr) -> SecretStr:
    _header_value(secret.get_secret_value())
    return secret


def _database_url(secret: SecretStr) -> SecretStr:
    """Let libpq read it, and drop libpq's own message, which quotes what it stumbled over."""
    if secret.get_secret_value() != EMBEDDED and not _is_conninfo(secret.get_secret_value()):
        raise ValueError(
            "should be postgresql://user:password@host:5432/database (special characters of the"
            f" password percent-encoded, parameters known to libpq only), or {EMBEDDED}"
        )
    return secret


def _is_conninfo(text: str) -> bool:
    try:
        parameters = conninfo_to_dict(text)
    except (psycopg.Error, ValueError):  # ValueError: lone surrogates
        return False
    # libpq takes what stands before a / in a password for the port, and says so on connecting.
    ports = str(parameters.get("port") or "").split(",")
    return bool(parameters) and all(port.isdigit() or not port for port in ports)


def _identifier(text: str) -> str:
    if not 0 < len(text.encode()) <= LONGEST_IDENTIFIER_BYTES or "\0" in text:
        raise ValueError(f"should be 1 to {LONGEST_IDENTIFIER_BYTES} bytes long, without NUL")
    return text


def _names(value: Any) -> Any:
    """Read a list from the environment: as JSON, or separated by commas."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return [name.strip() for name in value.split(",") if name.strip()]
    try:
        return json.loads(value)
    except ValueError:
        raise ValueError("should be a JSON list or names separated by commas") from None


def _ignorable(names: tuple[str, ...]) -> tuple[str, ...]:
    if kept := sorted(NEVER_IGNORED.intersection(names)):
        raise ValueError(f"should not contain {', '.join(kept)}: the table is made of it")
    return names


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


# Longer waits than a day are mistakes, and overflow the millisecond time-outs of Postgres.
Seconds = Annotated[float, Field(gt=0, le=86_400)]
Minutes = Annotated[float, Field(ge=0)]
# The API answers 400 to a limit over 30,000; a chained page of one user cannot progress.
PageSize = Annotated[int, Field(ge=2, le=30_000)]

_CLOSED = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True, allow_inf_nan=False)


class StackSettings(BaseModel):
    model_config = _CLOSED

    api_url: Annotated[str, AfterValidator(_api_url)] = Field(
        default="https://api.stack-auth.com", description="Base URL of the Stack Auth API."
    )
    project_id: Annotated[str, AfterValidator(_header_value)] | None = Field(
        default=None, description="The project whose users are synced."
    )
    secret_server_key: Annotated[SecretStr, AfterValidator(_secret_header_value)] | None = Field(
        default=None, description="The project's secret server key; better in the environment."
    )
    page_size: PageSize | Literal["auto"] = Field(
        default="auto",
        description='Users asked for at once, 2 to 30000; "auto" finds what is fastest.',
    )
    timeout_seconds: Seconds = Field(default=60, description="Time-out of one request, all in all.")
    retry_minutes: Minutes = Field(
        default=5, description="How long --once insists on a failing API."
    )
    include_anonymous: bool = Field(
        default=True,
        description="Ask for anonymous and restricted users; false for servers that can't.",
    )
    ignored_fields: Annotated[
        tuple[str, ...], BeforeValidator(_names), AfterValidator(_ignorable)
    ] = Field(
        default=("last_active_at_millis",),
        description="Fields of a user whose change alone is not worth writing the row.",
    )
    allow_insecure: bool = Field(
        default=False, description="Send the key over plain http to another machine."
    )

    @model_validator(mode="after")
    def _key_is_not_sent_in_the_clear(self) -> Self:
        safe = _split(self.api_url).scheme == "https" or is_loopback(self.api_url)
        if not (safe or self.allow_insecure):
            raise PydanticCustomError(
                "insecure",
                "should be https, or the key is sent in the clear; stack.allow_insecure permits it",
                {"setting": "api_url"},
            )
        return self


class DatabaseSettings(BaseModel):
    model_config = _CLOSED

    url: Annotated[SecretStr, AfterValidator(_database_url)] | None = Field(
        default=None, description='Where the table is; "embedded" starts a Postgres of its own.'
    )
    # BaseModel has a method `schema` already.
    schema_name: Annotated[str, AfterValidator(_identifier)] = Field(
        default="neon_auth", alias="schema", description="Schema of the table users_sync."
    )
    quiet: bool = Field(
        default=False, description="Leave the database alone while nothing changes, so it sleeps."
    )
    lease_seconds: Annotated[float, Field(ge=3, le=86_400)] = Field(
        default=60, description="How long a worker that fell silent keeps others from writing."
    )
    retry_minutes: Minutes = Field(
        default=5, description="How long --once insists on a failing database."
    )
    embedded_dir: Path = Field(
        default=Path(".users-sync"), description="Folder of the embedded Postgres."
    )


class ScheduleSettings(BaseModel):
    model_config = _CLOSED

    poll_seconds: Seconds = Field(
        default=1, description="Pause between two looks at the newest users."
    )
    poll_page_size: PageSize = Field(
        default=200, description="How many of the newest users a poll reads."
    )
    sweep_seconds: Seconds = Field(default=60, description="Least pause between two sweeps.")
    sweep_share: Annotated[float, Field(gt=0, le=1)] = Field(
        default=0.25, description="Share of the time that sweeps may take, to spare the API."
    )
    audit_hours: Annotated[float, Field(gt=0)] = Field(
        default=24,
        description="How often the table itself is read again and hidden users asked for.",
    )
    resume_minutes: Minutes = Field(
        default=60,
        description="How old an unfinished sweep may be and still go on where it stopped.",
    )


class DeletionSettings(BaseModel):
    model_config = _CLOSED

    enabled: bool = Field(
        default=True, description="Mark users deleted that are gone; false only reports them."
    )
    max_fraction: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.2,
        description="Hold deletions if more than this share of the users is gone in a day.",
    )
    max_count: Annotated[int, Field(ge=0)] = Field(
        default=500, description="Hold deletions if more users than this are gone in a day."
    )
    grace_seconds: Annotated[float, Field(ge=0, le=86_400)] = Field(
        default=60, description="How far the API's replicas may lag: younger rows are not deleted."
    )


class LogSettings(BaseModel):
    model_config = _CLOSED

    level: Annotated[
        Literal["debug", "info", "warning", "error", "critical"], BeforeValidator(_lower)
    ] = Field(default="info", description="Least level that is logged, from debug to critical.")
    format: Annotated[Literal["auto", "json", "console"], BeforeValidator(_lower)] = Field(
        default="auto", description='"json" or "console"; "auto" is json unless on a terminal.'
    )


class HttpSettings(BaseModel):
    model_config = _CLOSED

    host: Annotated[str, Field(min_length=1)] = Field(
        default="127.0.0.1",
        description="Address that health, metrics and the status page listen on.",
    )
    port: Annotated[int, Field(ge=0, le=65_535)] = Field(
        default=8080, description="Port of health, metrics and the status page; 0 turns them off."
    )


@dataclass(frozen=True)
class StackAccess:
    """What it takes to read one project."""

    api_url: str
    project_id: str
    secret_server_key: SecretStr


Setting = tuple[str, ...]  # section and name


@dataclass(frozen=True)
class Given:
    """A value as it was found, and where: in words, for messages."""

    value: Any
    origin: str


Layer = Mapping[Setting, Given]

# The constructor of BaseSettings takes no sources, and calls a class method to learn them: a
# context variable carries those of one load there, untouched by loads in other threads.
_layers: ContextVar[Sequence[Layer]] = ContextVar("layers", default=())


class Settings(BaseSettings):
    """All settings; made without `load_settings`, it reads nothing but its arguments."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    stack: StackSettings = StackSettings()
    database: DatabaseSettings = DatabaseSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    deletions: DeletionSettings = DeletionSettings()
    log: LogSettings = LogSettings()
    http: HttpSettings = HttpSettings()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        *_others: PydanticBaseSettingsSource,
        **_more: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        layers = (InitSettingsSource(settings_cls, _nested(layer)) for layer in _layers.get())
        return (init_settings, *layers)

    def require_stack(self) -> StackAccess:
        """Return what reading the project takes; raises Misconfigured if it is not set."""
        stack = self.stack
        if stack.project_id is None:
            raise _not_set("stack", "project_id")
        if stack.secret_server_key is None:
            raise _not_set("stack", "secret_server_key")
        return StackAccess(stack.api_url, stack.project_id, stack.secret_server_key)

    def require_database(self) -> SecretStr:
        """Return the URL of the database, or `embedded`; raises Misconfigured if it is not set."""
        if self.database.url is None:
            raise _not_set("database", "url")
        return self.database.url

    def secrets(self) -> Iterator[str]:
        """Yield every value that must stand in no log, whole and in parts."""
        if self.stack.secret_server_key:
            yield self.stack.secret_server_key.get_secret_value()
        if self.database.url and self.database.url.get_secret_value() != EMBEDDED:
            url = self.database.url.get_secret_value()
            yield url
            yield str(conninfo_to_dict(url).get("password") or "")


def load_settings(
    *,
    config: Path | None,
    overrides: Mapping[str, Any],
    environ: Mapping[str, str],
    secrets_dir: Path = Path("/run/secrets"),
    working_dir: Path = Path(),
) -> Settings:
    """Return the settings; flags win over environment, secret files, config file, defaults.

    `overrides` are the flags, by section and name; None is a flag that was not given. Raises
    Misconfigured with one line that quotes no value, since any may be a secret in the wrong place.
    """
    layers = (
        _from_flags(overrides),
        _from_environment(environ),
        _from_secret_files(secrets_dir),
        _from_config_file(config or _named_by(environ), working_dir),
    )
    token = _layers.set(layers)
    try:
        return Settings()
    except ValidationError as error:
        # Not chained: the library's error carries the values.
        raise _misconfigured(_explain(error, layers)) from None
    finally:
        _layers.reset(token)


def _named_by(environ: Mapping[str, str]) -> Path | None:
    name = environ.get(CONFIG_VARIABLE)
    return Path(name) if name else None


def _from_flags(overrides: Mapping[str, Any]) -> Layer:
    return {
        (section, name): Given(value, "the command line")
        for section, values in overrides.items()
        for name, value in values.items()
        if value is not None
    }


def _from_environment(environ: Mapping[str, str]) -> Layer:
    # Compose files and shells set variables to nothing when they mean not to set them.
    return _by_setting(
        {
            variable: Given(value, f"the variable {variable}")
            for variable, value in environ.items()
            if value and _is_ours(variable)
        }
    )


def _from_secret_files(folder: Path) -> Layer:
    """Read the files named like one of our variables; no folder is no source."""
    try:
        files = sorted(folder.iterdir())
    except OSError:
        return {}
    ours = {file.name.upper(): file for file in files if _is_ours(file.name.upper())}
    texts = {variable: _text(file).rstrip("\r\n") for variable, file in ours.items()}
    return _by_setting(
        {
            variable: Given(text, f"the file {ours[variable]}")
            for variable, text in texts.items()
            if text
        }
    )


def _from_config_file(named: Path | None, working_dir: Path) -> Layer:
    """Read the TOML file; only one that nobody asked for may be absent."""
    path = working_dir / (named or "config.toml")
    if named is None and not os.path.lexists(path):
        return {}
    try:
        sections = tomllib.loads(_text(path))
    except tomllib.TOMLDecodeError as error:
        raise _misconfigured(f"{path} is not valid TOML: {error}") from None
    return {
        setting: Given(value, f"the file {path}") for setting, value in _in_sections(sections, path)
    }


def _in_sections(sections: Mapping[str, Any], path: Path) -> Iterator[tuple[Setting, Any]]:
    for section, values in sections.items():
        if section in Settings.model_fields and not isinstance(values, dict):
            raise _misconfigured(f"{path}: {section} should be a section, [{section}]")
        if not isinstance(values, dict):
            raise _unknown(f"{path}: unknown setting", section, _dotted())
        if section not in Settings.model_fields:
            raise _unknown(f"{path}: unknown section", section, Settings.model_fields)
        for name, value in values.items():
            if (section, name) not in _variables():
                raise _unknown(f"{path}: unknown setting", f"{section}.{name}", _dotted())
            yield (section, name), value


@cache
def _variables() -> Mapping[Setting, tuple[str, ...]]:
    """Return all settings, each with the variables that set it, strongest first."""
    return {
        (section, name): (
            f"{PREFIX}{section}__{name}".upper(),
            *WELL_KNOWN.get((section, name), ()),
        )
        for section, values in Settings().model_dump(by_alias=True).items()
        for name in values
    }


def _dotted() -> list[str]:
    return [".".join(setting) for setting in _variables()]


def _is_ours(variable: str) -> bool:
    """Whether a variable is a setting, or means to be one.

    Without `__` it is not: Kubernetes sets USERS_SYNC_PORT, and more, for a Service of our name.
    """
    return (variable.startswith(PREFIX) and "__" in variable) or variable in _WELL_KNOWN_NAMES


def _by_setting(found: Mapping[str, Given]) -> Layer:
    """Sort what was found by variable; of several variables for one setting the strongest wins."""
    known = [name for names in _variables().values() for name in names]
    for variable in found:
        if variable not in known:
            raise _unknown("unknown variable", variable, known)
    return {
        setting: found[name]
        for setting, names in _variables().items()
        for name in reversed(names)
        if name in found
    }


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")  # Windows editors begin files with a BOM
    except OSError as error:
        raise _misconfigured(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:  # it carries the file's bytes
        raise _misconfigured(f"{path} cannot be read: it is not UTF-8") from None


def _nested(layer: Layer) -> dict[str, dict[str, Any]]:
    sections: dict[str, dict[str, Any]] = {}
    for (section, name), given in layer.items():
        sections.setdefault(section, {})[name] = given.value
    return sections


def _explain(error: ValidationError, layers: Sequence[Layer]) -> str:
    """Say in one line what is wrong with the first setting, and how many more are wrong."""
    reasons: dict[Setting, list[str]] = {}
    for detail in error.errors(include_url=False, include_input=False):
        reasons.setdefault(_setting_of(detail), []).append(_reason(detail))
    setting = next(iter(reasons))
    origins = [layer[setting].origin for layer in layers if setting in layer]
    origin = f" (from {origins[0]})" if origins else ""
    more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
    return f"{'.'.join(setting)}{origin}: {' or '.join(reasons[setting])}{more}"


def _setting_of(detail: ErrorDetails) -> Setting:
    """Return section and name, without the branch of a union or the place in a list."""
    named = detail.get("ctx", {}).get("setting")
    place = (*detail["loc"], named) if named else detail["loc"]
    return tuple(str(part) for part in place[:2])


def _reason(detail: ErrorDetails) -> str:
    return detail["msg"].removeprefix("Value error, ").replace("Input should", "should")


def _not_set(section: str, name: str) -> Misconfigured:
    variable = WELL_KNOWN[section, name][0]
    return Misconfigured(
        f"{section}.{name} is not set: set the variable {variable}, put it into the file"
        f' /run/secrets/{variable}, or write {name} = "..." under [{section}] in config.toml'
    )


def _unknown(what: str, name: str, known: Iterable[str]) -> Misconfigured:
    closest = difflib.get_close_matches(name, known, n=1)
    return _misconfigured(
        f"{what} {name}; " + (f"did you mean {closest[0]}?" if closest else "remove it")
    )


def _misconfigured(message: str) -> Misconfigured:
    # Names of files and keys may hold line breaks.
    return Misconfigured(" ".join(message.split()))
