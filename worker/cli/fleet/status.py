"""The command `fleet status`."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from worker.cli import output
from worker.cli.context import read_settings
from worker.cli.fleet.context import opened_control
from worker.cli.options import DONE, UNHEALTHY, AsJson, Config, LogFormat, LogLevel
from worker.fleet.control import SILENCE_SECONDS, as_json
from worker.fleet.lookup import required

# A terminal shows no more at once; JSON has all.
SHOWN = 40
# What `users-sync status` calls unhealthy, beside records in quarantine. The first visit of a new
# project is to come, and a paused one is left alone.
UNWELL = {"needs a person", "failing", "held", "late"}
NO_WORKER = "No worker is at work: users-sync fleet work"
NEVER = "never yet"
HEADER = ("name", "state", "fresh", "swept", "users", "visited by", "what is wrong")


def status(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Show this project alone.")
    ] = None,
    *,
    as_objects: AsJson = False,
    config: Config = None,
    log_format: LogFormat = None,
    log_level: LogLevel = None,
) -> int:
    """Show how fresh each project is, and what is wrong; exit with 8 if any is not healthy."""
    settings = read_settings(config, log_format, log_level)
    with opened_control(settings) as control:
        if name is not None:
            required(control, name)
        rows, workers = control.status(name), control.workers(SILENCE_SECONDS)
    if as_objects:
        for row in rows:
            print(as_json(row))
    elif name is not None:
        print("\n".join(facts(rows[0])))
    else:
        print("\n".join(table(rows, workers)))
    return DONE if all(map(_is_healthy, rows)) else UNHEALTHY


def _is_healthy(row: Mapping[str, Any]) -> bool:
    in_quarantine = row["enabled"] and row["quarantined"] > 0
    return row["state"] not in UNWELL and not in_quarantine


def table(rows: Sequence[Mapping[str, Any]], workers: int) -> list[str]:
    """Lay out the worst projects, count all of them by state, and count the workers."""
    if not rows:
        return ["The fleet has no projects."]
    counts = Counter(row["state"] for row in rows)
    summary = ", ".join(f"{count:,} {state}" for state, count in counts.items())
    cycles = {row["api_host"]: row["cycle_seconds"] for row in rows}
    lines = [output.as_psql(HEADER, [_cells(row) for row in rows[:SHOWN]])]
    if len(rows) > SHOWN:
        lines.append(f"… and {len(rows) - SHOWN:,} that are better off")
    hosts = [f"{host}: each project every {_every(cycle)}" for host, cycle in cycles.items()]
    at_work = f"{_count(workers, 'worker')} at work" if workers else NO_WORKER
    return [*lines, "", *hosts, f"{_count(len(rows), 'project')}: {summary}", at_work]


def facts(row: Mapping[str, Any]) -> list[str]:
    """Say all that is known of one project, a line each."""
    fresh, swept = row["fresh_seconds"], row["swept_seconds"]
    told = {
        "project": row["name"],
        "state": row["state"],
        "fresh": NEVER if fresh is None else output.sign_ups(_ago(fresh), row["quarantined"]),
        "swept": NEVER if swept is None else f"the whole list was read {_ago(swept)}",
        "budget": f"{row['api_host']} allows a visit every {_every(row['cycle_seconds'])}",
        "users": "unknown" if row["users"] is None else f"{row['users']:,}",
        "deletions": f"{row['held']:,} held, {row['candidates']:,} candidates",
        "quarantine": f"{row['quarantined']:,}",
        "visited by": row["visitor"] or "no worker at this moment",
        "failures": f"{row['failures']:,}",
        "last error": row["error"],
        "to do": row["waits_for_a_person"],
    }
    return [f"{name:<11} {text}" for name, text in told.items() if text is not None]


def _cells(row: Mapping[str, Any]) -> Sequence[object]:
    return (
        row["name"],
        row["state"],
        _ago(row["fresh_seconds"]),
        _ago(row["swept_seconds"]),
        row["users"],
        row["visitor"],
        row["waits_for_a_person"] or row["error"],
    )


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"


def _every(cycle_seconds: float) -> str:
    return f"{max(1.0, cycle_seconds):.1f} s"


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:,.1f} s ago"
