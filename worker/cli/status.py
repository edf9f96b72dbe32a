"""How the worker and its table are doing, read from the database alone."""

import json
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Annotated, Any

import typer

from worker.cli import output
from worker.cli.context import initialised, opened, read_settings
from worker.cli.options import DONE, UNHEALTHY, AsJson, Config, LogFormat, LogLevel, seconds_of
from worker.errors import Misconfigured
from worker.store.connection import LONGEST_SECONDS, Connection
from worker.store.sweeps import COUNTS
from worker.store.transaction import long_transaction

LAST_SWEEPS = 5

_FACTS = (
    "target",
    "project",
    "holder",
    "at_work",
    "quiet",
    "held_since",
    "lease_until",
    "sweeping_since",
    "last_complete",
    "last_complete_age",
    "longest_age",
    "users_live",
    "users_deleted",
    "candidates",
    "held",
    "approved",
    "hidden",
    "quarantined",
    "healthy",
    "too_old",
    "other_reasons",
    "verdict",
    "failures",
    "failing_since",
    "last_error",
)

_DURATIONS = {"last_complete_age", "longest_age"}

_STATUS = f"""
select {", ".join(_FACTS)}, clock_timestamp() from users_sync_worker.status where target = %s
"""  # noqa: S608  names of columns

# The view says nothing of the rights to the table, which not every monitor has.
_MAY_READ = """
select has_schema_privilege(n.oid, 'usage') and has_table_privilege(c.oid, 'select')
from pg_class c join pg_namespace n on n.oid = c.relnamespace
where n.nspname = %s and c.relname = 'users_sync' and c.relkind in ('r', 'p')
"""

_MAY_SELECT = "select has_table_privilege(to_regclass(%s), 'select')"

_POLLED_AT = "select polled_at from users_sync_worker.lease where target = %s"

_HINTS = """
select count(*), extract(epoch from clock_timestamp() - min(asked_at))::float
from users_sync_worker.hint where target = %s
"""

_SWEEPS = f"""
select number, kind, started, finished, outcome, error, {", ".join(COUNTS)}
from users_sync_worker.sweep where target = %s order by number desc limit %s
"""  # noqa: S608


