"""The dead man's ping of `--once`: after a complete sweep, after no other, and at no cost."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.faulty_server import serving
from tests.support.processes import PATIENCE_SECONDS, Ended, Site, opened_site
from tests.support.receiver import Receiver, receiving
from worker.sandbox.api import server_error
from worker.service.ping import LONGEST_SECONDS

# Whoever knows this can call it.
PATH = "/ping/8c6f2a4e-hush-hush?source=hush"
# Nobody listens there.
NOWHERE = "http://me:hush@127.0.0.1:1"


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    with opened_site(database_url, tmp_path) as site:
        yield site


@pytest.fixture
def monitor() -> Iterator[Receiver]:
    with receiving() as receiver:
        yield receiver


def once(site: Site, url: str, **variables: str) -> Ended:
    return site.shell.having(USERS_SYNC_ONCE__PING_URL=url, **variables).run("--once")


def test_complete_sweep_is_told_once_by_get(site: Site, monitor: Receiver) -> None:
    site.project.populate(3)
    ended = once(site, monitor.url + PATH, USERS_SYNC_LOG__LEVEL="debug")
    assert (ended.code, ended.stderr) == (0, "")
    assert monitor.paths() == [f"GET {PATH}"]
    assert monitor.requests[0].headers["user-agent"].startswith("users-sync/")
    assert ended.event("ping.sent")["host"] == "127.0.0.1"
    assert "hush" not in ended.stdout


def test_empty_project_is_a_complete_sweep(site: Site, monitor: Receiver) -> None:
    assert once(site, monitor.url).code == 0
    assert monitor.paths() == ["GET /"]


def test_without_the_setting_nothing_is_called(site: Site) -> None:
    ended = site.shell.run("--once")
    assert (ended.code, "ping" in ended.stdout) == (0, False)


def test_sweep_that_is_not_complete_is_not_told(site: Site, monitor: Receiver) -> None:
    site.project.populate(3)
    site.api.on_request(lambda _: server_error())
    ended = once(site, monitor.url, USERS_SYNC_STACK__RETRY_MINUTES="0")
    assert (ended.code, monitor.requests) == (3, [])


def test_held_deletions_are_not_told_for_a_person_must_come(site: Site, monitor: Receiver) -> None:
    everybody = site.project.populate(12)
    assert once(site, monitor.url).code == 0
    for user_id in everybody:
        site.project.delete(user_id)
    assert once(site, monitor.url).code == 6
    assert len(monitor.requests) == 1


@pytest.mark.parametrize("status", [301, 404, 500])
def test_refused_ping_is_a_warning(site: Site, monitor: Receiver, status: int) -> None:
    monitor.status = status
    ended = once(site, monitor.url + PATH)
    assert (ended.code, ended.stderr) == (0, "")
    failed = ended.event("ping.failed")
    assert (failed["level"], failed["host"]) == ("warning", "127.0.0.1")
    assert failed["error"] == f"answered with status {status}"
    assert "hush" not in ended.stdout


def test_monitor_that_is_gone_is_a_warning(site: Site) -> None:
    ended = once(site, NOWHERE + PATH, USERS_SYNC_LOG__LEVEL="debug")
    assert (ended.code, ended.stderr) == (0, "")
    assert "could not be reached" in ended.event("ping.failed")["error"]
    assert "hush" not in ended.stdout


def test_broken_proxy_is_a_warning(site: Site) -> None:
    ended = once(site, "http://monitor.example/ping", HTTP_PROXY="socks5://me:hush@proxy:1")
    assert (ended.code, ended.stderr) == (0, "")
    assert "correct HTTP_PROXY" in ended.event("ping.failed")["error"]
    assert "hush" not in ended.stdout


def test_monitor_that_never_answers_is_given_up_soon(site: Site) -> None:
    with serving(lambda _, server: server.over.wait(PATIENCE_SECONDS)) as server:
        ended = once(site, server.url)
    assert ended.code == 0
    assert ended.event("ping.failed")["error"] == f"no answer within {LONGEST_SECONDS:g} s"


@pytest.mark.parametrize(
    "url",
    [
        "hush",
        "ftp://hush/hush",
        "https://",
        "https://hush:hush/",
        "https://[hush",
        "http://a/hu sh",
    ],
)
def test_address_that_cannot_be_called_is_told_at_the_start(site: Site, url: str) -> None:
    ended = once(site, url)
    assert (ended.code, ended.stdout, site.api.requests) == (2, "", [])
    assert ended.stderr == (
        "users-sync: once.ping_url (from the variable USERS_SYNC_ONCE__PING_URL): should be an"
        " address such as https://monitor.example/ping\n"
    )
