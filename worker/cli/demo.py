"""The whole thing on one machine: a Postgres, a fake Stack Auth API, and two sweeps."""

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Annotated

import psycopg
import typer
from psycopg import sql
from rich.console import Console

from worker.cli import output
from worker.cli.context import stopped_by_signals
from worker.cli.options import DONE, LogFormat, LogLevel, own_name
from worker.log.setup import configure_logging
from worker.sandbox.api import FakeStackApi, Project, serve
from worker.sandbox.postgres import EmbeddedPostgres
from worker.service.once import sweep_once
from worker.settings.settings import Settings, load_settings
from worker.sync.sweep import Report

FOLDER = Path(".users-sync")

_NAME = "users_sync_demo_%"
_OLD_DEMOS = """
select datname from pg_database d where datname like %s
  and not exists (select from pg_stat_activity a where a.datname = d.datname)
"""

_ROWS = """
select id, name, to_char(created_at, 'YYYY-MM-DD') as created_at,
       to_char(updated_at, 'HH24:MI:SS') as updated_at,
       to_char(deleted_at, 'HH24:MI:SS') as deleted_at
from (
    select *, row_number() over (
        partition by updated_at is null, deleted_at is null order by created_at desc, id) as nth
    from neon_auth.users_sync
) u
where nth <= 3
order by deleted_at is not null, updated_at is not null, created_at desc, id
"""


def demo(
    *,
    users: Annotated[
        int, typer.Option("--users", min=0, help="Number of users to begin with.")
    ] = 5000,
    keep: Annotated[
        bool, typer.Option("--keep", help="Keep API and database running until Ctrl-C.")
    ] = False,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Run a demo on this machine: a Postgres, a fake API, and two sweeps."""
    configure_logging(log_level or "error", log_format or "auto", sys.stderr)
    say = partial(print, flush=True)  # also down a pipe, where Python would keep the lines back
    with stopped_by_signals() as signals:
        Demo(users=users, keep=keep, command=own_name(), new_stop=signals.new_stop, say=say).run()
    return DONE


@dataclass(frozen=True, slots=True)
class Demo:
    """One demonstration; `command` is how the user started us, `say` prints a line.

    `new_stop` gives an event that a signal sets.
    """

    users: int
    keep: bool
    command: str
    new_stop: Callable[[], Event]
    say: Callable[[str], None]

    def run(self) -> None:
        """Show two sweeps; with `keep`, wait for a signal. Raises what a sweep raises."""
        project = Project()
        project.populate(self.users)
        with _database() as url, serve(FakeStackApi(project)) as api_url:
            settings = _settings(project, api_url, url)
            self.say(f"A Postgres and a fake Stack Auth API with {self.users:,} users are running.")
            first = self._sweep("First sweep: ", settings, url)
            signed_up, changed, deleted = _live_a_day(project)
            self.say(f"Now {signed_up} sign up, {changed} change and {deleted} are deleted.")
            second = self._sweep("Second sweep:", settings, url)
            self._show_rows(url)
            if (console := Console(stderr=True)).is_terminal:
                console.print(output.summary(first, second))
            if self.keep:
                self._wait(settings, url, api_url)
            else:
                self.say(
                    f"\nTo look further, with psql or other commands: {self.command} demo --keep"
                )

    def _sweep(self, name: str, settings: Settings, url: str) -> Report:
        with output.progress(Console(stderr=True)) as on_page:
            report = sweep_once(settings, url, self.new_stop(), on_page)
        self.say(f"{name} {output.sentence(report)}.")
        return report

    def _show_rows(self, url: str) -> None:
        with psycopg.connect(url) as conn:
            cursor = conn.execute(_ROWS)
            names = [column.name for column in cursor.description or ()]
            table = output.as_psql(names, cursor.fetchall())
            self.say(f"\nA few rows of neon_auth.users_sync, new, changed and deleted:\n{table}")

    def _wait(self, settings: Settings, url: str, api_url: str) -> None:
        with _config_file(settings) as path:
            self.say(
                f"\nDatabase: psql '{url}'\nAPI:      {api_url}/api/v1/users\n"
                f"Try:      {self.command} --once --config {path}\n"
                "Both run until Ctrl-C."
            )
            self.new_stop().wait()


@contextmanager
def _database() -> Iterator[str]:
    """Give a new database on the embedded server, dropped in the end."""
    with EmbeddedPostgres(FOLDER) as server, ExitStack() as ending:
        name = _NAME.replace("%", f"{random.getrandbits(32):08x}")
        with psycopg.connect(server.url(), autocommit=True) as conn:
            # Without a connection to it, another demo would take the new database for an old one.
            conn.execute("select pg_advisory_lock(hashtext('users_sync_demo'))")
            # What demos left behind that were killed.
            for (old,) in conn.execute(_OLD_DEMOS, (_NAME,)).fetchall():
                with suppress(psycopg.errors.ObjectInUse):
                    conn.execute(sql.SQL("drop database if exists {}").format(sql.Identifier(old)))
            url = server.create_database(name)
            ending.callback(server.drop_database, name)
            ending.enter_context(psycopg.connect(url))
        yield url


def _settings(project: Project, api_url: str, url: str) -> Settings:
    """Configure the sweeps; what the environment says of other projects is none of the demo's."""
    given = {
        "stack": {
            "api_url": api_url,
            "project_id": project.project_id,
            "secret_server_key": project.secret_server_key,
        },
        "database": {"url": url},
        "deletions": {"grace_seconds": 0},
    }
    return load_settings(config=None, overrides=given, environ={}, working_dir=FOLDER)


def _live_a_day(project: Project) -> tuple[int, int, int]:
    """Let some users sign up, change and leave; returns how many of each."""
    chance = random.Random(1)  # noqa: S311 - the same story each time
    ids = sorted(project.users())
    some = chance.sample(ids, min(len(ids) // 4, 32))
    leaving, changing = some[: len(some) // 4], some[len(some) // 4 :]
    for number in range(1, 13):
        project.create(display_name=f"New User {number}", primary_email=f"new{number}@example.com")
    for user_id in changing:
        project.edit(user_id, display_name="Changed User")
    for user_id in leaving:
        project.delete(user_id)
    return 12, len(changing), len(leaving)


@contextmanager
def _config_file(settings: Settings) -> Iterator[Path]:
    """Write the settings of the demo for other commands, while it lasts."""
    stack = settings.require_stack()
    text = f"""[stack]
api_url = "{stack.api_url}"
project_id = "{stack.project_id}"
secret_server_key = "{stack.secret_server_key.get_secret_value()}"

[database]
url = "{settings.require_database().get_secret_value()}"

[deletions]
grace_seconds = 0
"""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / "demo.toml"
    path.unlink(missing_ok=True)
    path.touch(mode=0o600)  # the database's URL may hold a password
    path.write_text(text)
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
