"""The operator's commands as they are typed: what they print, and the code they exit with."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from tests.support.processes import Ended, Site, opened_site
from tests.support.sweep_world import numbered, raw_record
from tests.support.waiting import until
from worker.sandbox.api import server_error

# Nobody listens there.
NOWHERE = "127.0.0.1:1"

COMMANDS = [
    ("plan",),
    ("status",),
    ("sync-user", numbered(1)),
    ("deletions",),
    ("deletions", "approve", "1"),
    ("quarantine",),
    ("quarantine", "retry"),
    ("purge", "--older-than", "30d"),
]
ASK_THE_API = [command for command in COMMANDS if command[0] in {"plan", "sync-user", "purge"}]

# A plan is made without the worker's tables, too.
commands = pytest.mark.parametrize("command", COMMANDS[1:], ids=" ".join)


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    with opened_site(database_url, tmp_path) as site:
        yield site


@pytest.fixture
def swept(site: Site) -> Site:
    site.project.populate(12)
    assert site.shell.run("--once").code == 0
    return site


def complaint(ended: Ended) -> str:
    """Return the one line on stderr of a command that printed nothing else."""
    assert ended.stdout == ""
    [line] = ended.stderr.splitlines()
    assert line.startswith("users-sync: ")
    return line.removeprefix("users-sync: ")


def printed(ended: Ended) -> list[str]:
    assert (ended.code, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def some_user(site: Site) -> str:
    return sorted(site.project.ids())[2]


# What they do


def test_status_exits_with_0_when_healthy_and_8_when_not(swept: Site) -> None:
    healthy = swept.shell.run("status")
    assert (healthy.code, healthy.stdout.splitlines()[-1]) == (0, "healthy")
    swept.execute(
        "update users_sync_worker.sweep set started = now() - interval '1 day',"
        " finished = now() - interval '1 day'"
    )
    stale = swept.shell.run("status")
    assert stale.code == 8
    assert stale.stdout.splitlines()[-1].startswith("the last complete sweep ended 1 day")
    told: dict[str, Any] = json.loads(swept.shell.run("status", "--json").stdout)
    assert (told["healthy"], told["users_live"], len(told["sweeps"])) == (False, 12, 1)
    assert swept.shell.run("status", "--max-age", "2d").code == 0
    assert swept.shell.run("status", "--max-age", "1h").code == 8


def test_plan_exits_with_0_when_in_step_and_7_when_not(swept: Site) -> None:
    in_step = swept.shell.run("plan")
    assert (in_step.code, in_step.stderr) == (0, "")
    changed, deleted = sorted(swept.project.ids())[:2]
    created = swept.project.create()
    swept.project.edit(changed, display_name="Hush")
    swept.project.delete(deleted)
    planned = swept.shell.run("plan")
    assert (planned.code, planned.stderr, "Hush" in planned.stdout) == (7, "", False)
    told = [line.split()[:2] for line in planned.stdout.splitlines()[:-1]]
    assert sorted(told) == sorted([["+", created], ["~", changed], ["-", deleted]])
    assert "Hush" in swept.shell.run("plan", "--values").stdout
    objects = [json.loads(line) for line in swept.shell.run("plan", "--json").stdout.splitlines()]
    assert [each["change"] for each in objects][-2:] == ["delete", "summary"]
    limited = swept.shell.run("plan", "--limit", "1")
    assert (limited.code, len(limited.stdout.splitlines())) == (7, 3)
    finished = swept.shell.run("--once").event("sweep.finished")
    assert [finished[name] for name in ("inserted", "updated", "deleted")] == [1, 1, 1]
    assert swept.shell.run("plan").code == 0


def test_plan_needs_no_tables_and_creates_none(site: Site) -> None:
    site.project.populate(3)
    planned = site.shell.run("plan")
    assert (planned.code, planned.stdout.count("+ ")) == (7, 3)
    assert site.rows(
        "select to_regnamespace('users_sync_worker'), to_regnamespace('neon_auth')"
    ) == [(None, None)]


def test_sync_user_says_what_became_of_the_user(swept: Site) -> None:
    changed, deleted = sorted(swept.project.ids())[:2]
    created = swept.project.create()
    swept.project.edit(changed, display_name="Changed")
    swept.project.delete(deleted)
    told = [printed(swept.shell.run("sync-user", each)) for each in (created, changed, deleted)]
    assert told == [[f"{created}: inserted"], [f"{changed}: updated"], [f"{deleted}: deleted"]]
    assert printed(swept.shell.run("sync-user", changed.upper())) == [f"{changed}: unchanged"]


def test_sync_user_waits_for_a_sign_up(swept: Site) -> None:
    wanted = str(uuid4())
    asked = len(swept.api.requests)
    running = swept.shell.start("sync-user", wanted, "--wait", "20")
    until("the user is asked for", lambda: len(swept.api.requests) > asked + 1)
    swept.project.create(id=wanted)
    assert printed(running.end()) == [f"{wanted}: inserted"]


def test_stranger_is_a_wrong_id(swept: Site) -> None:
    stranger = str(uuid4())
    ended = swept.shell.run("sync-user", stranger)
    assert ended.code == 2
    assert complaint(ended) == f"neither the project nor the table knows the user {stranger}"
    ended = swept.shell.run("sync-user", "ada@example.com")
    assert (ended.code, "is no user id: those are UUIDs" in complaint(ended)) == (2, True)


def test_quarantine_is_listed_and_tried_again(swept: Site) -> None:
    user_id = numbered(7)
    swept.project.put_raw(user_id, 1, raw_record(user_id, "soon"))
    assert swept.shell.run("--once").code == 0
    listed = printed(swept.shell.run("quarantine"))
    cells = [cell.strip() for cell in listed[2].split("|")]
    assert cells[:2] == [user_id, "signed_up_at_millis is not an integer"]
    again = printed(swept.shell.run("quarantine", "retry"))
    assert again == [
        f"{user_id}: in quarantine: signed_up_at_millis is not an integer",
        "1 left in quarantine.",
    ]
    assert swept.shell.run("sync-user", user_id).code == 3
    swept.project.put_raw(user_id, 1, raw_record(user_id, 1))
    assert printed(swept.shell.run("quarantine", "retry")) == [
        f"{user_id}: inserted",
        "Nothing is in quarantine.",
    ]
    assert printed(swept.shell.run("quarantine")) == ["Nothing is in quarantine."]


def test_sweep_that_reads_a_record_in_good_order_clears_it(swept: Site) -> None:
    user_id = numbered(7)
    swept.project.put_raw(user_id, 1, raw_record(user_id, "soon"))
    swept.shell.run("--once")
    swept.project.put_raw(user_id, 1, raw_record(user_id, 1))
    swept.shell.run("--once")
    assert printed(swept.shell.run("quarantine")) == ["Nothing is in quarantine."]
    assert (user_id,) in swept.rows("select id from neon_auth.users_sync")


def test_purge_tells_what_would_go_and_then_lets_it_go(swept: Site) -> None:
    user_id = some_user(swept)
    swept.project.delete(user_id)
    assert swept.shell.run("--once").code == 0
    swept.execute(
        "create table todos (user_id text references neon_auth.users_sync on delete cascade);"
        " insert into todos select id from neon_auth.users_sync where deleted_at is not null;"
        " insert into todos select id from neon_auth.users_sync where deleted_at is not null;"
        " update neon_auth.users_sync set deleted_at = now() - interval '2 h'"
        " where deleted_at is not null"
    )
    older = ("purge", "--older-than", "1h")
    assert printed(swept.shell.run(*older, "--dry-run")) == [
        "Would purge 1 user.",
        "  public.todos.user_id (cascade): 2 rows would go",
    ]
    assert printed(swept.shell.run(*older)) == ["Purged 1 user."]
    assert swept.rows("select count(*) from todos") == [(0,)]
    assert printed(swept.shell.run(*older)) == ["Purged 0 users."]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (("purge",), "Missing option '--older-than'"),
        (("purge", "--older-than", "59m"), "--older-than: should be 1h or more"),
        (("purge", "--older-than", "soon"), "--older-than: should be a number with s, m, h, d"),
        (("status", "--max-age", "soon"), "--max-age: should be a number with s, m, h, d"),
        (("sync-user",), "Missing argument 'ID'"),
        (("sync-user", numbered(1), "--wait", "-1"), "--wait"),
        (("init", "--rls"), "--rls goes with --print-sql"),
        (("quarantine", "--log-level", "info", "retry"), "options stand after the command"),
    ],
    ids=" ".join,
)
def test_wrong_use_gets_one_line_and_exits_with_2(
    site: Site, wrong: tuple[str, ...], words: str
) -> None:
    ended = site.shell.run(*wrong)
    assert (ended.code, words in complaint(ended)) == (2, True)


# What is out of order


@commands
def test_without_the_workers_tables_each_says_what_to_run(
    site: Site, command: tuple[str, ...]
) -> None:
    ended = site.shell.run(*command)
    assert ended.code == 2
    assert complaint(ended).endswith("run `users-sync init`")
    assert site.rows("select to_regnamespace('users_sync_worker')") == [(None,)]


def test_without_a_database_each_exits_with_4(site: Site) -> None:
    away = site.shell.having(
        DATABASE_URL=f"postgresql://{NOWHERE}/db", USERS_SYNC_DATABASE__RETRY_MINUTES="0"
    )
    started = [away.start(*command, "--log-level", "error") for command in COMMANDS]
    for running in started:
        ended = running.end()
        assert (ended.code, "the database could not be used" in complaint(ended)) == (4, True)


def test_without_an_api_those_that_need_it_exit_with_3(swept: Site) -> None:
    swept.execute("update neon_auth.users_sync set deleted_at = now() - interval '1 year'")
    away = swept.shell.having(USERS_SYNC_STACK__RETRY_MINUTES="0")
    swept.api.on_request(lambda _: server_error())
    for command in ASK_THE_API:
        ended = away.run(*command, "--log-level", "error")
        assert (ended.code, "Stack Auth could not be used" in complaint(ended)) == (3, True)


def test_without_rights_each_exits_with_2(swept: Site, postgres_url: str) -> None:
    role = f"users_sync_test_{uuid4().hex[:12]}"
    with psycopg.connect(postgres_url, autocommit=True) as server:
        server.execute(f"create role {role} login password 'hush'".encode())
        try:
            url = make_conninfo(swept.database_url, user=role, password="hush")
            barred = swept.shell.having(DATABASE_URL=url)
            for running in [barred.start(*command) for command in COMMANDS]:
                ended = running.end()
                assert (ended.code, "permission denied" in complaint(ended)) == (2, True)
                assert "hush" not in ended.stderr
        finally:
            server.execute(f"drop role {role}".encode())


def test_another_projects_table_is_refused(swept: Site) -> None:
    other = swept.shell.having(STACK_PROJECT_ID="22222222-2222-4222-8222-222222222222")
    for command in ASK_THE_API:
        ended = other.run(*command)
        assert ended.code == 2
        assert "another Stack Auth project" in complaint(ended)


def test_no_names_emails_or_secrets_are_printed(swept: Site) -> None:
    created = swept.project.create(display_name="Ada Hush", primary_email="hush@example.com")
    for command in [*COMMANDS, ("sync-user", created), ("status", "--json")]:
        ended = swept.shell.run(*command, "--log-level", "debug")
        for secret in ("Hush", "hush@", swept.project.secret_server_key):
            assert secret not in ended.stdout + ended.stderr
