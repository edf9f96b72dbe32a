"""A project behind the fake API, a database, and sweeps between them."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import count, dropwhile
from threading import Event
from typing import Any
from uuid import UUID

import httpx
import psycopg
from psycopg import sql

from tests.support.users_apis import api_of
from worker.sandbox.api import Project, Reply, Request
from worker.service.once import sweep_once
from worker.settings.settings import Settings
from worker.sync.state import SweepState
from worker.sync.sweep import Report

API_URL = "http://127.0.0.1:1"
IGNORED = "last_active_at_millis"

# What a table of each shape looks like before the worker adopts it.
PLAIN = """
create schema neon_auth;
create table neon_auth.users_sync (
    id {id_type} primary key, raw_json jsonb, name text, email text, created_at timestamptz,
    deleted_at timestamptz, updated_at timestamptz
)
"""
# Faster than TRUNCATE for the few rows of a test.
EMPTY = """
delete from neon_auth.users_sync;
delete from users_sync_worker.checkpoint;
delete from users_sync_worker.sweep;
delete from users_sync_worker.deletion;
delete from users_sync_worker.quarantine;
delete from users_sync_worker.touched;
delete from users_sync_worker.hint;
delete from users_sync_worker.snapshot;
delete from users_sync_worker.snapshot_chunk;
delete from users_sync_worker.lease
"""

SECTIONS: dict[str, dict[str, Any]] = {
    "stack": {
        "ignored_fields": ["last_active_at_millis"],
        "api_url": API_URL,
        "page_size": 5,
        "timeout_seconds": 5,
        "retry_minutes": 0.05,
        "include_anonymous": True,
        "project_id": None,
        "secret_server_key": None,
    },
    "database": {"retry_minutes": 0.05, "lease_seconds": 60, "schema": "neon_auth"},
    "schedule": {"audit_hours": 24, "resume_minutes": 60},
    "deletions": {"enabled": True, "max_fraction": 1, "max_count": 500, "grace_seconds": 0},
}

OnPage = Callable[[SweepState], None]


def settings(project: Project, **options: Any) -> Settings:
    """Make the settings of a sweep; `options` are named as in their section or sections."""
    access = {"project_id": project.project_id, "secret_server_key": project.secret_server_key}
    chosen = access | options
    known = {name for defaults in SECTIONS.values() for name in defaults}
    assert chosen.keys() <= known, chosen.keys() - known
    sections = {
        section: {name: chosen.get(name, default) for name, default in defaults.items()}
        for section, defaults in SECTIONS.items()
    }
    return Settings.model_validate(sections)


def nothing(_: SweepState) -> None:
    """Care for no page."""


class Nobody:
    """Watches nothing."""

    def failed(self, service: str, error: str) -> None: ...

    def succeeded(self, service: str) -> None: ...

    def answered(self, status: str, seconds: float) -> None: ...

    def took(self, service: str, seconds: float) -> None: ...

    def moved(self) -> None: ...

    def stalled(self) -> bool:
        return False


@dataclass
class World:
    """One project, the API before it, the database behind it, and a connection to look at that."""

    url: str
    conn: psycopg.Connection
    project: Project = field(default_factory=Project)
    schema: str = "neon_auth"
    users_api: str = "today"

    def __post_init__(self) -> None:
        self.api = api_of(self.project, self.users_api)

    def sweep(self, on_page: OnPage = nothing, stop: Event | None = None, **options: Any) -> Report:
        """Sweep once, without a network unless `api_url` says where."""
        transport = None if "api_url" in options else httpx.WSGITransport(self.api)
        chosen = settings(self.project, **{"schema": self.schema, **options})
        return sweep_once(chosen, self.url, stop or Event(), on_page, transport)

    def query(self, text: str, *params: object) -> list[tuple[Any, ...]]:
        query = sql.SQL(text).format(users_sync=sql.Identifier(self.schema, "users_sync"))
        cursor = self.conn.execute(query, params or None)
        return cursor.fetchall() if cursor.description else []

    def forget_everything(self) -> None:
        """Empty the project and the database."""
        self.project = Project()
        self.api = api_of(self.project, self.users_api)
        if self.query("select to_regclass('users_sync_worker.lease')") != [(None,)]:
            self.query(EMPTY)

    def live(self) -> set[str]:
        return {row[0] for row in self.query(LIVE)}

    def deleted(self) -> set[str]:
        return {row[0] for row in self.query(DELETED)}

    def versions(self) -> set[tuple[Any, ...]]:
        """Tell each row's version: it changes when the row is written, were it with the same."""
        return set(self.query("select id::text, xmin::text, ctid::text from {users_sync}"))

    def suspects(self, state: str | None = None) -> set[str]:
        """Give the ids that are recorded as missing, in this state or in any."""
        rows = self.query("select user_id, state from users_sync_worker.deletion")
        return {row[0] for row in rows if state in {None, row[1]}}

    def quarantined(self) -> dict[str | None, str]:
        """Give the error of each quarantined record by user id."""
        return dict(self.query("select user_id, error from users_sync_worker.quarantine"))

    def sweeps(self) -> list[tuple[Any, ...]]:
        """Give number, outcome and deletions of each sweep."""
        return self.query(
            "select number, outcome, deleted from users_sync_worker.sweep order by number"
        )

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """Give the columns of live rows by id, without what is no change."""
        rows = self.query(
            "select id::text, raw_json - %s, name, email,"
            " (extract(epoch from created_at) * 1000)::bigint"
            " from {users_sync} where deleted_at is null",
            IGNORED,
        )
        return {row[0]: row[1:] for row in rows}

    def wanted(self, *, hidden_too: bool = True) -> dict[str, tuple[Any, ...]]:
        """Say what `rows` must be if the table is right."""
        return {
            user_id: row_of(record)
            for user_id, record in self.project.users().items()
            if hidden_too or not record["is_restricted"]
        }

    def asked(self) -> list[str]:
        """Give the ids that were asked for one by one after the first page was."""
        asked = dropwhile(lambda request: not is_list(request), self.api.requests)
        return [r.path.rpartition("/")[2] for r in asked if not is_list(r)]

    def cursors(self) -> list[str | None]:
        """Give the cursors of all pages that were asked for."""
        return [r.query.get("cursor") for r in self.api.requests if is_list(r)]


