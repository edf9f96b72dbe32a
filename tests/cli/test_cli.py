"""Every command as a user runs it: what it prints and where, and the code it exits with."""

import json
import os
import pty
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from tests.conftest import remove_data
from tests.support.processes import Ended, Shell, Site, command, kept_waiting, opened_site
from tests.support.waiting import until
from worker.sandbox.api import TODAY, Request, server_error
from worker.sandbox.postgres import EmbeddedPostgres
from worker.store.migrate import creation_sql, migrations
from worker.store.sweeps import COUNTS

LIVE = "select id from neon_auth.users_sync where deleted_at is null order by id"
DELETED = "select id from neon_auth.users_sync where deleted_at is not null order by id"
SWEEPS = "select number, outcome from users_sync_worker.sweep order by number"
PROJECT = "select project from users_sync_worker.lease"
# Nobody listens there.
NOWHERE = "127.0.0.1:1"


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    with opened_site(database_url, tmp_path) as site:
        yield site


@pytest.fixture
def empty_shell(tmp_path: Path) -> Iterator[Shell]:
    shell = Shell(tmp_path)
    yield shell
    shell.close()


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shell]:
    """Return a shell in a folder of its own, whose embedded Postgres is removed in the end."""
    shell = Shell(tmp_path_factory.mktemp("embedded"))
    yield shell
    shell.close()
    remove_data(EmbeddedPostgres(shell.folder / ".users-sync"))


@pytest.fixture
def role(postgres_url: str) -> Iterator[str]:
    """Return the name of a role that may log in with the password `hush`, and no more.

    To be asked for before the database, which must be dropped first, with the rights in it.
    """
    name = f"users_sync_{uuid4().hex}"
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"create role {name} login password 'hush'".encode())
        yield name
        conn.execute(f"drop role {name}".encode())


def ids(rows: list[tuple[Any, ...]]) -> list[str]:
    return [row[0] for row in rows]


def said(file: Path, text: str) -> bool:
    return text in file.read_text("utf-8")


def complaint(ended: Ended) -> str:
    """Return the one line on stderr that says what is wrong and what to do."""
    [line] = ended.stderr.splitlines()
    assert line.startswith("users-sync: ")
    assert all(line["level"] for line in ended.log)
    return line


def findings(ended: Ended) -> list[tuple[str, str]]:
    """Return verdict and subject of each line of `check`."""
    assert ended.stderr == ""
    return [(line[:5].rstrip(), line[6:20].rstrip()) for line in ended.stdout.splitlines()]


# One sweep


def test_once_logs_json_and_nothing_else(site: Site) -> None:
    site.project.populate(25)
    for number, arguments in enumerate([("--once",), ("run", "--once")], 1):
        ended = site.shell.run(*arguments)
        assert (ended.code, ended.stderr) == (0, "")
        assert all({"event", "level", "timestamp"} <= line.keys() for line in ended.log)
        finished = ended.event("sweep.finished")
        inserted, unchanged = (25, 0) if number == 1 else (0, 25)
        expected = dict.fromkeys(COUNTS, 0) | {"pages": 1, "users": 25, "inserted": inserted}
        expected |= {"sweep": number, "unchanged": unchanged, "waiting": 0}
        assert finished.items() >= {**expected, "outcome": "complete"}.items()
        assert finished["duration_seconds"] > 0
    assert ids(site.rows(LIVE)) == sorted(site.project.ids())
    assert site.rows(SWEEPS) == [(1, "complete"), (2, "complete")]


def test_no_secret_email_or_name_in_any_output(site: Site) -> None:
    site.project.populate(25)
    leaver, refused = site.project.create(), site.project.create(primary_email="bad@example.com")
    odd = str(uuid4())
    raw = b'{"id":"%s","primary_email":"odd@example.com","signed_up_at_millis":"x"}'
    site.project.put_raw(odd, 1, raw % odd.encode())
    password = str(conninfo_to_dict(site.database_url).get("password") or "hush-hush")
    url = make_conninfo(site.database_url, password=password)
    shell = site.shell.having(DATABASE_URL=url, USERS_SYNC_LOG__LEVEL="debug")
    site.execute(creation_sql("neon_auth"))
    site.execute("alter table neon_auth.users_sync add check (email <> 'bad@example.com')")
    site.api.fail_next(server_error())
    outputs = [shell.run("--once")]
    assert outputs[0].event("sweep.finished")["quarantined"] == 2
    site.project.delete(leaver)
    outputs.append(shell.run("run", "--once"))
    wrong_key = "ssk_another_secret"
    last = [shell.having(STACK_SECRET_SERVER_KEY=wrong_key).start("--once")]
    last += [shell.start(name) for name in ("init", "deletions", "check")]
    outputs += [running.end() for running in last]
    assert [ended.code for ended in outputs] == [0, 0, 2, 0, 0, 0]

    hidden = {password, wrong_key, site.project.secret_server_key, "odd@example.com"}
    for user in site.project.users().values():
        hidden |= {user["display_name"], user["primary_email"]} - {None}
    assert len(hidden) > 40
    for ended in outputs:
        decoded = json.dumps([ended.stdout, ended.stderr], ensure_ascii=False)
        texts = (decoded, decoded.encode().decode("unicode_escape"))
        assert [value for value in hidden if any(value in text for text in texts)] == []
    assert refused in outputs[0].stdout


