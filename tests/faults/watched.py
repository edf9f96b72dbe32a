"""A site under a fault: whom the table ever marked deleted, and whether it equals the project."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from threading import Event, Timer
from typing import Any

import psycopg

from tests.support.processes import Running, Shell, Site, opened_site
from tests.support.sweep_world import IGNORED, nothing, row_of, settings
from tests.support.waiting import until
from worker.sandbox.api import FakeStackApi, Project, Reply, Request
from worker.service.once import sweep_once
from worker.store.migrate import creation_sql

# Remembers whoever is marked deleted, were it for a moment between two looks at the table.
WITNESS = """
create table public.buried (id text);
create function public.witness() returns trigger language plpgsql security definer as
$$ begin insert into public.buried values (new.id); return null; end $$;
create trigger witness after insert or update on neon_auth.users_sync
for each row when (new.deleted_at is not null) execute function public.witness();
"""
ROWS = f"""
select id::text, raw_json - '{IGNORED}', name, email,
       (extract(epoch from created_at) * 1000)::bigint
from neon_auth.users_sync where deleted_at is null
"""  # noqa: S608
CHECKPOINT = "select last_millis, last_id from users_sync_worker.checkpoint"
OUTCOMES = "select kind, outcome from users_sync_worker.sweep order by number"
RUN_OUT = "update users_sync_worker.lease set expires_at = clock_timestamp()"

# The shortest lease there is, and small pages: many requests and transactions for few users.
BRISK = {
    "USERS_SYNC_STACK__PAGE_SIZE": "20",
    "USERS_SYNC_STACK__TIMEOUT_SECONDS": "3",
    "USERS_SYNC_DATABASE__LEASE_SECONDS": "3",
    "USERS_SYNC_DELETIONS__MAX_FRACTION": "1",
    "USERS_SYNC_SCHEDULE__POLL_SECONDS": "0.1",
    "USERS_SYNC_SCHEDULE__POLL_PAGE_SIZE": "5",
    "USERS_SYNC_SCHEDULE__SWEEP_SECONDS": "0.1",
    "USERS_SYNC_SCHEDULE__SWEEP_SHARE": "1",
}


@dataclass
class Watched:
    """One project and one table; `gone` are the users whom the test deleted from the project."""

    site: Site
    shell: Shell
    gone: set[str] = field(default_factory=set)

    @property
    def project(self) -> Project:
        return self.site.project

    @property
    def api(self) -> FakeStackApi:
        return self.site.api

    def rows(self) -> dict[str, tuple[Any, ...]]:
        """Give what the live rows hold, by id."""
        return {row[0]: row[1:] for row in self.site.rows(ROWS)}

    def wanted(self) -> dict[str, tuple[Any, ...]]:
        return {user_id: row_of(record) for user_id, record in self.project.users().items()}

    def delete(self, *ids: str) -> None:
        for user_id in ids:
            # First, or the worker could be quicker.
            self.gone.add(user_id)
            self.project.delete(user_id)

    def change(self, dice: Random, edits: int = 30, deletions: int = 5) -> None:
        """Edit some users, delete some others, and let somebody sign up."""
        chosen = dice.sample(self.project.ids(), edits + deletions)
        for user_id in chosen[:edits]:
            self.project.edit(user_id, display_name=f"Edited {dice.random()}")
        self.delete(*chosen[edits:])
        self.project.create(display_name="New")

    def buried(self) -> set[str]:
        """Give everybody who ever was marked deleted."""
        return {row[0] for row in self.site.rows("select id from public.buried")}

    def nobody_was_wronged(self) -> bool:
        return self.buried() <= self.gone

    def is_right(self) -> bool:
        """Whether the table equals the project, as far as there is a database."""
        with suppress(psycopg.OperationalError):
            return self.rows() == self.wanted()
        return False

    def catches_up(self) -> None:
        """Wait until the table equals the project, and see that nobody was wronged on the way."""
        until("the table equals the project", self.is_right)
        assert self.nobody_was_wronged()

    def as_far_as_the_checkpoint(self) -> dict[str, tuple[Any, ...]]:
        """Say what must be in the table already: everybody up to the checkpoint's key."""
        found = self.site.rows(CHECKPOINT)
        users = self.project.users().items()
        if not found:
            return {}
        [reached] = found
        return {u: row_of(r) for u, r in users if (r["signed_up_at_millis"], u) <= reached}

    def let_the_lease_run_out(self) -> None:
        """Let its time pass at once, for whoever was killed does not give it back."""
        self.site.execute(RUN_OUT)

    def sweep(self) -> None:
        """Sweep once in a process of its own."""
        ended = self.shell.run("--once")
        assert (ended.code, ended.stderr) == (0, "")

    def sweep_here(self) -> None:
        """Sweep once in this process, which is quicker, for what is not under test."""
        api_url = self.shell.variables["STACK_API_URL"]
        options = settings(self.project, api_url=api_url, page_size=1000)
        assert sweep_once(options, self.site.database_url, Event(), nothing).outcome == "complete"


@contextmanager
def watched(
    database_url: str, folder: Path, users_api: str = "today", **variables: str
) -> Iterator[Watched]:
    """Open a site whose table is there already, and under watch."""
    with opened_site(database_url, folder, users_api) as site:
        site.execute(creation_sql("neon_auth") + WITNESS)
        yield Watched(site, site.shell.having(**{**BRISK, **variables}))


def logged(running: Running, event: str, **named: Any) -> int:
    """Count the lines of this event, with these values."""
    # The last line may be half written.
    lines = running.stdout.read_text("utf-8").splitlines(keepends=True)
    wanted = {"event": event, **named}.items()
    return sum(wanted <= json.loads(line).items() for line in lines if line.endswith("\n"))


def stopped_cleanly(running: Running) -> None:
    """Ask a process to end; it does so soon, with nothing to complain of."""
    running.signal(signal.SIGTERM)
    ended = running.end()
    assert (ended.code, ended.stderr) == (0, "")
    assert not [line for line in ended.log if line["event"] in {"job.failed", "worker.failed"}]


@contextmanager
def at_request(
    api: FakeStackApi, number: int, seconds: float, act: Callable[[], None]
) -> Iterator[Event]:
    """Act so many seconds after the n-th request from now arrived; the event says that it was."""
    acted = Event()
    left = number
    timers: list[Timer] = []

    def run() -> None:
        act()
        acted.set()

    def count_down(_: Request) -> Reply | None:
        nonlocal left
        left -= 1
        if left == 0:
            timers.append(Timer(seconds, run))
            timers[0].start()
        return None

    api.on_request(count_down)
    try:
        yield acted
    finally:
        api.on_request(None)
        for timer in timers:
            timer.join()


def kill(running: Running) -> None:
    assert running.process.pid
    with suppress(ProcessLookupError):  # it was quicker, and has ended by itself
        os.kill(running.process.pid, signal.SIGKILL)
