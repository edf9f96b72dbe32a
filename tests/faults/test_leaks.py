"""Whatever goes wrong, no secret, email or name is told: not at any level, not by any library."""

import json
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.faults import canaries
from tests.faults.canaries import EMAIL, KEY, NAME, PROXY, given_away
from tests.support.faulty_server import send, serving
from tests.support.ports import free_port
from tests.support.processes import PATIENCE_SECONDS, Shell, Site, command, opened_site
from tests.support.sweep_world import raw_record
from tests.support.waiting import until
from worker.sandbox.api import server_error
from worker.store.migrate import creation_sql

ODD = "00000000-0000-4000-8000-000000000099"
# The API is to be asked through a proxy, which no loopback address is.
ELSEWHERE = "https://stack.invalid"
# What a person could look at first, and what cron runs.
COMMANDS = ["--once", "check", "plan", "status --json", "init", "deletions", "quarantine"]
# So many processes at once, and that part of all wrongs in one attempt.
ABREAST = 4
PARTS = 4

Variables = Mapping[str, str]


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    with opened_site(database_url, tmp_path) as site:
        site.project.secret_server_key = KEY
        yield site


@pytest.fixture
def shell(site: Site) -> Shell:
    return site.shell.having(
        STACK_SECRET_SERVER_KEY=KEY,
        USERS_SYNC_LOG__LEVEL="debug",
        USERS_SYNC_STACK__RETRY_MINUTES="0.004",
        USERS_SYNC_DATABASE__RETRY_MINUTES="0.004",
        USERS_SYNC_DELETIONS__MAX_COUNT="0",
    )


@contextmanager
def settings_of_disaster(folder: Path) -> Iterator[dict[str, Variables]]:
    """Give the variables of each thing that can be wrong outside."""
    wrong: dict[str, Variables] = {
        f"DATABASE_URL: {name}": {"DATABASE_URL": url} for name, url in canaries.DATABASES.items()
    }
    for name, address in canaries.PROXIES.items():
        wrong[f"proxy: {name}"] = {"HTTPS_PROXY": address, "STACK_API_URL": ELSEWHERE}
    for number, (name, text) in enumerate(canaries.CONFIGS.items()):
        config = folder / f"{number}.toml"
        config.write_text(text)
        wrong[f"config.toml: {name}"] = {"USERS_SYNC_CONFIG": str(config)}
    refused = b"HTTP/1.1 407 %b\r\ncontent-length: 0\r\n\r\n" % PROXY.encode()
    with ExitStack() as servers:
        for name, answer in canaries.ANSWERS.items():
            url = servers.enter_context(serving(answer)).url
            wrong[f"answer: {name}"] = {"STACK_API_URL": url}
        wrong["answer: no TLS"] = {"STACK_API_URL": url.replace("http:", "https:")}
        url = servers.enter_context(serving(send(refused))).url.replace("//", f"//me:{PROXY}@")
        wrong["proxy: refusing"] = {"HTTPS_PROXY": url, "STACK_API_URL": ELSEWHERE}
        yield wrong