# Exit code 2: a person must act


def test_wrong_settings_exit_with_2(site: Site) -> None:
    wrong = (
        ({"STACK_SECRET_SERVER_KEY": "ssk_wrong"}, "STACK_SECRET_SERVER_KEY"),
        ({"STACK_PROJECT_ID": ""}, "set the variable STACK_PROJECT_ID"),
        ({"HEXCLAVE_PROJECT_ID": "another"}, "STACK_PROJECT_ID and HEXCLAVE_PROJECT_ID disagree"),
        ({"USERS_SYNC_STACK__PAGE_SISE": "5"}, "did you mean USERS_SYNC_STACK__PAGE_SIZE?"),
        ({"USERS_SYNC_CONFIG": "absent.toml"}, "absent.toml cannot be read"),
    )
    started = [site.shell.having(**variables).start("--once") for variables, _ in wrong]
    for running, (_, advice) in zip(started, wrong, strict=True):
        ended = running.end()
        assert ended.code == 2
        assert advice in complaint(ended)


def test_wrong_use_exits_with_2(empty_shell: Shell) -> None:
    (empty_shell.folder / "bad.toml").write_text("[stack]\npage_sise = 5\n")
    wrong = {
        "--once --config absent.toml": "absent.toml cannot be read",
        "--once --config bad.toml": "did you mean stack.page_size?",
        "--once --bad": "No such option: --bad (`users-sync --help`",
        "--once check": "options stand after the command",
        "deletions approve": "'SWEEP'",
    }
    started = [empty_shell.start(*arguments.split()) for arguments in wrong]
    for running, advice in zip(started, wrong.values(), strict=True):
        ended = running.end()
        assert (ended.code, ended.stdout) == (2, "")
        assert advice in complaint(ended)


def test_table_that_cannot_be_used_exits_with_2(site: Site) -> None:
    site.execute("create schema neon_auth create table users_sync (id integer primary key)")
    ended = site.shell.run("--once")
    assert (ended.code, site.api.requests) == (2, [])
    assert "column raw_json is missing; change it, or rename" in complaint(ended)


def test_another_projects_table_exits_with_2_before_anything_is_read(site: Site) -> None:
    site.project.populate(3)
    assert site.shell.run("--once").code == 0
    asked = len(site.api.requests)
    other = site.shell.having(STACK_PROJECT_ID="22222222-2222-4222-8222-222222222222")
    started = other.start("--once"), other.start("check")
    refused, checked = (running.end() for running in started)
    assert refused.code == 2
    assert site.project.project_id in complaint(refused)
    assert len(site.api.requests) == asked + 1  # by `check`
    assert checked.code == 2
    assert findings(checked)[1::3] == [("FAIL", "stack auth"), ("FAIL", "worker")]
    assert len(site.rows(LIVE)) == 3


def test_mistyped_project_is_not_bound_to_an_empty_table(site: Site) -> None:
    """The right one is, though it has no users, either."""
    mistyped = site.shell.having(STACK_PROJECT_ID="22222222-2222-4222-8222-222222222222")
    assert "STACK_PROJECT_ID" in complaint(mistyped.run("--once"))
    ended = site.shell.run("--once")
    assert (ended.code, ended.event("sweep.finished")["users"]) == (0, 0)
    assert site.rows(PROJECT) == [(site.project.project_id,)]


def test_help_lists_the_commands(empty_shell: Shell) -> None:
    ended = empty_shell.run("--help")
    assert (ended.code, ended.stderr) == (0, "")
    for name in ("--once", "run", "init", "check", "demo", "deletions"):
        assert f"  {name} " in ended.stdout


