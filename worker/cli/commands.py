"""The commands that a person reaches for, beside a worker that may be at work."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Annotated

import typer
from rich.console import Console

from worker.cli import output
from worker.cli.options import (
    DIFFERENT,
    DONE,
    UNHEALTHY,
    AsJson,
    Config,
    LogFormat,
    LogLevel,
    group_is_called_alone,
    initialised,
    opened,
    own_name,
    read_settings,
    started_database,
    stopped_by_signals,
)
from worker.cli.plan.output import PlanPrinter
from worker.cli.plan.plan import plan as find_changes
from worker.cli.purge import DAY_SECONDS, LEAST_SECONDS, Purge, Purged, seconds_of
from worker.cli.session import Session, UserResult, opened_session
from worker.cli.status import as_json, lines, read_status, sweep_rows
from worker.errors import Misconfigured
from worker.ids import is_user_id
from worker.settings.settings import Settings
from worker.store.connection import LONGEST_SECONDS
from worker.store.quarantine import Quarantine, QuarantineRow
from worker.store.suspects import Suspects

# The record could not be read, or the database does not take it.
UNREADABLE, REFUSED = 3, 4
# What a bigint holds.
MOST_SWEEPS = 2**63 - 1
_EXIT_CODES = {"unreadable": UNREADABLE, "refused": REFUSED}

deletions_app = typer.Typer(rich_markup_mode=None)
quarantine_app = typer.Typer(rich_markup_mode=None)


def plan(
    *,
    as_objects: AsJson = False,
    values: Annotated[
        bool,
        typer.Option("--values", help="Show old and new values, which are personal data."),
    ] = False,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", min=0, help="Show at most so many changes; all are counted."
        ),
    ] = None,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Tell what a sweep would change, user by user and field by field; writes nothing."""
    settings = read_settings(config, log_format, log_level, quietly=True)
    settings.require_stack()
    told = PlanPrinter(partial(print, flush=True), as_objects, values, limit)
    with stopped_by_signals() as signals, started_database(settings) as url:
        found = find_changes(settings, url, signals.stop, told.tell)
    told.end(found)
    return DIFFERENT if found.difference else DONE


