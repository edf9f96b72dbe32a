"""Processes that meet, are paused and are killed: what one leaves behind, another goes on from."""

import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.support.processes import Running, Shell, Site, kept_waiting, opened_site
from tests.support.waiting import until

ROWS = "select xmin::text, * from neon_auth.users_sync order by id"
LEASE = "select xmin::text, * from users_sync_worker.lease"
SWEEPS = "select xmin::text, number, outcome, users from users_sync_worker.sweep order by number"
CHECKPOINT = "select sweep, last_id from users_sync_worker.checkpoint"


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    """Return a site with 45 users, ten a page, and a lease that soon runs out."""
    with opened_site(database_url, tmp_path) as site:
        site.project.populate(45)
        yield site


@pytest.fixture
def shell(site: Site) -> Shell:
    return site.shell.having(
        USERS_SYNC_STACK__PAGE_SIZE="10", USERS_SYNC_DATABASE__LEASE_SECONDS="3"
    )


def found(site: Site, query: str) -> list[tuple[Any, ...]]:
    """Return rows; none where the first process has not created the table yet."""
    with suppress(psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return site.rows(query)
    return []


def started_and_kept_on_fourth_page(site: Site, shell: Shell) -> Running:
    """Start a sweep; return when three pages are applied and the fourth is awaited."""
    running = shell.start("--once")
    third = site.project.ids()[27]
    until("three pages are applied", lambda: found(site, CHECKPOINT) == [(1, third)])
    until("the fourth page is asked for", lambda: len(site.pages_asked()) == 4)
    return running


def test_second_of_two_ends_as_soon_as_the_first_is_seen_alive(site: Site, shell: Shell) -> None:
    """The first does nothing but wait for the API, and renews its lease all the while."""
    with kept_waiting(site.api, page=1) as go_on:
        racing = [shell.start("--once"), shell.start("--once")]
        until("one has ended", lambda: not all(r.process.is_alive() for r in racing))
        [winner] = [running for running in racing if running.process.is_alive()]
        racing.remove(winner)
        second = racing[0].end()
        go_on.set()
        first = winner.end()
    assert second.code == 5
    assert second.stderr.startswith("users-sync: another worker is at work on neon_auth (")
    assert (first.code, first.stderr) == (0, "")
    assert first.event("sweep.finished")["inserted"] == 45
    assert len(site.pages_asked()) == 5


def test_paused_worker_writes_nothing_once_it_was_replaced(site: Site, shell: Shell) -> None:
    with kept_waiting(site.api, page=4) as go_on:
        paused = started_and_kept_on_fourth_page(site, shell)
        paused.signal(signal.SIGSTOP)
        site.api.on_request(None)
        # A page that the paused one might still bring would change these rows.
        for user_id in site.project.ids()[30:]:
            site.project.edit(user_id, display_name="Changed")
        replacement = shell.run("--once")
        assert (replacement.code, replacement.stderr) == (0, "")
        assert replacement.event("sweep.finished")["users"] == 45

        before = [site.rows(query) for query in (ROWS, LEASE, SWEEPS, CHECKPOINT)]
        assert len(before[0]) == 45
        go_on.set()
        paused.signal(signal.SIGCONT)
        ended = paused.end()
    assert ended.code == 5
    assert ended.stderr == "users-sync: another worker took the lease on neon_auth\n"
    assert ended.event("sweep.finished")["outcome"] == "failed"
    assert [site.rows(query) for query in (ROWS, LEASE, SWEEPS, CHECKPOINT)] == before


def test_killed_worker_is_followed_where_it_was(site: Site, shell: Shell) -> None:
    """The next start waits until the lease of the dead one has run out, and repeats nothing."""
    with kept_waiting(site.api, page=4):
        killed = started_and_kept_on_fourth_page(site, shell)
        killed.signal(signal.SIGKILL)
        assert killed.end().code == -signal.SIGKILL
    early = site.rows(ROWS)
    asked = len(site.pages_asked())
    ended = shell.run("--once")
    assert (ended.code, ended.stderr) == (0, "")
    assert 0 < ended.event("lease.awaited")["seconds"] <= 3
    assert ended.event("sweep.started").items() >= {"sweep": 1, "resumed": True}.items()
    assert ended.event("sweep.finished").items() >= {"outcome": "complete", "users": 45}.items()
    pages = site.pages_asked()[asked:]
    ids = site.project.ids()
    assert [page.query["cursor"] for page in pages] == [ids[26], ids[35]]
    assert [row for row in site.rows(ROWS) if row in early] == early
    assert [row[1:] for row in site.rows(SWEEPS)] == [(1, "complete", 45)]


def test_whole_sweeps_work_through_pgbouncer(site: Site, shell: Shell, pgbouncer_url: str) -> None:
    pooled = shell.having(DATABASE_URL=pgbouncer_url)
    ids = site.project.ids()
    first = pooled.run("--once")
    site.project.delete(ids[0])
    site.project.edit(ids[1], display_name="Changed")
    second = pooled.run("--once")
    for ended, counts in ((first, {"inserted": 45}), (second, {"updated": 1, "deleted": 1})):
        assert (ended.code, ended.stderr) == (0, "")
        assert ended.event("sweep.finished").items() >= counts.items()