@pytest.mark.parametrize("arguments", [(), ("run",)])
def test_long_running_worker_cannot_begin_without_a_project(
    empty_shell: Shell, arguments: tuple[str, ...]
) -> None:
    ended = empty_shell.run(*arguments)
    assert (ended.code, ended.stdout) == (2, "")
    assert "set the variable STACK_PROJECT_ID" in complaint(ended)


# Exit codes 3 to 6


def test_api_that_fails_for_ever_exits_with_3(site: Site) -> None:
    site.api.on_request(lambda _request: server_error())
    shell = site.shell.having(USERS_SYNC_STACK__RETRY_MINUTES="0.005")
    for unusable in (shell, shell.having(STACK_API_URL=f"http://{NOWHERE}")):
        ended = unusable.run("--once")
        assert ended.code == 3
        assert "Stack Auth could not be used for 0.005 minutes" in complaint(ended)
    site.api.on_request(None)
    assert site.shell.run("--once").code == 0  # at once: the lease was given back


def test_database_that_is_down_exits_with_4(site: Site) -> None:
    shell = site.shell.having(
        DATABASE_URL=f"postgresql://{NOWHERE}/x", USERS_SYNC_DATABASE__RETRY_MINUTES="0.005"
    )
    ended = shell.run("--once")
    assert (ended.code, site.api.requests) == (4, [])
    assert "the database could not be used for 0.005 minutes" in complaint(ended)


def test_lease_that_is_renewed_by_somebody_else_exits_with_5(site: Site) -> None:
    site.execute(creation_sql("neon_auth"))
    site.execute(
        "insert into users_sync_worker.lease (target, holder, epoch, expires_at)"
        " values ('neon_auth', 'another', 1, now() + interval '1 hour')"
    )
    running = site.shell.start("--once")
    until("the lease is awaited", partial(said, running.stdout, "lease.awaited"))
    site.execute("update users_sync_worker.lease set expires_at = now() + interval '2 hours'")
    ended = running.end()
    assert (ended.code, site.api.requests) == (5, [])
    assert "another worker is at work on neon_auth (another)" in complaint(ended)


def test_held_deletions_exit_with_6_until_they_are_approved(site: Site) -> None:
    everybody = site.project.populate(25)
    leaving = sorted(everybody[::5] + everybody[1::5] + everybody[2::5])
    assert site.shell.run("--once").code == 0
    for user_id in leaving:
        site.project.delete(user_id)
    held = site.shell.run("--once")
    finished = held.event("sweep.finished")
    assert (held.code, held.stderr, finished["outcome"]) == (6, "", "held")
    assert (finished["held"], site.rows(DELETED)) == (15, [])

    listed = site.shell.run("deletions")
    lines = listed.stdout.splitlines()
    assert (listed.code, listed.stderr) == (0, "")
    expected = [[user_id, "held", "2", "2"] for user_id in leaving]
    assert [line.replace("|", " ").split() for line in lines[2:17]] == expected
    assert lines[17] == "(15 rows)"
    assert lines[-1].endswith("users-sync deletions approve 2")

    approved = site.shell.run("deletions", "approve", "2")
    assert (approved.code, approved.stderr) == (0, "")
    assert approved.stdout.startswith("Approved 15 deletions.")
    ended = site.shell.run("--once")
    finished = ended.event("sweep.finished")
    assert (ended.code, finished["approved"], finished["deleted"]) == (0, 15, 0)
    assert ids(site.rows(DELETED)) == leaving
    again = site.shell.run("deletions", "approve", "2")
    assert (again.code, "nothing is held" in complaint(again)) == (2, True)


def test_deletions_need_the_workers_tables(site: Site) -> None:
    ended = site.shell.run("deletions")
    assert ended.code == 2
    assert complaint(ended).endswith("run `users-sync init`")


# Signals


def test_sigterm_in_the_middle_of_a_sweep_ends_it_and_the_next_goes_on(site: Site) -> None:
    everybody = site.project.populate(45)
    shell = site.shell.having(USERS_SYNC_STACK__PAGE_SIZE="10")
    ended = stopped_on_fourth_page(site, shell, signal.SIGTERM)
    assert (ended.code, ended.stderr) == (143, "")
    assert ended.event("sweep.finished").items() >= {"outcome": "stopped", "users": 28}.items()
    assert site.rows(SWEEPS) == [(1, "stopped")]

    asked = len(site.pages_asked())
    resumed = shell.run("--once")
    assert (resumed.code, resumed.stderr) == (0, "")
    assert resumed.event("sweep.started").items() >= {"sweep": 1, "resumed": True}.items()
    assert resumed.event("sweep.finished").items() >= {"users": 45, "inserted": 45}.items()
    # The page must begin behind the last user that was applied, so the one before is the cursor.
    assert site.pages_asked()[asked].query["cursor"] == everybody[26]
    assert ids(site.rows(LIVE)) == sorted(everybody)
    assert site.rows(SWEEPS) == [(1, "complete")]