def status(
    *,
    as_objects: AsJson = False,
    max_age: Annotated[
        str | None,
        typer.Option(
            "--max-age",
            metavar="AGE",
            help="Fail if the last complete sweep is older than AGE, as in 2h.",
        ),
    ] = None,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Show freshness, recent sweeps and what needs attention; exit with 8 if not healthy."""
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


@dataclass(frozen=True, slots=True)
class Status:
    """The view `users_sync_worker.status` for one target, by column, and the last sweeps."""

    facts: dict[str, Any]
    sweeps: list[dict[str, Any]]
    now: datetime

    @property
    def healthy(self) -> bool:
        return bool(self.facts["healthy"])


def read_status(conn: Connection, target: str, longest_age: timedelta | None) -> Status:
    """Read how a target is doing; `longest_age` replaces what the worker's schedule allows.

    Raises Misconfigured if it was never synced.
    """
    with long_transaction(conn):
        row = conn.execute(_STATUS, (target,)).fetchone()
        found = conn.execute(_SWEEPS, (target, LAST_SWEEPS)).fetchall()
    if row is None:
        raise Misconfigured(
            f"{target}.users_sync was never synced: run `users-sync --once`, or see database.schema"
        )
    names = ("number", "kind", "started", "finished", "outcome", "error", *COUNTS)
    sweeps = [dict(zip(names, sweep, strict=True)) for sweep in found]
    facts = dict(zip(_FACTS, row, strict=False))  # the row ends with the moment
    facts["hints"], facts["oldest_hint_seconds"] = _hints(conn, target)
    facts["polled_at"] = _polled_at(conn, target)
    if conn.execute(_MAY_READ, (target,)).fetchone() == (False,):
        facts = _unreadable(facts)
    status = Status(facts, sweeps, row[-1])
    return status if longest_age is None else _judged(status, longest_age)


def _hints(conn: Connection, target: str) -> tuple[int | None, float | None]:
    """Count the hints that wait, and tell for how long the oldest does; None if it is not known.

    A monitor's role need not be able to read them.
    """
    if not _may_select(conn, "users_sync_worker.hint"):
        return None, None
    [(count, seconds)] = conn.execute(_HINTS, (target,)).fetchall()
    return count, seconds


def _polled_at(conn: Connection, target: str) -> datetime | None:
    """Give the last poll as of the last renewal of the lease; None if it is not known."""
    if not _may_select(conn, "users_sync_worker.lease"):
        return None
    polled_at: datetime | None = conn.execute(_POLLED_AT, (target,)).fetchall()[0][0]
    return polled_at


def _may_select(conn: Connection, table: str) -> bool:
    return conn.execute(_MAY_SELECT, (table,)).fetchone() == (True,)


def _unreadable(facts: dict[str, Any]) -> dict[str, Any]:
    """Say that our role may not read the table: nor may a worker with the same settings."""
    reason = f"this role may not read {facts['target']}.users_sync: users-sync check"
    others = [reason, *facts["other_reasons"]]
    verdict = "; ".join([facts["too_old"], *others] if facts["too_old"] else others)
    return {**facts, "other_reasons": others, "healthy": False, "verdict": verdict}


def _judged(status: Status, longest_age: timedelta) -> Status:
    """Judge the age by the limit that the user gave, as for sweeps from cron."""
    facts = status.facts
    age, too_old = facts["last_complete_age"], None
    if age is None:
        too_old = "no sweep was completed yet"
    elif age > longest_age:
        too_old = f"the last complete sweep ended {_whole(age)} ago (longer than {longest_age})"
    reasons = [reason for reason in (too_old, *facts["other_reasons"]) if reason]
    judged = {
        "longest_age": longest_age,
        "too_old": too_old,
        "healthy": not reasons,
        "verdict": "; ".join(reasons) or "healthy",
    }
    return replace(status, facts={**facts, **judged})


def as_json(status: Status) -> dict[str, Any]:
    """Give all of it in types that JSON has: moments as ISO 8601, durations in seconds."""
    sweeps = [{name: _plain(value) for name, value in sweep.items()} for sweep in status.sweeps]
    facts = {
        f"{name}_seconds" if name in _DURATIONS else name: _plain(value)
        for name, value in status.facts.items()
    }
    return {**facts, "sweeps": sweeps}


def lines(status: Status) -> list[str]:
    """Say in a few lines who works, how fresh the table is, and what waits for a person."""
    facts = status.facts
    told = {
        "target": f"{facts['target']}.users_sync, project {facts['project'] or 'not known yet'}",
        "worker": _worker(status),
        "last sweep": _freshness(facts),
    }
    if facts["polled_at"] is not None:
        # It comes with the lease's renewals, so it may lag by up to a third of lease_seconds.
        ago = f"{_whole(status.now - facts['polled_at'])} ago"
        told["sign-ups"] = output.sign_ups(ago, facts["quarantined"])
    if facts["failures"]:
        told["last error"] = _last_error(status)
    if facts["hints"]:
        seconds = facts["oldest_hint_seconds"]
        told["hints"] = f"{facts['hints']:,} wait, the oldest for {seconds:.0f} s"
    told["users"] = (
        "cannot be counted"
        if facts["users_live"] is None
        else f"{facts['users_live']:,} live, {facts['users_deleted']:,} deleted"
    )
    told["deletions"] = ", ".join(
        f"{facts[name]:,} {name}" for name in ("held", "approved", "candidates", "hidden")
    )
    told["quarantine"] = f"{facts['quarantined']:,}"
    return [f"{name:<11} {text}" for name, text in told.items()]


def sweep_rows(status: Status) -> tuple[list[str], list[list[object]]]:
    """Give header and rows of the last sweeps, without the counts that are zero in all of them."""
    counts = [name for name in COUNTS if any(sweep[name] for sweep in status.sweeps)]
    header = ["sweep", "kind", "outcome", "started", "seconds", *counts]
    return header, [
        [
            sweep["number"],
            sweep["kind"],
            sweep["outcome"] or "at work",
            f"{sweep['started']:%Y-%m-%d %H:%M:%S}",
            _seconds(sweep),
            *(sweep[name] for name in counts),
        ]
        for sweep in status.sweeps
    ]


def _worker(status: Status) -> str:
    facts = status.facts
    if facts["at_work"]:
        since = _whole(status.now - facts["held_since"]) if facts["held_since"] else "?"
        return f"{facts['holder']} at work, lease held for {since}"
    return "rests until there is something to write (quiet)" if facts["quiet"] else "none at work"


def _freshness(facts: dict[str, Any]) -> str:
    if facts["last_complete_age"] is None:
        return "none was completed yet"
    limit = f" (limit {_whole(facts['longest_age'])})" if facts["longest_age"] else ""
    return f"completed {_whole(facts['last_complete_age'])} ago{limit}"


def _last_error(status: Status) -> str:
    """Say what keeps sweeps from their end since the last complete one."""
    facts = status.facts
    since = _whole(status.now - facts["failing_since"])
    times = "once" if facts["failures"] == 1 else f"{facts['failures']:,} times"
    return f"{facts['last_error']} (failed {times}, first {since} ago)"


def _seconds(sweep: dict[str, Any]) -> str:
    if sweep["finished"] is None:
        return ""
    return f"{(sweep['finished'] - sweep['started']).total_seconds():.1f}"


def _whole(age: timedelta) -> timedelta:
    """Leave out the fraction of a second."""
    return timedelta(seconds=int(age.total_seconds()))


def _plain(value: Any) -> Any:
    if isinstance(value, timedelta):
        return value.total_seconds()
    return value.isoformat() if isinstance(value, datetime) else value
