"""Where the key may go, what names may do in SQL, and what the worker may do to a machine."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, LiteralString
from urllib.parse import urlsplit

import httpx
import psycopg
import pytest
from hypothesis import given
from hypothesis import strategies as st
from psycopg import sql
from pydantic import ValidationError

from tests.faults.test_hostile_answers import repeated
from tests.support.ports import free_port
from tests.support.processes import Site, command, opened_site
from tests.support.waiting import until
from worker.cli.healthcheck import trouble
from worker.net import is_loopback
from worker.settings.settings import StackSettings
from worker.stack_auth.transport import choose_proxy

PROXIES = {"http": "http://me:hush@proxy.example", "https": "http://me:hush@proxy.example"}

# Pieces that parsers of URLs disagree about.
pieces = st.sampled_from(
    [
        *["http://", "https://", "HTTP://", "http:/", "//", "/", "\\", "@", "#", "?", ":", ";"],
        *["127.0.0.1", "127.1", "2130706433", "0x7f.1", "017700000001", "0.0.0.0", "[::]"],
        *["[::1]", "[::1", "[::ffff:127.0.0.1]", "[::1%25eth0]", "[::1]evil.example"],
        *["localhost", "LOCALHOST", "localhost.", "a.localhost", "localhost.evil.example"],
        *["evil.example", ".evil.example", "@evil.example", ":80@evil.example", ":99999"],
        *[
            "%40",
            "%2f",
            "%00",
            "\t",
            "\n",
            " ",
            "\uff1a",
            "\u3002",
            "\uff11\uff12\uff17.0.0.1",
            "\u24dbocalhost",
        ],
    ]
)


@pytest.mark.fault(
    "`api_url` is written so that parsers of URLs disagree about its host",
    held="the key goes over plain HTTP to loopback alone, and to no proxy then",
    quick=300,
    thorough=30_000,
)
def test_key_is_never_sent_in_the_clear_to_another_machine(tries: int) -> None:
    @repeated(tries)
    @given(st.lists(pieces, min_size=1, max_size=6).map("".join) | st.text())
    def attempt(text: str) -> None:
        try:
            kept = StackSettings(api_url=text).api_url
            url = httpx.URL(kept)
        except (ValidationError, httpx.InvalidURL):
            return
        assert (url.userinfo, url.query, url.fragment) == (b"", b"", "")
        if url.scheme == "http":
            assert is_loopback(url.host)
            assert url.host in {urlsplit(kept).hostname, f"[{urlsplit(kept).hostname}]"}
            assert choose_proxy(url, PROXIES) is None

    attempt()


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    with opened_site(database_url, tmp_path) as site:
        yield site


# Each would do something, or end a command, were it ever put into SQL as it is.
NAMES = [
    "'; drop schema users_sync_worker cascade; --",
    '"; drop table a; --',
    "%s %(id)s %% {table} {0} $1 ${x}",
    'a"."b',
    "Ünï\u2028cödé \U0001f600 " + "x" * 35,  # 63 bytes
    "\\'\"\\",
    "select",
    "a\nb\tc",
    "--",
    "/*",
    " ",
    "$$ $a$",
    "neon_auth.users_sync",
    "-x",
]
COMMANDS = ["init", "--once", "check", "plan", "status", "deletions", "quarantine"]


@pytest.mark.fault(
    "the schema's name is SQL, quotes, percent signs, braces, 63 bytes of Unicode",
    held="every command works on that schema, and on nothing else",
    quick=2,
    thorough=len(NAMES),
)
def test_name_of_a_schema_is_only_a_name(site: Site, attempt: int) -> None:
    name = NAMES[attempt]
    site.project.populate(3)
    leaver = site.project.create()
    shell = site.shell.having(
        USERS_SYNC_DATABASE__SCHEMA=name, USERS_SYNC_DELETIONS__MAX_FRACTION="1"
    )
    codes = {each: shell.run(*each.split()).code for each in COMMANDS}
    assert codes == dict.fromkeys(COMMANDS, 0)
    site.project.delete(leaver)
    assert shell.run("--once").code == 0
    query(site, name, "update {} set deleted_at = deleted_at - interval '9 days'")
    ended = [shell.run(*each) for each in (PURGE, ["sync-user", site.project.ids()[0]])]
    assert [(each.code, each.stderr) for each in ended] == [(0, ""), (0, "")]
    assert {row[0] for row in query(site, name, "select id from {}")} == set(site.project.ids())
    assert site.rows(SCHEMAS) == [(each,) for each in sorted([name, "public", "users_sync_worker"])]


PURGE = ["purge", "--older-than", "8d"]


def query(site: Site, schema: str, text: LiteralString) -> list[tuple[Any, ...]]:
    table = sql.Identifier(schema, "users_sync")
    with psycopg.connect(site.database_url) as conn:
        cursor = conn.execute(sql.SQL(text).format(table))
        return cursor.fetchall() if cursor.description else []


SCHEMAS = r"""
select nspname from pg_namespace
where nspname not like 'pg\_%' and nspname <> 'information_schema'
order by nspname collate "C"
"""


@pytest.mark.fault(
    "no file may be written: not a byte, nowhere",
    held="the worker sweeps, serves its endpoints and logs to its pipe",
)
@pytest.mark.skipif(os.name != "posix", reason="there is no `ulimit`")
def test_worker_writes_no_file(site: Site, tmp_path: Path) -> None:
    site.project.populate(3)
    folders = [tmp_path / name for name in ("here", "home", "tmp")]
    for folder in folders:
        folder.mkdir()
        folder.chmod(0o500)  # for whoever is not root
    places = {"HOME": str(folders[1]), "TMPDIR": str(folders[2]), "PYTHONDONTWRITEBYTECODE": "1"}
    limited = ["sh", "-c", 'ulimit -f 0 && exec "$@"', "sh", *command("run")]
    port = str(free_port())
    with subprocess.Popen(
        limited,
        env=site.shell.having(USERS_SYNC_HTTP__PORT=port).environ() | places,
        cwd=folders[0],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as worker:
        try:
            until("it swept", lambda: trouble("127.0.0.1", int(port)) is None and has_swept(site))
        finally:
            worker.terminate()
        stdout, stderr = worker.communicate()
    assert (worker.returncode, stderr) == (0, b"")
    assert b"sweep.finished" in stdout
    assert [list(folder.iterdir()) for folder in folders] == [[], [], []]


def has_swept(site: Site) -> bool:
    with suppress(psycopg.errors.UndefinedTable):
        return bool(site.rows(SWEPT))
    return False


SWEPT = "select from users_sync_worker.sweep where outcome = 'complete'"