def test_sigint_is_told_from_sigterm_by_the_exit_code(site: Site) -> None:
    site.project.populate(45)
    shell = site.shell.having(USERS_SYNC_STACK__PAGE_SIZE="10")
    ended = stopped_on_fourth_page(site, shell, signal.SIGINT)
    assert (ended.code, ended.stderr) == (130, "")


def stopped_on_fourth_page(site: Site, shell: Shell, number: signal.Signals) -> Ended:
    with kept_waiting(site.api, page=4):
        running = shell.start("--once")
        until("three pages are applied", lambda: len(applied(site)) == 28)
        until("the fourth is asked for", lambda: len(site.pages_asked()) == 4)
        running.signal(number)
        return running.end()


def applied(site: Site) -> list[str]:
    with suppress(psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return ids(site.rows(LIVE))
    return []


def test_signal_while_the_database_is_awaited_ends_a_command(site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(30)
        url = f"postgresql://ada@127.0.0.1:{silent.getsockname()[1]}/x"
        running = site.shell.having(DATABASE_URL=url).start("init")
        with silent.accept()[0]:
            running.signal(signal.SIGTERM)
            assert running.end().code == 143


def test_commands_at_a_terminal_tell_at_once_that_the_database_is_down(site: Site) -> None:
    shell = site.shell.having(DATABASE_URL=f"postgresql://{NOWHERE}/x")
    commands = (
        ("init",),
        ("status",),
        ("plan",),
        ("sync-user", str(uuid4())),
        ("deletions",),
        ("deletions", "approve", "1"),
        ("quarantine",),
        ("quarantine", "retry"),
        ("purge", "--older-than", "30d"),
    )
    for running in [shell.start(*arguments) for arguments in commands]:
        ended = running.end()
        assert (ended.code, ended.stdout) == (4, "")
        # The one line is the only one: nothing was tried again.
        assert "no connection to the database: " in complaint(ended)
        assert "minutes" not in ended.stderr


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("SSL_CERT_FILE", "https://stack.invalid"),
        ("SSL_CERT_DIR", "https://stack.invalid"),
        ("SSLKEYLOGFILE", "https://stack.invalid"),
        ("SSL_CERT_FILE", None),
    ],
)
def test_tls_variable_that_cannot_be_obeyed_exits_with_2(
    site: Site, variable: str, url: str | None
) -> None:
    """A plain http API on this machine needs none of it."""
    site.project.populate(3)
    shell = site.shell.having(**{variable: "/none/none"})
    ended = (shell.having(STACK_API_URL=url) if url else shell).run("--once")
    if url is None:
        assert (ended.code, ended.stderr) == (0, "")
    else:
        assert ended.code == 2
        assert f"the variable {variable}: /none/none cannot be " in complaint(ended)


# init


def test_init_creates_what_is_missing_and_changes_nothing_that_is_there(site: Site) -> None:
    first = site.shell.run("init")
    warnings = [line for line in first.stderr.splitlines() if line.startswith("users-sync: ")]
    created = [line for line in first.stderr.splitlines() if line.startswith("{")]
    assert (first.code, len(created)) == (0, len(migrations()) + 1)
    assert len(warnings) == 1
    assert "Neon's new managed auth uses the schema neon_auth" in warnings[0]
    assert first.stdout.splitlines() == [
        "neon_auth.users_sync: ready (generated)",
        f"users_sync_worker: {len(migrations())} SQL files applied",
    ]
    schema = site.rows(CATALOG)
    again = site.shell.run("init")
    assert (again.code, again.stderr) == (0, "")
    assert again.stdout.splitlines()[1] == "users_sync_worker: up to date"
    assert site.rows(CATALOG) == schema
    other = site.shell.having(USERS_SYNC_DATABASE__SCHEMA="stack_auth").run("init")
    assert (other.code, "neon_auth" in other.stderr) == (0, False)
    assert site.api.requests == []


CATALOG = "select oid, xmin::text, relname from pg_class order by oid"


def test_printed_sql_makes_everything_that_check_asks_for(site: Site, empty_shell: Shell) -> None:
    """Printing needs neither database nor settings."""
    printed = empty_shell.run("init", "--print-sql")
    assert (printed.code, printed.stderr) == (0, "")
    with psycopg.connect(site.database_url, autocommit=True) as conn:
        conn.execute(printed.stdout.encode())
    checked = site.shell.run("check")
    assert findings(checked) == [("ok", name) for name in SUBJECTS]
    assert "`users-sync init`" not in checked.stdout