def status(
    *,
    as_objects: AsJson = False,
    max_age: Annotated[
        str | None,
        typer.Option(
            "--max-age", metavar="AGE", help="How old the last complete sweep may be, as in 2h."
        ),
    ] = None,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Say how fresh the table is, who works on it, and what waits for a person."""
    settings = read_settings(config, log_format, log_level)
    target = settings.database.schema_name
    longest = timedelta(seconds=seconds_of(max_age, "--max-age")) if max_age else None
    with opened(settings) as database:
        found = database.call(
            initialised(lambda conn: read_status(conn, target, longest)), LONGEST_SECONDS
        )
    if as_objects:
        print(json.dumps(as_json(found)))
    else:
        print("\n".join(lines(found)))
        if found.sweeps:
            print(f"\n{output.as_psql(*sweep_rows(found))}\n")
        print(found.facts["verdict"])
    return DONE if found.healthy else UNHEALTHY


def sync_user(
    user_id: Annotated[str, typer.Argument(metavar="ID", help="The user's id.")],
    *,
    wait: Annotated[
        float,
        typer.Option(
            "--wait",
            metavar="SECONDS",
            min=0,
            max=DAY_SECONDS,
            help="Ask for so long until the user exists.",
        ),
    ] = 0,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Bring one user's row up to date now, beside a worker that may be at work."""
    settings = read_settings(config, log_format, log_level)
    wanted = user_id.strip().lower()
    if not is_user_id(wanted):
        raise Misconfigured(f"{user_id!r} is no user id: those are UUIDs")
    with _session(settings) as session:
        outcome = session.sync(wanted, session.await_user(wanted, wait))
    if outcome.became == "unknown":
        raise Misconfigured(f"neither the project nor the table knows the user {wanted}")
    print(_told(outcome, settings))
    return _EXIT_CODES.get(outcome.became, DONE)


@deletions_app.callback(invoke_without_command=True)
def deletions(
    context: typer.Context,
    *,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Show suspected, held, approved and hidden rows; `approve` lets held ones through."""
    if not group_is_called_alone(context, config, log_format, log_level):
        return DONE
    settings = read_settings(config, log_format, log_level)
    with opened(settings) as database:
        rows = database.call(initialised(Suspects(settings.database.schema_name).listed))
    if not rows:
        print("No user of the table is missing from the list.")
        return DONE
    print(output.as_psql(("user", "state", "first noticed", "last noticed"), rows))
    held = [first for _, state, first, _ in rows if state == "held"]
    if held:
        print(
            f"{len(held)} deletions are held. If these users did leave, let them through with\n"
            f"  {own_name()} deletions approve {max(held)}"
        )
    return DONE


@deletions_app.command()
def approve(
    sweep: Annotated[
        int,
        typer.Argument(
            metavar="SWEEP",
            min=1,
            max=MOST_SWEEPS,
            help="Covers what was first noticed up to this sweep.",
        ),
    ],
    *,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Let held deletions through; the next sweep asks for a fresh proof of each."""
    settings = read_settings(config, log_format, log_level)
    rows = Suspects(settings.database.schema_name)
    with opened(settings) as database:
        approved = database.call(initialised(lambda conn: rows.approve(conn, sweep)))
    if not approved:
        raise Misconfigured(
            f"nothing is held that was first noticed up to sweep {sweep};"
            " `users-sync deletions` shows what is held"
        )
    print(
        f"Approved {approved} deletions. The next sweep asks for each user again, and marks those"
        " deleted that are still gone."
    )
    return DONE


@quarantine_app.callback(invoke_without_command=True)
def quarantine(
    context: typer.Context,
    *,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Show which records could not be stored, and why; `retry` tries them again."""
    if not group_is_called_alone(context, config, log_format, log_level):
        return DONE
    settings = read_settings(config, log_format, log_level)
    with opened(settings) as database:
        kept = database.call(initialised(Quarantine(settings.database.schema_name).listed))
    if not kept:
        print("Nothing is in quarantine.")
        return DONE
    header = ("user", "error", "first seen", "last seen", "times")
    print(output.as_psql(header, [_row(each) for each in kept]))
    print(f"Once their cause is mended: {own_name()} quarantine retry")
    return DONE


@quarantine_app.command()
def retry(
    *, config: Config = None, log_format: LogFormat = None, log_level: LogLevel = None
) -> int:
    """Ask for these users again and try to store them; a line each."""
    settings = read_settings(config, log_format, log_level, quietly=True)
    with _session(settings) as session:
        for kept in session.database.call(session.quarantine.listed):
            if kept.user_id is None:
                print(f"{kept.record}: no user can be asked for; the next sweep looks at it again")
            else:
                print(_told(session.sync(kept.user_id), settings), flush=True)
        left = len(session.database.call(session.quarantine.listed))
    print(f"{left} left in quarantine." if left else "Nothing is in quarantine.")
    return DONE


def purge(
    *,
    older_than: Annotated[
        str,
        typer.Option("--older-than", metavar="AGE", help="How long ago they were deleted: 30d."),
    ],
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Count what would go; change nothing.")
    ] = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Remove rows soft-deleted long ago, so that ON DELETE acts on what refers to them."""
    settings = read_settings(config, log_format, log_level)
    seconds = seconds_of(older_than, "--older-than")
    if seconds < LEAST_SECONDS:
        raise Misconfigured(
            "--older-than: should be 1h or more, so that no late answer brings a purged user back"
        )
    with _session(settings) as session, output.asking(Console(stderr=True)) as on_asked:
        purged = Purge(session, seconds, dry_run, on_asked).run()
    for line in _told_of_purge(purged, dry_run=dry_run):
        print(line)
    return DONE


@contextmanager
def _session(settings: Settings) -> Iterator[Session]:
    settings.require_stack()
    with (
        stopped_by_signals() as signals,
        started_database(settings) as url,
        opened_session(settings, url, signals.stop) as session,
    ):
        yield session


def _told(outcome: UserResult, settings: Settings) -> str:
    grace = f"{settings.deletions.grace_seconds:g} s"
    texts = {
        "stale": f"left as it is: the row is newer than the API's answer; try again after {grace}",
        "deleted before": "the project does not know this user, whose row was deleted before",
        "waiting": f"gone, but the row is younger than {grace}: a later sweep deletes it",
        "unreadable": f"in quarantine: {outcome.error}",
        "refused": f"in quarantine: {outcome.error}",
        "unknown": "neither the project nor the table knows this user",
    }
    return f"{outcome.user_id}: {texts.get(outcome.became, outcome.became)}"


def _told_of_purge(purged: Purged, *, dry_run: bool) -> Iterator[str]:
    yield f"{'Would purge' if dry_run else 'Purged'} {_count(purged.users, 'user')}."
    if purged.known:
        yield f"Left {_count(purged.known, 'user')} whom the project has again."
    for user_id, reason in purged.kept:
        yield f"Left {user_id}: {reason}"
    effects = {
        "cascade": "would go",
        "set null": "would be nulled",
        "set default": "would get their default",
    }
    for reference, rows in purged.referring.items():
        yield f"  {reference}: {_count(rows, 'row')} {effects[reference.action]}"
    for reference in purged.uncounted:
        yield f"  {reference}: not counted, for this role may not read it"


def _row(kept: QuarantineRow) -> tuple[object, ...]:
    seen = [f"{moment:%Y-%m-%d %H:%M:%S}" for moment in (kept.first_seen, kept.last_seen)]
    return (kept.user_id or kept.record, kept.error, *seen, kept.times)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
