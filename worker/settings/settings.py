"""What can be set, within which bounds, and how it is put together from its sources."""

from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from psycopg.conninfo import conninfo_to_dict
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    SecretStr,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from worker.settings.names import USUAL_NAMES, Known, Names, Setting
from worker.settings.sources import (
    Given,
    agreed,
    from_config_file,
    from_environment,
    from_flags,
    from_secret_files,
    misplaced_flag,
    names_of,
    nested,
    not_set,
    refused,
    variables,
    without_outdated,
)
from worker.settings.values import (
    DAY_SECONDS,
    EMBEDDED,
    ApiUrl,
    ControlUrl,
    DatabaseUrl,
    Hours,
    IgnoredFields,
    Minutes,
    PageSize,
    PingUrl,
    ProjectId,
    SchemaName,
    Seconds,
    SecretServerKey,
    WebhookSecrets,
    any_case,
    is_safe_for_secrets,
)

__all__ = ["EMBEDDED", "Settings", "StackAccess", "load_settings"]

_CLOSED = ConfigDict(
    frozen=True,
    extra="forbid",
    hide_input_in_errors=True,
    allow_inf_nan=False,
    use_attribute_docstrings=True,  # they are the comments of config.example.toml
)


class StackSettings(BaseModel):
    model_config = _CLOSED

    api_url: ApiUrl = "https://api.stack-auth.com"
    """Base URL of the API; https://api.hexclave.com is the same service."""
    project_id: ProjectId | None = None
    """The project whose users are synced."""
    secret_server_key: SecretServerKey | None = None
    """The project's secret server key; better in the environment."""
    page_size: PageSize = 1_000
    """Users asked for at once, 3 to 30000; less where the server takes no more."""
    timeout_seconds: Seconds = 60
    """Time-out of one request, all in all."""
    retry_minutes: Minutes = 5
    """How long --once insists on a failing API."""
    include_anonymous: bool = True
    """Ask for anonymous and restricted users; false for servers that can't."""
    ignored_fields: IgnoredFields = ("last_active_at_millis",)
    """Fields of a user whose change alone is not worth writing the row."""
    allow_insecure: bool = False
    """Send the key over plain http to another machine."""

    @model_validator(mode="after")
    def _key_is_not_sent_in_the_clear(self) -> Self:
        if not (self.allow_insecure or is_safe_for_secrets(self.api_url)):
            raise PydanticCustomError(
                "insecure",
                "should be https, or the key is sent in the clear; stack.allow_insecure permits it",
                {"setting": "api_url"},
            )
        return self


class DatabaseSettings(BaseModel):
    model_config = _CLOSED

    url: DatabaseUrl | None = None
    """Where the table is; "embedded" starts a Postgres of its own."""
    # BaseModel has a method `schema` already.
    schema_name: SchemaName = Field(default="neon_auth", alias="schema")
    """Schema of the table users_sync."""
    quiet: bool = False
    """Leave the database alone while nothing changes, so it sleeps."""
    lease_seconds: Annotated[float, Field(ge=3, le=DAY_SECONDS)] = 60
    """How long a worker that fell silent keeps others from writing."""
    retry_minutes: Minutes = 5
    """How long --once insists on a failing database."""
    embedded_dir: Path = Path(".users-sync")
    """Folder of the embedded Postgres."""


class ScheduleSettings(BaseModel):
    model_config = _CLOSED

    poll_seconds: Seconds = 1
    """Pause between two looks at the newest users."""
    poll_share: Annotated[float, Field(ge=0.001, le=1)] = 0.2
    """Share of the time that polls may take, to spare the API."""
    poll_page_size: PageSize = 200
    """How many of the newest users a poll reads."""
    activity_seconds: Annotated[float, Field(ge=0, le=DAY_SECONDS)] = 5
    """Pause between two looks at the users active last; 0 turns them off."""
    sweep_seconds: Seconds = 60
    """Least pause between two sweeps."""
    sweep_share: Annotated[float, Field(ge=0.001, le=1)] = 0.25
    """Share of the time that sweeps may take, to spare the API."""
    audit_hours: Hours = 24
    """How often the table itself is read again and hidden users asked for."""
    census_minutes: Minutes = 5
    """How often rows that others wrote or removed are looked for."""
    resume_minutes: Minutes = 60
    """How old an unfinished sweep may be and still go on where it stopped."""