SUBJECTS = ("configuration", "stack auth", "database", "table", "worker")


# check


@pytest.mark.parametrize("change", ["rename holder to former", "rename to former"])
def test_check_never_refers_to_itself(site: Site, change: str) -> None:
    site.shell.run("init")
    site.execute(f"alter table users_sync_worker.lease {change}")
    swept, checked = site.shell.run("--once"), site.shell.run("check")
    assert (swept.code, checked.code) == (2, 2)
    assert "users-sync check" not in checked.stdout
    site.execute(
        "insert into users_sync_worker.migration (number, name, version)"
        " values (99, '099_later.sql', '7.5.0')"
    )
    ended = [site.shell.run(name) for name in ("--once", "status", "init", "check", "deletions")]
    assert [each.code for each in ended] == [2] * 5
    assert all("update this one to 7.5.0 or later" in e.stdout + e.stderr for e in ended)


def test_check_writes_nothing_and_says_what_init_would_do(site: Site) -> None:
    before = site.rows(CATALOG)
    ended = site.shell.run("check")
    assert (ended.code, findings(ended)) == (0, [("ok", name) for name in SUBJECTS])
    assert ended.stdout.count("`users-sync init`") == 2
    assert site.rows(CATALOG) == before


@pytest.mark.parametrize(("page_size", "limit"), [("1000", "1,000"), ("2000", "1,000"), ("5", "5")])
def test_check_asks_as_a_sweep_does_and_says_which_limit_it_met(
    site: Site, page_size: str, limit: str
) -> None:
    site.project.populate(1_500)
    shell = site.shell.having(USERS_SYNC_STACK__PAGE_SIZE=page_size)
    ended = shell.run("check", "--log-level", "warning")
    assert (ended.code, findings(ended)) == (0, [("ok", name) for name in SUBJECTS])
    assert f"; the project has users; limit up to {limit}\n" in ended.stdout
    accepted = [page for page in site.pages_asked() if int(page.query["limit"]) <= 1_000]
    assert [bool(page.query.get("cursor")) for page in accepted] == [False, True]
    assert {page.query["order_by"] for page in accepted} == {"signed_up_at"}


def test_what_a_sweep_is_refused_for_check_is_refused_for(site: Site) -> None:
    site.project.populate(10)
    site.api.kind = replace(TODAY, cap=2)
    swept, checked = site.shell.run("--once"), site.shell.run("check")
    assert (swept.code, checked.code) == (2, 2)
    assert "so few users a page" in complaint(swept)
    assert "so few users a page" in checked.stdout


@pytest.mark.parametrize("generated", [False, True], ids=["no replica identity", "generated id"])
def test_new_users_come_in_where_a_publication_forbids_updates(
    site: Site, *, generated: bool
) -> None:
    """The first page has nobody new; the last one has, beside users who changed."""
    ids_there = site.project.populate(12)
    shell = site.shell.having(USERS_SYNC_STACK__PAGE_SIZE="5")
    assert shell.run("--once").code == 0
    site.execute("create publication everything for all tables")
    if not generated:
        site.execute("alter table neon_auth.users_sync replica identity nothing")
    elif site.rows("select current_setting('server_version_num')::int < 180000") == [(True,)]:
        pytest.skip("came with PostgreSQL 18")
    new = site.project.populate(3, seed=1)
    assert shell.run("--once").code == 0
    new += site.project.populate(3, seed=2)
    for user_id in (ids_there[0], ids_there[-1]):
        site.project.edit(user_id, display_name="New")
    swept, checked = shell.run("--once"), shell.run("check")
    assert (swept.code, swept.event("sweep.finished")["outcome"]) == (2, "failed")
    assert 'cannot update table "users_sync"' in complaint(swept)
    assert set(ids(site.rows(LIVE))) == {*ids_there, *new}
    assert ("FAIL", "publication") in findings(checked)
    for fix in [line for line in checked.stdout.splitlines() if "publication everything" in line]:
        for statement in fix.split("`")[1::2]:
            site.execute(statement)
    assert shell.run("--once").code == 0
    named = "select count(*) from neon_auth.users_sync where name = 'New'"
    assert site.rows(named) == [(2,)]