LIVE = "select id::text from {users_sync} where deleted_at is null"
DELETED = "select id::text from {users_sync} where deleted_at is not null"


def row_of(record: dict[str, Any]) -> tuple[Any, ...]:
    """Say what the columns of a user must hold."""
    profile = {name: value for name, value in record.items() if name != IGNORED}
    millis = record["signed_up_at_millis"]
    return profile, record["display_name"], record["primary_email"], millis


def numbered(number: int) -> str:
    """Give the id of a user by a number, in the same order."""
    return str(UUID(int=(number << 80) + 0x4000_8000_0000_0000_0000))


def sign_up(project: Project, *numbers: int, **fields: Any) -> list[str]:
    """Add users who signed up long ago, in the order of their numbers; two share a millisecond."""
    return [
        project.create(
            **{
                "id": numbered(n),
                "signed_up_at_millis": 1_600_000_000_000 + n // 2,
                "display_name": f"User {n}",
                "primary_email": f"{n}@example.com",
                **fields,
            }
        )
        for n in numbers
    ]


def is_list(request: Request) -> bool:
    return request.path == "/api/v1/users"


def before_page(
    number: int, act: Callable[[Request], Reply | None]
) -> Callable[[Request], Reply | None]:
    """Make a hook that acts once: before this page is answered, counted from 1."""
    pages = count(1)

    def hook(request: Request) -> Reply | None:
        return act(request) if is_list(request) and next(pages) == number else None

    return hook


def raw_record(user_id: str, millis: Any, extra: str = "") -> bytes:
    """Write a user's JSON with something odd in it, as it would come over the wire."""
    fields = f'"id":"{user_id}","signed_up_at_millis":{json.dumps(millis)}'
    return f'{{{fields},"display_name":"Odd","primary_email":null{extra}}}'.encode()


def delete_all(project: Project, ids: Iterable[str]) -> None:
    for user_id in ids:
        project.delete(user_id)