class DeletionSettings(BaseModel):
    model_config = _CLOSED

    enabled: bool = True
    """Mark users deleted that are gone; false only reports them."""
    max_fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Hold deletions if more than this share of the users is gone in a day."""
    max_count: Annotated[int, Field(ge=0, le=1_000_000_000)] = 500
    """Hold deletions if more users than this are gone in a day."""
    grace_seconds: Annotated[float, Field(ge=0, le=DAY_SECONDS)] = 60
    """How far the API's replicas may lag: younger rows are not deleted."""


class LogSettings(BaseModel):
    model_config = _CLOSED

    level: Annotated[Literal["debug", "info", "warning", "error", "critical"], any_case] = "info"
    """Least level that is logged, from debug to critical."""
    format: Annotated[Literal["auto", "json", "console"], any_case] = "auto"
    """How to log: "json" or "console"; "auto" is json unless on a terminal."""


class HttpSettings(BaseModel):
    model_config = _CLOSED

    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address that health, metrics and the status page listen on."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8080
    """Port of health, metrics and the status page; 0 turns them off."""


class WebhookSettings(BaseModel):
    model_config = _CLOSED

    secrets: WebhookSecrets = ()
    """Signing secrets of the project's webhook; without any it is off."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address that webhooks are received on."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 8081
    """Port that webhooks are received on, and nothing else."""


class OnceSettings(BaseModel):
    model_config = _CLOSED

    ping_url: PingUrl | None = None
    """Address to call after each complete --once, so that a monitor notices its absence."""


class OtelSettings(BaseModel):
    model_config = _CLOSED

    enabled: bool = False
    """Send traces and metrics by OpenTelemetry, to where the OTEL_ variables say."""


class FleetSettings(BaseModel):
    model_config = _CLOSED

    url: ControlUrl | None = None
    """The control database: which projects the fleet syncs, and who visits them."""
    secrets_dir: Path = Path("/run/secrets")
    """Folder of the files that references such as file:NAME are about."""
    visits: Annotated[int, Field(ge=1, le=1_000)] = 16
    """Projects that one worker visits at once."""
    visit_seconds: Annotated[float, Field(ge=1, le=600)] = 20
    """Longest visit; what is left is done in the next one."""
    memory_mb: Annotated[int, Field(ge=16, le=1_000_000)] = 512
    """Memory of one worker for mirrors; those used longest ago go first."""
    requests_per_second: Annotated[float, Field(ge=0.1, le=100_000)] = 50
    """Requests a second to one API host, of all workers together."""
    host_visits: Annotated[int, Field(ge=1, le=100_000)] = 32
    """Visits at once to one API host; each has one request under way."""
    database_visits: Annotated[int, Field(ge=1, le=100_000)] = 8
    """Visits at once to one database server; each has one connection."""
    webhooks: bool = False
    """Receive webhooks at /webhooks/stack-auth/NAME."""
    metrics_projects: Annotated[int, Field(ge=0, le=10_000)] = 100
    """Most projects that are named in metrics; with more, none is."""


@dataclass(frozen=True)
class StackAccess:
    """What it takes to read one project, and what to call each in an error."""

    api_url: str
    project_id: str
    secret_server_key: SecretStr
    names: Names


class Settings(BaseSettings):
    """All settings; made without `load_settings`, it reads nothing but its arguments."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    stack: StackSettings = StackSettings()
    database: DatabaseSettings = DatabaseSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    deletions: DeletionSettings = DeletionSettings()
    log: LogSettings = LogSettings()
    http: HttpSettings = HttpSettings()
    webhook: WebhookSettings = WebhookSettings()
    once: OnceSettings = OnceSettings()
    otel: OtelSettings = OtelSettings()
    fleet: FleetSettings = FleetSettings()

    _names: Names = PrivateAttr(USUAL_NAMES)
    _outdated: Sequence[Setting] = PrivateAttr(())

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the library names it
        init_settings: PydanticBaseSettingsSource,
        *_others: PydanticBaseSettingsSource,
        **_more: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        # The library's own sources overlook unknown names, and read no well-known ones.
        return (init_settings,)

    def require_stack(self) -> StackAccess:
        """Return what reading the project takes; raises Misconfigured if it is not set."""
        stack = self.stack
        if stack.project_id is None:
            raise not_set("stack", "project_id")
        if stack.secret_server_key is None:
            raise not_set("stack", "secret_server_key")
        return StackAccess(stack.api_url, stack.project_id, stack.secret_server_key, self._names)

    @property
    def names(self) -> Names:
        """What a person calls the settings of the project."""
        return self._names

    def remember(self, names: Names, outdated: Sequence[Setting]) -> None:
        """Keep what a person calls the settings of the project, and which hold outdated values."""
        self._names, self._outdated = names, outdated

    @property
    def outdated(self) -> Iterator[tuple[str, Any]]:
        """Settings whose value is no longer known, each with the value that is used instead."""
        for section, name in self._outdated:
            yield f"{section}.{name}", getattr(getattr(self, section), name)

    def require_database(self) -> SecretStr:
        """Return the URL of the database, or `embedded`; raises Misconfigured if it is not set."""
        if self.database.url is None:
            raise not_set("database", "url")
        return self.database.url

    def require_fleet(self) -> str:
        """Return the URL of the control database; raises Misconfigured if it is not set."""
        if self.fleet.url is None:
            raise not_set("fleet", "url")
        return self.fleet.url.get_secret_value()

    def secrets(self) -> Iterator[str]:
        """Yield every value that must stand in no log, whole and in parts."""
        if self.stack.secret_server_key:
            yield self.stack.secret_server_key.get_secret_value()
        for each in (self.database.url, self.fleet.url):
            if each and each.get_secret_value() != EMBEDDED:
                yield each.get_secret_value()
                yield str(conninfo_to_dict(each.get_secret_value()).get("password") or "")
        for secret in self.webhook.secrets:
            yield secret.get_secret_value()
        if self.once.ping_url:
            yield self.once.ping_url.get_secret_value()


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
    known = known_settings()
    layers = ChainMap(
        from_flags(overrides),
        from_environment(environ, known),
        from_secret_files(secrets_dir, known),
        from_config_file(config, environ, working_dir, known),
    )
    found = agreed(layers)
    given = without_outdated(found)
    return validated(given, outdated=tuple(sorted(found.keys() - given.keys())))


def validated(given: Mapping[Setting, Given], outdated: Sequence[Setting] = ()) -> Settings:
    """Return the settings that were given, and the defaults of all others.

    `outdated` are the settings that were given a value of earlier versions, which is not used.
    Raises Misconfigured with one line that quotes no value.
    """
    for (section, name), each in given.items():
        # Python takes true for the number 1.
        if isinstance(each.value, bool) and not isinstance(_defaults()[section][name], bool):
            raise misplaced_flag((section, name), each)
    try:
        settings = Settings.model_validate(nested(given))
    except ValidationError as error:
        # Not chained: the library's error carries the values.
        raise refused(error, given) from None
    settings.remember(names_of(given), outdated)
    return settings


@cache
def _defaults() -> Mapping[str, Mapping[str, Any]]:
    return Settings().model_dump(by_alias=True)


@cache
def known_settings() -> Known:
    """Return all settings, each with the variables that set it, strongest first."""
    return {
        (section, name): variables((section, name))
        for section, values in _defaults().items()
        for name in values
    }