def test_check_warns_of_a_list_that_does_not_go_on(site: Site) -> None:
    site.project.populate(20)

    def lose(request: Request) -> None:
        if request.query.get("cursor"):
            request.query["cursor"] = "00000000-0000-4000-8000-ffffffffffff"

    site.api.on_request(lose)
    ended = site.shell.having(USERS_SYNC_STACK__PAGE_SIZE="5").run("check")
    assert (ended.code, findings(ended)[1:3]) == (0, [("ok", "stack auth"), ("warn", "stack auth")])
    assert "page 2 of the users list" in ended.stdout


def test_check_tells_each_trouble_from_the_others(site: Site) -> None:
    ok = dict.fromkeys(SUBJECTS, "ok")
    no_database = {name: ok[name] for name in SUBJECTS[:2]} | {"database": "FAIL"}
    no_api = {"STACK_API_URL": f"http://{NOWHERE}"}
    nowhere = {"DATABASE_URL": f"postgresql://{NOWHERE}/x"}
    no_such = {"DATABASE_URL": make_conninfo(site.database_url, dbname="hush")}
    troubles = (
        ({"STACK_SECRET_SERVER_KEY": "ssk_no"}, 2, ok | {"stack auth": "FAIL"}, "SECRET_SERVER"),
        (no_api, 3, ok | {"stack auth": "FAIL"}, f"{NOWHERE} could not be reached"),
        (nowhere, 4, no_database, "no connection to the database: "),
        ({**no_api, **nowhere}, 3, no_database | {"stack auth": "FAIL"}, "could not be reached"),
        (no_such, 2, no_database, 'the database does not let us in: database "hush"'),
    )
    started = [site.shell.having(**variables).start("check") for variables, *_ in troubles]
    for running, (_, code, expected, advice) in zip(started, troubles, strict=True):
        ended = running.end()
        assert (ended.code, {name: verdict for verdict, name in findings(ended)}) == (
            code,
            expected,
        )
        assert advice in ended.stdout
        assert " 0 minutes" not in ended.stdout


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
def test_signal_stops_a_check_at_once(site: Site, number: signal.Signals) -> None:
    with kept_waiting(site.api, page=1):
        running = site.shell.start("check")
        until("it asks for a page", lambda: bool(site.pages_asked()))
        running.signal(number)
        ended = running.end()
    assert ended.code == 128 + number
    assert list(findings(ended)) == [("ok", "configuration")]


def test_signal_without_a_meaning_stops_no_check(site: Site) -> None:
    with kept_waiting(site.api, page=1) as go_on:
        running = site.shell.start("check")
        until("it asks for a page", lambda: bool(site.pages_asked()))
        running.signal(signal.SIGUSR1)
        go_on.set()
        ended = running.end()
    assert ended.code == 0
    assert {verdict for verdict, _ in findings(ended)} == {"ok"}


def test_check_needs_settings_first(empty_shell: Shell) -> None:
    ended = empty_shell.run("check")
    assert (ended.code, ended.stdout) == (2, "")
    assert "set the variable STACK_PROJECT_ID" in complaint(ended)


def test_check_judges_the_table(site: Site) -> None:
    site.execute(
        "create schema neon_auth; create table neon_auth.users_sync (raw_json jsonb, id text"
        " primary key, name text, email text unique, created_at timestamptz,"
        " updated_at timestamptz, deleted_at timestamptz)"
    )
    plain = site.shell.run("check")
    assert (plain.code, findings(plain)[3:6]) == (0, [("ok", "table"), *[("warn", "table")] * 2])
    assert "can be adopted: plain" in plain.stdout
    fix = plain.stdout.partition("run `")[2].partition("`")[0]
    with psycopg.connect(site.database_url, autocommit=True) as conn:
        conn.execute(fix.encode())
    assert site.rows("select to_regclass('neon_auth.users_sync_deleted_at_idx') is null") == [
        (False,)
    ]
    site.execute("alter table neon_auth.users_sync drop column deleted_at")
    unfit = site.shell.run("check")
    assert (unfit.code, findings(unfit)[3]) == (2, ("FAIL", "table"))
    assert "column deleted_at is missing" in unfit.stdout


def test_check_names_every_right_that_is_lacking(role: str, site: Site) -> None:
    url = make_conninfo(site.database_url, user=role, password="hush")
    lacking = site.shell.having(DATABASE_URL=url)
    site.execute("revoke create on schema public from public")
    ended = lacking.run("check")
    assert (ended.code, findings(ended)[3:]) == (2, [("FAIL", "table"), ("FAIL", "worker")])
    assert ended.stdout.count("users-sync init --print-sql") == 2

    site.execute(creation_sql("neon_auth"))
    granted = 0
    while (ended := lacking.run("check")).code:
        assert "users-sync check" not in ended.stdout
        grants = [line.partition("`")[2].rstrip("`") for line in ended.stdout.splitlines()]
        for grant in filter(None, grants):
            site.execute(grant)
            granted += 1
    assert granted == 2
    assert lacking.run("--once").code == 0


