"""The status page of the fleet, as one worker knows it: the projects that are worst off first."""

import re
from collections.abc import Iterable, Mapping
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from worker import installed_version
from worker.fleet.control import Overview
from worker.fleet.telemetry import FleetTelemetry
from worker.service.status_page import TEMPLATE as OWN_PAGE
from worker.service.status_page import Tone, Verdict, span

TEMPLATE = Template(files("worker.fleet").joinpath("page.html").read_text("utf-8"))

# More would only make people scroll.
SHOWN_PROJECTS = 100

# Both pages look alike.
STYLE = "".join(re.findall(r"<style>.*?</style>", OWN_PAGE.template, re.DOTALL))

TONES: Mapping[str, Tone] = {
    "needs a person": "bad",
    "failing": "bad",
    "held": "warn",
    "late": "warn",
    "new": "idle",
    "standing by": "idle",
    "paused": "idle",
    "fresh": "ok",
}
HEAD = "".join(
    f'<th scope="col">{name}</th>'
    for name in ("Project", "State", "Fresh", "Swept", "Users", "What is wrong")
)


def render(seen: FleetTelemetry) -> str:
    """Return the page as HTML."""
    verdict = judge(seen)
    return TEMPLATE.substitute(
        tone=verdict.tone,
        style=STYLE,
        headline=escape(verdict.headline),
        lead=escape(verdict.lead),
        version=escape(installed_version()),
        worker=escape(seen.worker),
        facts="\n".join(_facts(seen)),
        shown=_shown(seen.overview),
        projects=_projects(seen.overview.worst[:SHOWN_PROJECTS]),
        age=span(seen.seconds_since_overview),
    )


def judge(seen: FleetTelemetry) -> Verdict:
    """Sum it all up; what this worker itself lacks comes first."""
    if seen.not_ready:
        return Verdict("bad", "Not at work", f"{'; '.join(seen.not_ready)}.")
    counts = seen.overview.counts
    unwell = {state: n for state, n in counts.items() if TONES[state] in {"bad", "warn"}}
    cycles = "; ".join(
        f"{host}: {projects:,} projects, each visited every {span(max(cycle, 1.0))}"
        for host, projects, cycle in seen.overview.hosts
    )
    if unwell:
        worst = next(tone for tone in ("bad", "warn") if tone in {TONES[each] for each in unwell})
        lead = ", ".join(f"{n:,} {state}" for state, n in unwell.items())
        return Verdict("bad" if worst == "bad" else "warn", "Some need a look", f"{lead}. {cycles}")
    return Verdict("ok", "All in step", cycles or "The fleet has no projects yet.")


def _facts(seen: FleetTelemetry) -> Iterable[str]:
    for state in TONES:
        yield _fact(state.capitalize(), f"{seen.overview.counts.get(state, 0):,}")
    yield _fact("Workers", f"{seen.workers:,}", "of the fleet")
    yield _fact("In memory", f"{seen.in_memory:,}", "projects of this worker")
    yield _fact("Mirrors", f"{seen.mirror_bytes / 1e6:,.0f} MB")
    for outcome, number in sorted(seen.ended.items()):
        yield _fact(f"Visits {outcome}", f"{number:,}", "by this worker")


def _fact(name: str, value: str, note: str = "") -> str:
    kind = "none" if value == "0" else ""
    small = f" <small>{escape(note)}</small>" if note else ""
    return f'<div><dt>{escape(name)}</dt><dd class="{kind}">{escape(value)}{small}</dd></div>'


def _shown(overview: Overview) -> str:
    """Say that there are more projects than the page shows."""
    shown = min(len(overview.worst), SHOWN_PROJECTS)
    all_of_them = sum(overview.counts.values())
    return f"{shown:,} of {all_of_them:,}" if shown < all_of_them else ""


def _projects(rows: Iterable[Mapping[str, Any]]) -> str:
    lines = [_row(row) for row in rows]
    if not lines:
        return '<p class="empty">There are none yet.</p>'
    return f"<table><thead><tr>{HEAD}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def _row(row: Mapping[str, Any]) -> str:
    users = "" if row["users"] is None else f"{row['users']:,}"
    cells = (
        ("", row["name"]),
        (f"toned {TONES[row['state']]}", row["state"]),
        ("soft", _ago(row["fresh_seconds"])),
        ("soft", _ago(row["swept_seconds"])),
        ("number", users),
        ("words changes", row["waits_for_a_person"] or row["error"] or ""),
    )
    tags = (f'<td class="{kind}">{escape(str(text))}</td>' for kind, text in cells)
    return f"<tr>{''.join(tags)}</tr>"


def _ago(seconds: float | None) -> str:
    return "never" if seconds is None else f"{span(seconds)} ago"
