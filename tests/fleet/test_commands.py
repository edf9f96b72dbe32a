"""The commands of the fleet as they are typed: what they print, and the code they exit with."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.support.processes import Ended, Shell, Site, opened_site

REFERENCES = ("--secret", "env:ACME_KEY", "--database", "env:ACME_URL")


@pytest.fixture
def site(second_url: str, tmp_path: Path) -> Iterator[Site]:
    with opened_site(second_url, tmp_path) as site:
        yield site


@pytest.fixture
def shell(site: Site, database_url: str) -> Shell:
    """Return a shell that knows the control database, and no project of its own."""
    variables = {
        name: value
        for name, value in site.shell.variables.items()
        if not name.startswith(("STACK", "DATABASE"))
    }
    return Shell(site.shell.folder, variables, site.shell._started).having(  # noqa: SLF001
        FLEET_DATABASE_URL=database_url,
        ACME_KEY=site.project.secret_server_key,
        ACME_URL=site.database_url,
    )


def add(site: Site, shell: Shell, *more: str, name: str = "acme") -> Ended:
    project = ("--project-id", site.project.project_id, "--api-url", site.shell.variables[API])
    return shell.run("fleet", "add", name, *project, *REFERENCES, *more)


API = "STACK_API_URL"
# What a worker of one project calls them.
OF_A_SINGLE_WORKER = re.compile(r"\bDATABASE_URL|\bSTACK_|database\.url|stack\.\w")


def complaint(ended: Ended) -> str:
    assert (ended.code, ended.stdout) == (2, "")
    [line] = ended.stderr.splitlines()
    return line.removeprefix("users-sync: ")


def test_project_is_added_listed_changed_paused_resumed_and_removed(
    site: Site, shell: Shell
) -> None:
    assert shell.run("fleet", "init").stdout == "users_sync_fleet: 1 SQL files applied\n"
    assert shell.run("fleet", "init").stdout == "users_sync_fleet: up to date\n"
    assert shell.run("fleet", "list").stdout == "The fleet has no projects.\n"
    added = add(site, shell, "--set", "schedule.sweep_seconds=300")
    assert (added.code, added.stderr) == (0, "")
    [row] = shell.run("fleet", "list", "--json").stdout.splitlines()
    assert json.loads(row) == {
        "name": "acme",
        "api_url": site.shell.variables[API],
        "project_id": site.project.project_id,
        "secret_ref": "env:ACME_KEY",
        "database_ref": "env:ACME_URL",
        "schema": "neon_auth",
        "webhook_ref": None,
        "settings": {"schedule": {"sweep_seconds": 300}},
        "enabled": True,
    }
    assert "already: --replace" in complaint(add(site, shell))
    assert add(site, shell, "--replace", "--schema", "other").code == 0
    assert shell.run("fleet", "pause", "acme").code == 0
    listed = shell.run("fleet", "list").stdout
    assert "other" in listed
    assert "paused" in listed
    status = shell.run("fleet", "status").stdout
    assert status.endswith("1 project: 1 paused\nNo worker is at work: users-sync fleet work\n")
    assert shell.run("fleet", "resume", "acme").code == 0
    assert shell.run("fleet", "remove", "acme").code == 0
    assert "no project acme" in complaint(shell.run("fleet", "remove", "acme"))


def test_status_exits_with_8_if_any_project_is_not_healthy(
    site: Site, shell: Shell, database_url: str
) -> None:
    shell.run("fleet", "init")
    add(site, shell)
    found = {
        "new": ("", 0),
        "fresh": ("fresh_at = now(), swept_at = now()", 0),
        "in quarantine": ("quarantined = 1", 8),
        "held": ("quarantined = 0, held = 1", 8),
        "late": ("held = 0, fresh_at = now() - interval '1 hour'", 8),
        "failing": ("fresh_at = now(), failures = 1", 8),
        "paused": ("failures = 0, quarantined = 1", 0),
    }
    codes = {}
    with psycopg.connect(database_url, autocommit=True) as conn:
        for case, (change, _) in found.items():
            if change:
                conn.execute(b"update users_sync_fleet.visit set " + change.encode())
            if case == "paused":
                shell.run("fleet", "pause", "acme")
            codes[case] = shell.run("fleet", "status").code
    assert codes == {case: code for case, (_, code) in found.items()}


def test_status_of_one_project_says_up_to_when_each_sign_up_has_its_row(
    site: Site, shell: Shell, database_url: str
) -> None:
    shell.run("fleet", "init")
    add(site, shell)
    before = shell.run("fleet", "status", "acme").stdout
    with psycopg.connect(database_url, autocommit=True) as conn:
        conn.execute("update users_sync_fleet.visit set fresh_at = now()")
    after = shell.run("fleet", "status", "acme").stdout
    assert "fresh       never yet\nswept       never yet\n" in before
    assert re.search(r"\nfresh       every sign-up has its row up to \d+\.\d s ago\n", after)


def test_no_secret_gets_into_the_control_database(site: Site, shell: Shell) -> None:
    shell.run("fleet", "init")
    secret = "ssk_very_secret_value"
    wrong = shell.run(
        "fleet", "add", "x", "--project-id", "p", "--secret", secret, "--database", "env:X"
    )
    assert "by reference" in complaint(wrong)
    assert secret not in wrong.stderr
    for setting in (f"stack.secret_server_key={secret}", f"webhook.secrets={secret}"):
        refused = add(site, shell, "--set", setting)
        assert "unknown setting of the project acme" in complaint(refused)
        assert secret not in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--set", "schedule.sweep_second=5"), "did you mean schedule.sweep_seconds?"),
        (("--set", "schedule.poll_seconds=-1"), "schedule.poll_seconds (from the project acme)"),
        (("--set", "sweep_seconds"), "--set: should be like"),
        (("--api-url", "http://example.com"), "api_url of acme: should be https"),
        (("--schema", "pg_own"), "schema of acme: should"),
        (("--database", "postgresql://u:hush@h/d"), "by reference"),
        (("--secret", "file:../etc/passwd"), "by reference"),
    ],
)
def test_mistake_in_a_project_is_one_line(
    site: Site, shell: Shell, arguments: tuple[str, ...], says: str
) -> None:
    line = complaint(add(site, shell, *arguments))
    assert says in line
    assert "hush" not in line


def test_fleet_that_is_not_ready_says_what_to_do(site: Site, shell: Shell, second_url: str) -> None:
    assert "fleet.url is not set" in complaint(
        shell.having(FLEET_DATABASE_URL="").run("fleet", "list")
    )
    assert "fleet init" in complaint(shell.run("fleet", "list"))
    assert "fleet init" in complaint(shell.run("fleet", "work"))
    nowhere = shell.having(FLEET_DATABASE_URL="postgresql://127.0.0.1:1/none").run("fleet", "list")
    assert nowhere.code == 4
    assert "the control database could not be used" in nowhere.stderr
    shell.run("fleet", "init")
    add(site, shell)
    line = complaint(add(site, shell, name="second"))
    assert "another project of the fleet has this table" in line


def test_commands_work_on_a_project_of_the_fleet(site: Site, shell: Shell) -> None:
    site.project.populate(3)
    shell.run("fleet", "init")
    add(site, shell)
    own = ("--project", "acme")
    checked = shell.run("fleet", "check", "acme")
    assert checked.code == 0, checked
    assert shell.run("plan", *own).code == 7
    gone = shell.having(ACME_URL="").run("plan", *own)
    assert "database_ref env:ACME_URL of acme: the variable ACME_URL is not there" in gone.stderr
    assert "no project other" in complaint(shell.run("plan", "--project", "other"))
    assert site.shell.run("--once").code == 0
    site.project.create()
    [new] = set(site.project.ids()) - {
        row[0] for row in site.rows("select id from neon_auth.users_sync")
    }
    assert "inserted" in shell.run("sync-user", new, *own).stdout
    assert shell.run("plan", *own).code == 0
    assert "No user" in shell.run("deletions", *own).stdout
    assert "Nothing is in quarantine" in shell.run("quarantine", *own).stdout
    assert shell.run("quarantine", "retry", *own).code == 0
    assert shell.run("purge", "--older-than", "30d", *own).code == 0
    approved = shell.run("deletions", "approve", "1", *own)
    assert "nothing is held" in approved.stderr


# One that does not exist, on the server that does.
NO_DATABASE = "postgresql:///none"
OTHER_PROJECT = "11111111-2222-4333-8444-555555555555"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"ACME_URL": NO_DATABASE}, "see database_ref env:ACME_URL of acme"),
        ({"ACME_URL": "embedded"}, "database_ref env:ACME_URL of acme: should be postgresql://"),
        ({"ACME_URL": "mysql://h/d"}, "database_ref env:ACME_URL of acme: should"),
        ({"ACME_KEY": "ssk_revoked"}, "secret_ref env:ACME_KEY of acme"),
    ],
)
def test_what_a_reference_leads_to_is_called_by_the_reference(
    site: Site, shell: Shell, wrong: dict[str, str], says: str
) -> None:
    shell.run("fleet", "init")
    add(site, shell)
    if wrong.get("ACME_URL") == NO_DATABASE:
        parts = conninfo_to_dict(site.database_url)
        wrong = {"ACME_URL": f"postgresql:///none?host={parts['host']}&port={parts['port']}"}
    for command in (("fleet", "check", "acme"), ("plan", "--project", "acme")):
        ended = shell.having(**wrong).run(*command)
        assert ended.code == 2
        told = ended.stdout + ended.stderr
        assert says in told
        assert not OF_A_SINGLE_WORKER.search(told)


def test_table_of_another_project_is_told_in_the_words_of_the_project(
    site: Site, shell: Shell
) -> None:
    assert site.shell.run("--once").code == 0
    shell.run("fleet", "init")
    add(site, shell, "--project-id", OTHER_PROJECT)
    told = shell.run("fleet", "check", "acme").stdout
    assert "set project_id of acme to it, or schema of acme to another schema" in told
    line = complaint(shell.run("plan", "--project", "acme"))
    assert "project_id of acme to it, or schema of acme to a schema of this project's own" in line


def test_single_worker_imports_nothing_of_the_fleet(site: Site) -> None:
    site.project.populate(1)
    (site.shell.folder / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name.startswith(('procrastinate', 'psycopg_pool', 'worker.fleet')):\n"
        "            raise AssertionError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    environ = site.shell.environ()
    environ["PYTHONPATH"] = f"{site.shell.folder}:{environ['PYTHONPATH']}"
    ended = subprocess.run(
        [sys.executable, "-m", "worker", "--once"], env=environ, check=False, capture_output=True
    )
    assert ended.returncode == 0, ended.stderr
    assert site.rows("select count(*) from neon_auth.users_sync") == [(1,)]
    other = subprocess.run(
        [sys.executable, "-m", "worker", "fleet", "list"],
        env=environ,
        check=False,
        capture_output=True,
    )
    assert b"AssertionError: worker.fleet" in other.stdout


def test_references_lead_to_files_of_one_folder(
    site: Site, shell: Shell, tmp_path: Path, database_url: str
) -> None:
    site.project.populate(2)
    shell.run("fleet", "init")
    folder = tmp_path / "keys"
    folder.mkdir()
    (folder / "acme").write_text(f"{site.project.secret_server_key}\n")
    files = shell.having(USERS_SYNC_FLEET__SECRETS_DIR=str(folder))
    add(site, files, "--secret", "file:acme")
    assert files.run("plan", "--project", "acme").code == 7
    (folder / "acme").unlink()
    ended = files.run("plan", "--project", "acme")
    assert f"the file {folder / 'acme'} is not there" in ended.stderr
    with psycopg.connect(database_url) as conn:
        text = conn.execute("select p::text from users_sync_fleet.project p").fetchall()[0][0]
    assert site.project.secret_server_key not in text