# Where settings come from


def test_page_size_of_earlier_versions_is_warned_of_in_one_line(site: Site) -> None:
    site.project.populate(20)
    ended = site.shell.having(USERS_SYNC_STACK__PAGE_SIZE="auto").run("--once")
    assert ended.code == 0
    [line] = ended.stderr.splitlines()
    warned = {"event": "setting.outdated", "setting": "stack.page_size", "used": 1_000}
    assert json.loads(line).items() >= warned.items()


def test_config_file_holds_all_settings(site: Site, empty_shell: Shell) -> None:
    given = site.shell.variables
    (empty_shell.folder / "all.toml").write_text(
        f"""[stack]
api_url = "{given["STACK_API_URL"]}"
project_id = "{given["STACK_PROJECT_ID"]}"
secret_server_key = "{given["STACK_SECRET_SERVER_KEY"]}"
[database]
url = "{site.database_url}"
"""
    )
    checked = empty_shell.having(USERS_SYNC_CONFIG="all.toml").run("check")
    assert findings(checked) == [("ok", name) for name in SUBJECTS]


def test_hexclave_names_are_enough_and_errors_use_them(site: Site) -> None:
    """A scaffold left the older names empty."""
    given = site.shell.variables
    older = {name: value for name, value in given.items() if name.startswith("STACK_")}
    newer = {f"HEXCLAVE_{name.removeprefix('STACK_')}": value for name, value in older.items()}
    shell = site.shell.having(**dict.fromkeys(older, ""), **newer)
    site.project.populate(3)
    assert shell.run("--once").event("sweep.finished")["inserted"] == 3
    other = "22222222-2222-4222-8222-222222222222"
    wrong = {
        ("HEXCLAVE_PROJECT_ID", other): ("--once", "check", f"sync-user {other}", "plan"),
        ("HEXCLAVE_SECRET_SERVER_KEY", "ssk_wrong"): ("--once", "check"),
    }
    for (name, value), calls in wrong.items():
        for call in calls:
            ended = shell.having(**{name: value}).run(*call.split())
            said = ended.stdout + ended.stderr
            assert (ended.code, f"({name})" in said) == (2, True)
            assert "(STACK_" not in said


# Embedded


def test_embedded_database_is_started_stopped_and_kept(embedded: Shell, site: Site) -> None:
    site.project.populate(5)
    shell = embedded.having(
        **{**site.shell.variables, "DATABASE_URL": "embedded"},
        USERS_SYNC_DATABASE__EMBEDDED_DIR=str(embedded.folder / ".users-sync"),
    )
    assert shell.run("--once").event("sweep.finished")["inserted"] == 5
    assert shell.run("--once").event("sweep.finished")["unchanged"] == 5
    data = EmbeddedPostgres(embedded.folder / ".users-sync").data
    assert not (data / "postmaster.pid").exists()


def test_demos_show_two_sweeps_and_the_rows_they_wrote(embedded: Shell) -> None:
    """Two at once in the same folder: each has a database of its own."""
    started = embedded.start("demo", "--users", "50"), embedded.start("demo", "--users", "0")
    ended, empty = (running.end() for running in started)
    assert (ended.code, ended.stderr) == (0, "")
    first, second = (line for line in ended.stdout.splitlines() if "sweep:" in line)
    assert first.startswith("First sweep:  50 users in ")
    assert first.endswith(" s: 50 inserted.")
    assert second.startswith("Second sweep: 59 users in ")
    assert second.endswith(" s: 12 inserted, 9 updated, 38 unchanged, 3 deleted.")
    assert "(9 rows)" in ended.stdout
    assert (empty.code, empty.stderr) == (0, "")
    assert " s: nothing to do." in empty.stdout


def test_kept_demo_serves_other_commands_until_it_is_interrupted(embedded: Shell) -> None:
    running = embedded.start("demo", "--users", "50", "--keep")
    until("it is ready", partial(said, running.stdout, "until Ctrl-C"))
    config = embedded.folder / ".users-sync" / "demo.toml"
    assert config.stat().st_mode & 0o777 == 0o600
    others = [embedded.start(name, "--config", str(config)) for name in ("check", "--once")]
    checked, swept = (other.end() for other in others)
    assert findings(checked) == [("ok", name) for name in SUBJECTS]
    assert (swept.code, swept.event("sweep.finished")["unchanged"]) == (0, 59)
    running.signal(signal.SIGINT)
    ended = running.end()
    assert (ended.code, ended.stderr, config.exists()) == (0, "", False)


