"""The guide for people from Neon, step by step, on a database as Neon made it.

`python -m tests.project.test_moving_from_neon 5000` tells how long each step takes.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Container, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import dedent

import httpx
import psycopg
import pytest
from psycopg.types.json import Jsonb

from tests.faults.servers import Server, embedded_programs, running_server
from tests.support.places import ROOT
from tests.support.ports import free_port
from tests.support.processes import Ended, Shell
from tests.support.waiting import until
from worker.sandbox.api import FakeStackApi, Project, serve
from worker.sandbox.postgres import create_database, with_database
from worker.sandbox.records import Record

GUIDE = ROOT / "docs" / "moving-from-neon.md"

# What public dumps of Neon's databases show, with the tables that Neon's documentation teaches.
NEON_ROLES = """
create role cloud_admin superuser;
create role neon_superuser;
create role authenticated;
create role anonymous;
create role neondb_owner login createrole bypassrls in role neon_superuser;
alter database neondb owner to neondb_owner;
alter default privileges for role cloud_admin in schema public
    grant all on sequences to neon_superuser with grant option;
alter default privileges for role cloud_admin in schema public
    grant all on tables to neon_superuser with grant option;
set role neondb_owner
"""
NEON_TABLES = """
create schema auth;
create function auth.user_id() returns text language sql stable
    as $$ select nullif(current_setting('request.jwt.claims', true), '')::jsonb ->> 'sub' $$;
create schema neon_auth;
create table neon_auth.users_sync (
    raw_json jsonb not null,
    id text generated always as (raw_json->>'id') stored not null,
    name text generated always as (raw_json->>'display_name') stored,
    email text generated always as (raw_json->>'primary_email') stored,
    created_at timestamptz generated always as (
        to_timestamp(trunc((raw_json->>'signed_up_at_millis')::bigint::double precision) / 1000)
    ) stored,
    updated_at timestamptz,
    deleted_at timestamptz,
    constraint users_sync_pkey primary key (id)
);
create index users_sync_deleted_at_idx on neon_auth.users_sync (deleted_at);
create table todos (
    id serial primary key,
    task text not null,
    user_id text not null references neon_auth.users_sync (id) on delete cascade,
    created_at timestamptz default current_timestamp
);
create table posts (
    id bigint generated always as identity primary key,
    title text not null,
    author_id text references neon_auth.users_sync (id) on delete set null
);
create index on todos (user_id);
alter table todos enable row level security;
create policy own_todos on todos to authenticated
    using ((select auth.user_id()) = user_id) with check ((select auth.user_id()) = user_id);
grant usage on schema public, auth to authenticated, anonymous;
grant select, insert, update, delete on todos to authenticated;
grant select on posts to authenticated, anonymous
"""
NEW_TODOS = "insert into todos (task, user_id) select 'Buy milk', id from neon_auth.users_sync"
NEW_POSTS = "insert into posts (title, author_id) select 'Hello', id from neon_auth.users_sync"
ROWS = "select raw_json, updated_at, deleted_at from neon_auth.users_sync order by id"
COUNTS = """
select count(*), count(*) filter (where deleted_at is not null),
       count(*) filter (where name = 'New name'),
       (select count(*) from todos), (select count(*) from posts)
