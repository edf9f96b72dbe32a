"""The long-running worker as a user starts it: stopped and killed in the middle of its work."""

import signal
import time
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psycopg
import pytest

from tests.support.ports import free_port
from tests.support.processes import Running, Shell, Site, kept_waiting, opened_site
from tests.support.waiting import until
from worker.cli.healthcheck import trouble

LEASE_SECONDS = 3
LIVE = "select id from neon_auth.users_sync where deleted_at is null"
HOLDER = "select holder from users_sync_worker.lease"
SEAL = "select seal from users_sync_worker.snapshot"
NAME = "select name from neon_auth.users_sync where id = '{}'"
SLOW_SAVING = """
create function slow() returns trigger language plpgsql as $$
begin
    perform pg_sleep(1);
    return new;
end
$$;
create trigger slow before update on users_sync_worker.snapshot
for each row execute function slow()
"""
SLEEPS = (
    "select 1 from pg_stat_activity where datname = current_database() and wait_event = 'PgSleep'"
)
SWEEPS = "select outcome from users_sync_worker.sweep order by number"


@pytest.fixture
def site(database_url: str, tmp_path: Path) -> Iterator[Site]:
    with opened_site(database_url, tmp_path) as site:
        yield site


@pytest.fixture
def shell(site: Site) -> Shell:
    return site.shell.having(
        USERS_SYNC_DATABASE__LEASE_SECONDS=str(LEASE_SECONDS),
        USERS_SYNC_STACK__PAGE_SIZE="10",
        USERS_SYNC_SCHEDULE__POLL_PAGE_SIZE="5",
    )


def live(site: Site) -> set[str]:
    with suppress(psycopg.errors.UndefinedTable, psycopg.errors.InvalidSchemaName):
        return {row[0] for row in site.rows(LIVE)}
    return set()


def logged(running: Running, event: str) -> bool:
    return f'"{event}"' in running.stdout.read_text("utf-8")


def test_sigterm_in_the_middle_of_a_sweep_exits_0_and_the_next_start_resumes(
    site: Site, shell: Shell
) -> None:
    site.project.populate(100)
    with kept_waiting(site.api, page=6):
        worker = shell.start()
        # A poll comes between, at most one while the pages are quick.
        until("some pages are applied", lambda: len(live(site)) >= 28)
        began = time.monotonic()
        worker.signal(signal.SIGTERM)
        ended = worker.end()
        assert (ended.code, ended.stderr) == (0, "")
        assert time.monotonic() - began < 5
    assert site.rows(SWEEPS) == [("stopped",)]
    before = len(site.pages_asked())
    worker = shell.start("run")
    until("everybody is there", lambda: live(site) == set(site.project.ids()))
    until("the sweep is complete", lambda: logged(worker, "sweep.finished"))
    worker.signal(signal.SIGINT)
    assert worker.end().code == 0
    walked = [r for r in site.pages_asked()[before:] if r.query["desc"] == "false"]
    assert walked[0].query.get("cursor") is not None
    assert ("complete",) in site.rows(SWEEPS)


def test_run_that_is_killed_while_it_saves_leaves_the_snapshot_of_before(
    site: Site, shell: Shell
) -> None:
    site.project.populate(30)
    assert shell.run("--once").code == 0
    before, changed = site.rows(SEAL), site.project.ids()[5]
    site.project.edit(changed, display_name="Changed")
    with psycopg.connect(site.database_url, autocommit=True) as conn:
        psycopg.Cursor(conn).execute(SLOW_SAVING)
        killed = shell.start("--once")
        until("it saves", lambda: conn.execute(SLEEPS).fetchone() is not None)
        killed.signal(signal.SIGKILL)
        killed.end()
        until("its session is over", lambda: conn.execute(SLEEPS).fetchone() is None)
        conn.execute("drop trigger slow on users_sync_worker.snapshot")
    assert site.rows(SEAL) == before
    ended = shell.run("--once")
    assert ended.code == 0
    assert "snapshot.loaded" in ended.stdout
    assert site.rows(NAME.format(changed)) == [("Changed",)]


@pytest.mark.parametrize("zone", ["GMT-3", "EST5EDT,M3.2.0,M11.1.0", '"UTC"', "No/Where"])
def test_no_time_zone_of_the_machine_keeps_the_worker_from_its_work(
    site: Site, shell: Shell, zone: str
) -> None:
    site.project.populate(3)
    worker = shell.having(TZ=zone).start()
    until("everybody is there", lambda: live(site) == set(site.project.ids()))
    worker.signal(signal.SIGTERM)
    ended = worker.end()
    assert (ended.code, ended.stderr) == (0, "")


def test_standby_writes_soon_after_the_holder_was_killed(site: Site, shell: Shell) -> None:
    site.project.populate(30)
    holder = shell.start()
    until("the holder is at work", lambda: live(site) == set(site.project.ids()))
    port = str(free_port())
    standby = shell.having(USERS_SYNC_HTTP__PORT=port).start()
    until("the other stands by", lambda: logged(standby, "worker.entered"))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz") as ready:
        assert ready.read() == b"ready\n"
    assert trouble("127.0.0.1", int(port)) is None
    holder.signal(signal.SIGKILL)
    killed = time.monotonic()
    created = site.project.create()
    until("the new user has a row", lambda: created in live(site))
    assert time.monotonic() - killed < LEASE_SECONDS + 2
    assert live(site) == set(site.project.ids())
    standby.signal(signal.SIGTERM)
    assert standby.end().code == 0


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
def test_hangup_and_quit_stop_as_sigterm_does(
    site: Site, shell: Shell, number: signal.Signals
) -> None:
    site.project.populate(5)
    worker = shell.start()
    until("everybody is there", lambda: live(site) == set(site.project.ids()))
    worker.signal(number)
    ended = worker.end()
    assert (ended.code, ended.stderr) == (0, "")
    assert site.rows(HOLDER) == [(None,)]


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
def test_signals_without_a_meaning_are_ignored(
    site: Site, shell: Shell, number: signal.Signals
) -> None:
    worker = shell.start()
    until("it is at work", lambda: logged(worker, "sweep.finished"))
    worker.signal(number)
    created = site.project.create()
    until("the new user has a row", lambda: created in live(site))
    worker.signal(signal.SIGTERM)
    assert worker.end().code == 0