# Started in its own Python


def test_commands_to_run_next_are_named_as_this_one_was_started(site: Site) -> None:
    shell, program = site.shell, command("deletions")
    with subprocess.Popen(
        program, cwd=shell.folder, env=shell.environ(), stderr=subprocess.PIPE
    ) as process:
        _, stderr = process.communicate(timeout=30)
    assert process.returncode == 2
    assert stderr.decode().endswith(f"run `{program[0]} -m worker init`\n")


# On a terminal


def on_terminal(shell: Shell, *, logs_too: bool) -> tuple[int, str, str]:
    """Run `--once` with stderr, and perhaps stdout, on a terminal; return code, both outputs."""
    here, there = pty.openpty()
    environ = {**shell.environ(), "TERM": "xterm", "COLUMNS": "120"}
    with subprocess.Popen(
        command("--once"),
        cwd=shell.folder,
        env=environ,
        stderr=there,
        stdout=there if logs_too else subprocess.PIPE,
    ) as process:
        os.close(there)
        shown = b""
        # Reading fails once nobody has the terminal open any more.
        with suppress(OSError):
            while part := os.read(here, 4096):
                shown += part
        logged = process.stdout.read() if process.stdout else b""
        code = process.wait(10)
    os.close(here)
    return code, logged.decode(), shown.decode()


def test_terminal_shows_progress_and_a_table_while_stdout_stays_logs(site: Site) -> None:
    site.project.populate(25)
    code, logged, shown = on_terminal(site.shell, logs_too=False)
    assert (code, Ended(code, logged, "").event("sweep.finished")["users"]) == (0, 25)
    assert "sweeping" in shown
    table = shown.rpartition("sweeping")[2]
    for word in ("sweep", "outcome", "complete", "inserted", "unchanged", "deleted"):
        assert word in table
    assert "sweep.finished" not in shown


def test_terminal_shows_logs_as_text(site: Site) -> None:
    code, _, shown = on_terminal(site.shell, logs_too=True)
    assert code == 0
    assert "sweep.finished" in shown
    assert '{"event"' not in shown


EVENT_TRIGGER = """
create function public.forbid() returns event_trigger language plpgsql as $$ begin
    raise exception 'no table for ada@example.com' using errcode = '{state}';
end $$;
create event trigger forbid on ddl_command_start execute function public.forbid()
"""


@pytest.mark.parametrize("state", ["P0001", "22012", "55000", "40001"])
def test_tables_that_an_event_trigger_forbids_are_told_in_words(site: Site, state: str) -> None:
    site.execute(EVENT_TRIGGER.format(state=state))
    for arguments in [("init",), ("--once",), ("run",)]:
        ended = site.shell.run(*arguments)
        assert ended.code == 2
        [line] = ended.stderr.splitlines()
        assert line.startswith("users-sync: the database refuses: ")
        assert f"({state}); see its log" in line
        assert "example.com" not in ended.stdout + ended.stderr


def test_database_of_another_encoding_is_refused_before_anything_is_written(
    site: Site, postgres_url: str
) -> None:
    name = f"latin_{uuid4().hex}"
    options = "encoding 'LATIN1' locale 'C' template template0"
    with psycopg.connect(postgres_url, autocommit=True) as conn:
        conn.execute(f"create database {name} {options}".encode())
        shell = site.shell.having(DATABASE_URL=make_conninfo(postgres_url, dbname=name))
        for arguments in [("init",), ("--once",), ("run",), ("status",)]:
            ended = shell.run(*arguments)
            assert ended.code == 2
            assert "the database's encoding is LATIN1" in complaint(ended)
        assert ("FAIL", "database") in findings(shell.run("check"))
        conn.execute(f"drop database {name} with (force)".encode())


@pytest.mark.parametrize(
    "arguments",
    [
        ("deletions", "approve", "0"),
        ("deletions", "approve", "9" * 20),
        ("purge", "--older-than", "999999w"),
        ("status", "--max-age", "999999w"),
        ("sync-user", "11111111-1111-4111-8111-111111111111", "--wait", "1e300"),
    ],
)
def test_numbers_out_of_bounds_are_a_mistake_and_no_bug(
    site: Site, arguments: tuple[str, ...]
) -> None:
    ended = site.shell.run(*arguments)
    assert ended.code == 2
    assert "bug" not in complaint(ended)