from neon_auth.users_sync
"""
CLAIMS = "select set_config('request.jwt.claims', json_build_object('sub', %s::text)::text, false)"


# The guide


def section(title: str) -> str:
    """Give what is under a heading of the guide."""
    [found] = re.findall(
        rf"^## {title}\n(.*?)(?=^## |\Z)", GUIDE.read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    return str(found)


def blocks(title: str, language: str = "console") -> list[str]:
    found = re.findall(
        rf"^( *)```{language}\n(.*?)^ *```", section(title), re.MULTILINE | re.DOTALL
    )
    return [dedent(text) for _, text in found]


def commands(block: str) -> list[str]:
    """Give the commands of a console, without what they print; what a reader fills in is set."""
    given = re.findall(r"^\$ (.*?<<'(\w+)'\n.*?\n\2|.*?)$", block, re.MULTILINE | re.DOTALL)
    return [command for command, _ in given if "…" not in command]


# The walk


@dataclass
class Walk:
    """A reader with two servers and a project, who does what the guide says.

    Forked commands are quicker than those of a shell, but tell nothing about the time they take.
    """

    shell: Shell
    forked: bool = True
    times: list[tuple[str, float]] = field(default_factory=list)

    def run(self, command: str, codes: Container[int] = (0,)) -> str:
        """Run a command as the guide prints it, and give what it prints."""
        began = time.perf_counter()
        own = self.forked and command.startswith("users-sync")
        ended = self.shell.run(*command.split()[1:]) if own else self._in_bash(command)
        self.times.append((command.splitlines()[0], time.perf_counter() - began))
        assert ended.code in codes, f"{command}\n{ended.stdout}\n{ended.stderr}"
        return ended.stdout

    def _in_bash(self, command: str) -> Ended:
        ended = subprocess.run(
            ["bash", "-o", "pipefail", "-c", command],  # noqa: S607
            cwd=self.shell.folder,
            env=self.shell.environ(),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return Ended(ended.returncode, ended.stdout, ended.stderr)

    def run_all(self, block: str) -> str:
        return "".join(self.run(command) for command in commands(block))

    def connect(self) -> psycopg.Connection:
        return psycopg.connect(self.shell.variables["DATABASE_URL"], autocommit=True)

    def counts(self) -> tuple[int, ...]:
        with self.connect() as conn:
            return conn.execute(COUNTS.encode()).fetchall()[0]

    def rows(self) -> list[tuple[object, ...]]:
        with self.connect() as conn:
            return conn.execute(ROWS).fetchall()


@contextmanager
def walking(folder: Path, old: Server, new: Server, project: Project) -> Iterator[Walk]:
    """Put `users-sync` and PostgreSQL's programs on the path, and the project behind an API."""
    program = folder / "users-sync"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m worker "$@"\n', "utf-8")
    program.chmod(0o755)
    with psycopg.connect(new.url, autocommit=True) as conn:
        conn.execute("create role app login createrole")
        conn.execute("create database app owner app")
        conn.execute("create database alone owner app")
    with serve(FakeStackApi(project)) as api_url:
        shell = Shell(
            folder,
            {
                "PATH": f"{folder}:{embedded_programs()}:{os.environ['PATH']}",
                "OLD_DATABASE_URL": as_role(old, "neondb_owner", "neondb"),
                "NEW_DATABASE_URL": as_role(new, "app", "app"),
                "DATABASE_URL": as_role(new, "app", "app"),
                "STACK_API_URL": api_url,
                "STACK_PROJECT_ID": project.project_id,
                "STACK_SECRET_SERVER_KEY": project.secret_server_key,
                "USERS_SYNC_HTTP__PORT": str(free_port()),
            },
        )
        try:
            yield Walk(shell)
        finally:
            shell.close()


def as_role(server: Server, role: str, database: str) -> str:
    return with_database(server.url, database).replace("postgres@", f"{role}@")


def load_as_neon(server: Server, users: dict[str, Record]) -> None:
    """Make a database as Neon made it, with a todo and a post of each user."""
    url = create_database(server.url, "neondb")
    with psycopg.connect(url, autocommit=True) as conn:
        conn.execute(NEON_ROLES.encode())
        conn.execute(NEON_TABLES.encode())
        rows = [(Jsonb(record),) for record in users.values()]
        conn.cursor().executemany("insert into neon_auth.users_sync (raw_json) values (%s)", rows)
        conn.execute(NEW_TODOS)
        conn.execute(NEW_POSTS)


def go_on_without_the_sync(project: Project) -> None:
    """Let 2 users leave, 3 change and 4 come."""
    ids = project.ids()
    for user_id in ids[:2]:
        project.delete(user_id)
    for user_id in ids[2:5]:
        project.edit(user_id, display_name="New name")
    for _ in range(4):
        project.create()


@contextmanager
def world(users: int, folder: Path) -> Iterator[tuple[Walk, Project]]:
    programs = embedded_programs()
    with running_server(programs) as old, running_server(programs) as new:
        project = Project()
        project.populate(users)
        load_as_neon(old, project.users())
        go_on_without_the_sync(project)
        with walking(folder, old, new, project) as walk:
            yield walk, project


