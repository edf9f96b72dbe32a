"""One project of the fleet, and the settings that its row, its references and the defaults make."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from psycopg.conninfo import conninfo_to_dict

from worker.errors import Misconfigured
from worker.settings.names import (
    API_URL,
    DATABASE_URL,
    PROJECT_ID,
    SCHEMA,
    SECRET_SERVER_KEY,
    Setting,
)
from worker.settings.settings import EMBEDDED, Settings, known_settings, validated
from worker.settings.sources import Given, unknown
from worker.settings.values import SERVER_KEY_PREFIX

NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
REFERENCE = re.compile(r"(env|file):([A-Za-z0-9_][A-Za-z0-9_.-]*)")

# What a project's own settings may be about. The rest of the settings is of the worker.
SECTIONS = ("stack", "database", "schedule", "deletions")
# These are columns of their own, or of no use to a visit.
APART = {
    API_URL,
    PROJECT_ID,
    SECRET_SERVER_KEY,
    ("stack", "retry_minutes"),
    DATABASE_URL,
    SCHEMA,
    ("database", "embedded_dir"),
    ("database", "retry_minutes"),
}

# Who visits many projects looks at each more rarely, and takes over sooner what a dead worker held.
FLEET_DEFAULTS: Mapping[Setting, Any] = {
    ("database", "quiet"): True,
    ("database", "lease_seconds"): 20,
    ("schedule", "activity_seconds"): 0,
}

# Stand where a reference is not resolved: for checking all the rest.
_ANY_KEY = f"{SERVER_KEY_PREFIX}unresolved"
_ANY_URL = "postgresql://unresolved/unresolved"


@dataclass(frozen=True, slots=True)
class Project:
    """A row of `users_sync_fleet.project`; `settings` are by section and name."""

    name: str
    api_url: str
    project_id: str
    secret_ref: str
    database_ref: str
    schema: str
    webhook_ref: str | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    enabled: bool = True
    revision: int = 1

    @property
    def api_host(self) -> str:
        """Name the API host, whose budget all of its projects share."""
        return urlsplit(self.api_url).netloc.lower()

    @property
    def looks_for_hints(self) -> bool:
        """Whether each visit looks for hints in the database, though it could sleep."""
        return self.settings.get("database", {}).get("quiet") is False


@dataclass(frozen=True, slots=True)
class Secrets:
    """Where references lead: `env:NAME` to a variable, `file:NAME` to a file in `folder`."""

    folder: Path
    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)

    def read(self, column: str, reference: str, project: str) -> str:
        """Return the secret that a column of a project refers to.

        Raises Misconfigured, which names the reference and nothing of the secret.
        """
        kind, _, name = checked_reference(reference, project).partition(":")
        called = f"{column} {reference} of {project}"
        text = self._file(name, called) if kind == "file" else self.environ.get(name, "")
        if not text.strip():
            where = f"the file {self.folder / name}" if kind == "file" else f"the variable {name}"
            raise Misconfigured(f"{called}: {where} is not there, or is empty")
        return text.strip()

    def _file(self, name: str, called: str) -> str:
        path = self.folder / name
        try:
            return path.read_text("utf-8-sig")
        except FileNotFoundError:
            return ""
        except (OSError, UnicodeDecodeError) as error:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            raise Misconfigured(f"{called}: the file {path} cannot be read: {why}") from None


def checked_name(name: str) -> str:
    """Return the name of a project. Raises Misconfigured if it cannot be one."""
    if not NAME.fullmatch(name):
        raise Misconfigured(
            "a project's name should be 1 to 63 of a-z, 0-9, dot, dash and underscore, and begin"
            " with a letter or digit"
        )
    return name


def checked_reference(reference: str, project: str) -> str:
    """Return a reference. Raises Misconfigured, quoting nothing: it may be the secret itself."""
    found = REFERENCE.fullmatch(reference)
    if found is None or found[2].startswith(SERVER_KEY_PREFIX):
        raise Misconfigured(
            f"{project}: a secret is given by reference: env:NAME for a variable of the workers, or"
            " file:NAME for a file in fleet.secrets_dir"
        )
    return reference


def resolved(project: Project, secrets: Secrets) -> Settings:
    """Return the settings of a project with its secrets.

    Raises Misconfigured with one line that names the project and quotes no value.
    """
    return _settings(
        project,
        secrets.read("secret_ref", project.secret_ref, project.name),
        secrets.read("database_ref", project.database_ref, project.name),
    )


def webhook_secrets(project: Project, secrets: Secrets) -> list[str]:
    """Return the signing secrets of a project's webhook; none where it has no webhook.

    Raises Misconfigured.
    """
    if project.webhook_ref is None:
        return []
    text = secrets.read("webhook_ref", project.webhook_ref, project.name)
    given = _column(project, text, f"webhook_ref {project.webhook_ref}")
    found = validated({("webhook", "secrets"): given})
    return [secret.get_secret_value() for secret in found.webhook.secrets]


def checked(project: Project) -> Project:
    """Return a project whose row is right, as far as that can be told without its secrets.

    Raises Misconfigured.
    """
    checked_name(project.name)
    for reference in (project.secret_ref, project.database_ref, project.webhook_ref):
        if reference is not None:
            checked_reference(reference, project.name)
    settings = _settings(project, _ANY_KEY, _ANY_URL)
    stack = settings.require_stack()
    return Project(
        project.name,
        stack.api_url,
        stack.project_id,
        project.secret_ref,
        project.database_ref,
        project.schema,
        project.webhook_ref,
        project.settings,
    )


def _settings(project: Project, key: str, url: str) -> Settings:
    columns: dict[Setting, Given] = {
        API_URL: _column(project, project.api_url, "api_url"),
        PROJECT_ID: _column(project, project.project_id, "project_id"),
        SECRET_SERVER_KEY: _column(project, key, f"secret_ref {project.secret_ref}"),
        DATABASE_URL: _column(project, url, f"database_ref {project.database_ref}"),
        SCHEMA: _column(project, project.schema, "schema"),
    }
    defaults = {setting: Given(value, "fleet") for setting, value in FLEET_DEFAULTS.items()}
    settings = validated({**defaults, **dict(_own_settings(project)), **columns})
    if url == EMBEDDED:
        raise Misconfigured(f"{columns[DATABASE_URL].called}: should be postgresql://…")
    # A visit leaves the database alone between two writes, whatever the project says of hints.
    quiet = settings.database.model_copy(update={"quiet": True})
    visiting = settings.model_copy(update={"database": quiet})
    check = f"users-sync fleet check {project.name}"
    visiting.remember(replace(settings.names, check=check), ())
    return visiting


def _column(project: Project, value: str, name: str) -> Given:
    """Give what stands in the project's row, or where its reference leads; by its own name."""
    return Given(value, "project", (project.name,), called=f"{name} of {project.name}")


def _own_settings(project: Project) -> Iterator[tuple[Setting, Given]]:
    known = [each for each in known_settings() if each[0] in SECTIONS and each not in APART]
    dotted = [".".join(each) for each in known]
    what = f"unknown setting of the project {project.name}:"
    for section, values in project.settings.items():
        if not isinstance(values, Mapping):
            raise unknown(what, section, dotted)
        for name, value in values.items():
            if (section, name) not in known:
                raise unknown(what, f"{section}.{name}", dotted)
            yield (section, name), Given(value, "project", (project.name,))


def host_of(url: str) -> str:
    """Name the server of a database URL, whose visits are limited together."""
    parts = conninfo_to_dict(url)
    host = parts.get("hostaddr") or parts.get("host") or "localhost"
    return f"{host}:{parts.get('port') or 5432}".lower()
