"""Six minutes in the life of a project, with trouble at known moments: for a picture of panels."""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import httpx
import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from tests.bench.postgres import Databases
from tests.support.processes import Site
from worker.sandbox.api import Reply, Request, server_error

SECONDS = 360

# More than a fifth of all users: too many to be deleted without a person.
LEAVING = 800
REFUSED = 7
PAUSE_SECONDS, SLOW_SECONDS = 0.02, 0.6

# How often something happens that is rarer.
SOMETIMES_SECONDS = 30

REFRESH = "select users_sync_worker.refresh(%s)"
REFUSE = "alter table neon_auth.users_sync add constraint known check (email !~ '@example.net$')"
TAKE = "alter table neon_auth.users_sync drop constraint known"
LET_IN = sql.SQL("alter database {} allow_connections {}")
END_SESSIONS = "select pg_terminate_backend(pid) from pg_stat_activity where datname = %s"


@dataclass
class Day:
    """A project that lives, and what can go wrong around it."""

    site: Site
    databases: Databases
    webhooks_port: int
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    pause_seconds: float = PAUSE_SECONDS
    api_is_away: bool = False
    database_is_away: bool = False

    def answer(self, _: Request) -> Reply | None:
        time.sleep(self.pause_seconds)
        return server_error() if self.api_is_away else None

    def second(self) -> None:
        """Let users sign up and change; for one of them the application leaves a hint."""
        self.site.project.create(display_name="New", primary_email="new@example.com")
        edited = self.chance.sample(self.site.project.ids(), 3)
        for user_id in edited:
            self.site.project.edit(user_id, display_name=f"Edited {self.chance.random()}")
        if not self.database_is_away:
            with psycopg.connect(self.site.database_url, autocommit=True) as conn:
                conn.execute(REFRESH, (edited[0],))

    def send_webhook(self) -> None:
        """Send what is no webhook of Stack Auth, for it is not signed."""
        url = f"http://127.0.0.1:{self.webhooks_port}/webhooks/stack-auth"
        httpx.post(url, content=b"{}", trust_env=False)

    def let_one_leave(self) -> None:
        """Let somebody go who came seconds ago: too young a row to be marked deleted at once."""
        self.site.project.delete(self.site.project.ids()[-5])

    def slow_down(self) -> None:
        self.pause_seconds = SLOW_SECONDS

    def speed_up(self) -> None:
        self.pause_seconds = PAUSE_SECONDS

    def lose_api(self) -> None:
        self.api_is_away = True

    def find_api(self) -> None:
        self.api_is_away = False

    def lose_database(self) -> None:
        self.database_is_away = True
        self._let_in("false")

    def find_database(self) -> None:
        self._let_in("true")
        self.database_is_away = False

    def _let_in(self, allowed: str) -> None:
        name = str(conninfo_to_dict(self.site.database_url)["dbname"])
        with psycopg.connect(self.databases.url, autocommit=True) as conn:
            conn.execute(LET_IN.format(sql.Identifier(name), sql.SQL(allowed)))
            conn.execute(END_SESSIONS, (name,))

    def refuse_some(self) -> None:
        self.site.execute(REFUSE)
        for number in range(REFUSED):
            self.site.project.create(primary_email=f"{number}@example.net")

    def take_all(self) -> None:
        self.site.execute(TAKE)
        self._run("quarantine", "retry")

    def let_many_leave(self) -> None:
        for user_id in self.chance.sample(self.site.project.ids(), LEAVING):
            self.site.project.delete(user_id)

    def approve(self) -> None:
        """Do as `users-sync deletions` says in its last word."""
        self._run("deletions", "approve", self._run("deletions").split()[-1])

    def _run(self, *arguments: str) -> str:
        ended = self.site.shell.run(*arguments)
        if ended.code:
            raise RuntimeError(f"users-sync {' '.join(arguments)}: {ended.stderr}")
        return ended.stdout


@dataclass(frozen=True)
class Trouble:
    """What goes wrong, from which second to which, and what of a day brings it about."""

    name: str
    begins: int
    ends: int
    begin: Callable[[Day], None]
    end: Callable[[Day], None]


def troubles() -> Sequence[Trouble]:
    return (
        Trouble("API slow", 50, 85, Day.slow_down, Day.speed_up),
        Trouble("API away", 115, 145, Day.lose_api, Day.find_api),
        Trouble("database away", 175, 205, Day.lose_database, Day.find_database),
        Trouble(f"{REFUSED} refused", 235, 270, Day.refuse_some, Day.take_all),
        Trouble(f"{LEAVING} left", 300, 335, Day.let_many_leave, Day.approve),
    )


def live(day: Day) -> None:
    """Live through all of it."""
    due = {each.begins: each.begin for each in troubles()}
    due |= {each.ends: each.end for each in troubles()}
    began = time.monotonic()
    for second in range(SECONDS):
        time.sleep(max(0.0, began + second - time.monotonic()))
        day.second()
        if second in due:
            due[second](day)
        if second % SOMETIMES_SECONDS == 0:
            day.send_webhook()
            day.let_one_leave()