def move(walk: Walk) -> None:
    """Move the whole database; the second block moves the table alone."""
    title = "Moving to another Postgres"
    whole, alone = blocks(title)
    (walk.shell.folder / "before.sql").write_text(blocks(title, "sql")[0], "utf-8")
    walk.run_all(whole)
    other = with_database(walk.shell.variables["NEW_DATABASE_URL"], "alone")
    Walk(walk.shell.having(NEW_DATABASE_URL=other)).run_all(alone)


@contextmanager
def started(walk: Walk) -> Iterator[None]:
    """Start the worker for good; return when it is ready."""
    port = walk.shell.variables["USERS_SYNC_HTTP__PORT"]
    began = time.perf_counter()
    with (walk.shell.folder / "log").open("wb") as log:
        worker = subprocess.Popen(
            [str(walk.shell.folder / "users-sync")],
            env=walk.shell.environ(),
            stdout=log,
            stderr=log,
        )
    try:
        until("the worker is ready", lambda: is_ready(port))
        walk.times.append(("users-sync", time.perf_counter() - began))
        yield
    finally:
        worker.terminate()
        worker.wait(30)


def is_ready(port: str) -> bool:
    with suppress(httpx.HTTPError):
        return httpx.get(f"http://127.0.0.1:{port}/readyz").is_success
    return False


def sign_up_becomes_a_row(walk: Walk, project: Project) -> None:
    created = project.create(primary_email="late@example.com")
    began = time.perf_counter()
    with walk.connect() as conn:
        query = "select 1 from neon_auth.users_sync where id = %s"
        until("the row is there", lambda: conn.execute(query, (created,)).fetchone() is not None)
    walk.times.append(("a sign-up becomes a row", time.perf_counter() - began))


def verdicts(printed: str) -> set[str]:
    """Give the lines of a check that are the same on each machine."""
    lines = {" ".join(line.split()) for line in printed.splitlines() if not line.startswith("$")}
    return {line for line in lines if not re.match(r"ok (stack auth|database)", line)}


@pytest.mark.skipif(os.name == "nt", reason="the guide's commands are for a Unix shell")
def test_guide_leads_from_a_dump_to_a_ready_worker(tmp_path: Path) -> None:
    with world(40, tmp_path) as (walk, project):
        move(walk)
        before = walk.rows()
        keep, check, plan, sweep, look = blocks("Step by step")

        walk.run_all(keep)
        checked = walk.run_all(check)
        assert verdicts(check) <= verdicts(checked)
        [asked] = commands(plan)
        planned = [line[0] for line in walk.run(asked, codes=(7,)).splitlines()]
        assert [planned.count(sign) for sign in "-~+"] == [2, 3, 4]
        walk.run_all(sweep)
        assert walk.run_all(look).endswith("42 users: nothing to do\n")
        assert walk.counts() == (44, 2, 3, 40, 40)

        with started(walk):
            sign_up_becomes_a_row(walk, project)

        with walk.connect() as conn:
            somebody = conn.execute("select min(user_id) from todos").fetchall()[0][0]
            conn.execute(CLAIMS, (somebody,))
            conn.execute("set role authenticated")
            assert conn.execute("select user_id from todos").fetchall() == [(somebody,)]

        [back] = blocks("Going back")
        walk.run_all(back)
        assert [row for row in walk.rows() if row in before] == before
        assert walk.counts() == (45, 0, 0, 40, 40)


def measure(users: int) -> list[tuple[str, float]]:
    """Do what the guide says with so many users; give each command and its seconds."""
    with tempfile.TemporaryDirectory() as folder, world(users, Path(folder)) as (walk, project):
        walk.forked = False
        move(walk)
        for command in [each for block in blocks("Step by step") for each in commands(block)]:
            walk.run(command, codes=(0, 7))
        with started(walk):
            sign_up_becomes_a_row(walk, project)
        return walk.times


if __name__ == "__main__":
    for command, seconds in measure(int(sys.argv[1])):
        sys.stdout.write(f"{seconds:6.2f} s  {command}\n")
