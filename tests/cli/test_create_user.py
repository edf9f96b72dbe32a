"""`users-sync create-user`: a user in the project, and the row at once."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.processes import Ended, Site, opened_site
from worker.sandbox.api import Reply, Request, server_error

ADDRESS = "ada@example.org"
ROWS = "select id::text, name, email from neon_auth.users_sync where email = 'ada@example.org'"


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    with opened_site(database_url, tmp_path) as site:
        site.project.populate(5)
        assert site.shell.run("--once").code == 0
        yield site


def create(site: Site, *options: str) -> Ended:
    return site.shell.run("create-user", "--email", ADDRESS, *options)


def complaint(ended: Ended) -> str:
    """Return the complaint on stderr, where a record that goes into quarantine is logged, too."""
    [line] = [line for line in ended.stderr.splitlines() if line.startswith("users-sync: ")]
    return line


def test_created_user_is_in_the_table_when_the_command_returns(site: Site) -> None:
    ended = create(site, "--name", "Ada", "--verified", "--metadata", '{"plan": "free"}')
    [row] = site.rows(ROWS)
    assert (ended.code, ended.stdout, ended.stderr) == (0, f"{row[0]}\n", "")
    assert row[1:] == ("Ada", ADDRESS)
    user = site.project.users()[row[0]]
    assert (user["primary_email_verified"], user["server_metadata"]) == (True, {"plan": "free"})


def test_json_tells_the_id(site: Site) -> None:
    told = json.loads(create(site, "--json").stdout)
    assert told == {"id": site.rows(ROWS)[0][0], "in_table": True}


def test_password_comes_from_standard_input_and_stands_nowhere(site: Site) -> None:
    (site.shell.folder / "stdin").write_text("open-sesame-42\n")
    ended = create(site, "--password-stdin", "--log-level", "debug")
    assert ended.code == 0
    assert site.project.users()[ended.stdout.strip()]["has_password"] is True
    assert "open-sesame" not in ended.stdout + ended.stderr


def test_missing_password_is_refused_before_anything_is_created(site: Site) -> None:
    ended = create(site, "--password-stdin")
    assert (ended.code, "--password-stdin: should get one line" in complaint(ended)) == (2, True)
    assert site.rows(ROWS) == []


def test_second_user_with_the_same_address_is_refused(site: Site) -> None:
    assert create(site).code == 0
    again = create(site)
    assert (again.code, again.stdout) == (2, "")
    assert "another user has this email address" in complaint(again)
    assert ADDRESS not in again.stderr
    assert len(site.rows(ROWS)) == 1


def test_refused_field_is_named(site: Site) -> None:
    ended = site.shell.run("create-user", "--email", "no address")
    assert (ended.code, "correct primary_email" in complaint(ended)) == (2, True)


@pytest.mark.parametrize("metadata", ["", "[]", "5", "{"])
def test_metadata_that_is_no_object_is_refused(site: Site, metadata: str) -> None:
    ended = create(site, "--metadata", metadata)
    assert (ended.code, "--metadata: should be a JSON object" in complaint(ended)) == (2, True)


def test_wrong_key_creates_nobody(site: Site) -> None:
    wrong = site.shell.having(STACK_SECRET_SERVER_KEY="ssk_wrong")
    ended = wrong.run("create-user", "--email", ADDRESS)
    assert (ended.code, "the secret server key is wrong" in complaint(ended)) == (2, True)
    assert site.rows(ROWS) == []


def test_database_that_is_down_is_told_before_anything_is_created(site: Site) -> None:
    nowhere = site.shell.having(DATABASE_URL="postgresql://ada@127.0.0.1:1/app")
    before = site.project.ids()
    assert nowhere.run("create-user", "--email", ADDRESS).code == 4
    assert site.project.ids() == before


def test_user_without_a_row_is_told_with_the_id(site: Site) -> None:
    site.execute("alter table neon_auth.users_sync add constraint no_ada check (email !~ '^ada@')")
    ended = create(site, "--json")
    told = json.loads(ended.stdout)
    [user_id] = [i for i, u in site.project.users().items() if u["primary_email"] == ADDRESS]
    assert (ended.code, told["id"], told["in_table"]) == (4, user_id, False)
    assert f"created {user_id}, which is not in the table yet" in complaint(ended)


def test_answer_that_is_lost_leaves_it_open_and_is_not_tried_again(site: Site) -> None:
    def fail(request: Request) -> Reply | None:
        return server_error() if request.method == "POST" else None

    site.api.on_request(fail)
    ended = create(site)
    assert (ended.code, "it is not known whether the user was created" in complaint(ended)) == (
        3,
        True,
    )
    assert sum(request.method == "POST" for request in site.api.requests) == 1


def test_user_is_created_beside_a_worker_that_is_running(site: Site) -> None:
    worker = site.shell.start()
    try:
        assert create(site).code == 0
        assert len(site.rows(ROWS)) == 1
    finally:
        worker.process.terminate()
        worker.end()