@pytest.mark.fault(
    "DATABASE_URL, proxy, config.toml or the API's answers are wrong in every way we know",
    held="no command tells a secret, an email or a name, with all libraries at debug",
    quick=1,
    thorough=len(COMMANDS) * PARTS,
)
def test_what_is_wrong_outside_gives_nothing_away(
    shell: Shell, tmp_path: Path, attempt: int
) -> None:
    arguments = COMMANDS[attempt // PARTS].split()
    with settings_of_disaster(tmp_path) as wrong:
        names = list(wrong)[attempt % PARTS :: PARTS]
        for some in (names[at : at + ABREAST] for at in range(0, len(names), ABREAST)):
            begun = {name: shell.having(**wrong[name]).start(*arguments) for name in some}
            for name, process in begun.items():
                ended = process.end()
                told = ended.stdout + ended.stderr
                assert told, name
                assert (name, list(given_away(told))) == (name, [])


@pytest.mark.fault(
    "the database refuses users with their names and emails in all its words",
    held="neither log nor the worker's tables tell them, whatever the SQLSTATE",
    quick=3,
    thorough=len(canaries.REASONS),
)
def test_what_the_database_says_gives_nothing_away(site: Site, shell: Shell, attempt: int) -> None:
    reason = canaries.REASONS[attempt]
    site.execute(creation_sql("neon_auth"))
    site.execute(canaries.TRIGGER)
    settle_in(site, reason)
    for log_format in ("json", "console"):
        ended = shell.having(USERS_SYNC_LOG__FORMAT=log_format).run("--once")
        assert "sweep.finished" in ended.stdout
        assert list(given_away(ended.stdout + ended.stderr)) == []
    assert list(given_away(json.dumps(kept(site)))) == []


def settle_in(site: Site, reason: str) -> str:
    """Add somebody whom the database refuses, and somebody it takes; gives the latter's id."""
    person = {"display_name": NAME, "primary_email": EMAIL}
    site.project.create(**person, server_metadata={"errcode": reason})
    return site.project.create(**person)


def kept(site: Site) -> list[str]:
    """Give all that the worker writes for itself but the records in quarantine."""
    tables = ("checkpoint", "sweep", "deletion", "lease", "touched")
    queries = [f"select t::text from users_sync_worker.{name} t" for name in tables]  # noqa: S608
    queries.append("select record || user_id || digest || error from users_sync_worker.quarantine")
    return [row[0] for query in queries for row in site.rows(query)]


@pytest.mark.fault(
    "a worker at debug has every trouble at once: refused and odd records, held deletions, a 500",
    held="logs, endpoints, commands and the process list tell no secret, email or name",
)
def test_worker_in_trouble_gives_nothing_away(site: Site, shell: Shell, tmp_path: Path) -> None:
    site.execute(creation_sql("neon_auth"))
    site.execute(canaries.TRIGGER)
    stays = settle_in(site, "23505")
    leaver = site.project.create(display_name=NAME, primary_email=EMAIL)
    site.project.put_raw(ODD, 1, raw_record(ODD, "x", f',"primary_email":"{EMAIL}"'))
    port = free_port()
    busy = shell.having(USERS_SYNC_HTTP__PORT=str(port), USERS_SYNC_SCHEDULE__SWEEP_SECONDS="0.1")
    with running(busy, tmp_path) as (process, log):
        until("it swept", lambda: "sweep.finished" in log.read_text())
        site.api.fail_next(server_error())
        site.project.delete(leaver)
        until("a deletion is held", lambda: '"outcome": "held"' in log.read_text())
        seen = [httpx.get(f"http://127.0.0.1:{port}{path}", trust_env=False) for path in PATHS]
        told = [answer.text + str(answer.headers) for answer in seen]
        told += [Path(f"/proc/{process.pid}/{name}").read_text() for name in ("cmdline", "comm")]
        asked = ["check", "plan", "status --json", "deletions", "quarantine", f"sync-user {leaver}"]
        begun = [shell.start(*arguments.split()) for arguments in asked]
        told += [each.stdout + each.stderr for each in (one.end() for one in begun)]
    told.append(log.read_text())
    assert all(told)
    assert list(given_away("\n".join(told))) == []
    site.project.edit(stays, display_name=f"{NAME} II")
    assert list(given_away(shell.run("plan", "--values").stdout))  # so it would have been found


PATHS = ("/", "/metrics", "/readyz", "/healthz", "/none")


@contextmanager
def running(shell: Shell, folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """Start the worker as a user does, with a command line of its own; gives its log, too."""
    log = folder / "worker.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command("run"), env=shell.environ(), cwd=folder, stdout=output, stderr=output
        )
        try:
            yield process, log
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)
