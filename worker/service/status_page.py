"""The status page: what the worker knows of itself, for people; no scripts, no outside parts."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from string import Template
from typing import Literal

from worker.service.health import HealthReading, SweepSummary

TEMPLATE = Template(files("worker.service").joinpath("status_page.html").read_text("utf-8"))

# More would only make people scroll.
SHOWN_SWEEPS = 20
CHANGES = ("inserted", "updated", "restored", "deleted", "held")
# The same to people: approved by a person, or without need of approval.
DELETED = ("deleted", "approved")

HEAD = (
    '<tr><th scope="col">Sweep</th><th scope="col">Ended</th><th scope="col">Changes</th>'
    '<th scope="col" class="number">Users</th><th scope="col" class="number">Took</th>'
    '<th scope="col">Outcome</th></tr>'
)
_KEY_PARTS = (f'<li class="{name}">{name}</li>' for name in CHANGES)
KEY = f'<ul class="key">{"".join(_KEY_PARTS)}</ul>'
# Other outcomes are bad.
OUTCOME_TONES = {"complete": "soft", "stopped": "soft", "held": "toned warn"}
# Values of facts that need no attention.
NOTHING = ("0", "not yet", "unknown", "not ours")

Tone = Literal["ok", "warn", "bad", "idle"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """The summary, for a reader who looks for a second only."""

    tone: Tone
    headline: str
    lead: str


def render(seen: HealthReading) -> str:
    """Return the page as HTML."""
    verdict = judge(seen)
    return TEMPLATE.substitute(
        tone=verdict.tone,
        headline=escape(verdict.headline),
        lead=escape(verdict.lead),
        version=escape(seen.version),
        api_host=escape(seen.api_host),
        target=escape(seen.target),
        state=escape(f"{seen.state}, up {span((seen.now - seen.started_at).total_seconds())}"),
        notices="\n".join(_notices(seen)),
        facts="\n".join(_facts(seen)),
        key=KEY if seen.sweeps else "",
        sweeps=_sweeps(seen.sweeps[:SHOWN_SWEEPS], seen.now),
        now=f"{_utc(seen.now):%H:%M:%S}",
        now_iso=_utc(seen.now).isoformat(timespec="seconds"),
    )


def judge(seen: HealthReading) -> Verdict:
    """Sum it all up; what a person must fix comes first."""
    if seen.state == "stopping":
        return Verdict("idle", "Stopping", "It finishes what it has in hand.")
    if seen.trouble_is_fatal:
        lead = "Something is wrong that the worker cannot fix by itself. It keeps trying, slowly."
        return Verdict("bad", "Needs a person", lead)
    if seen.state == "standing by":
        lead = "Another worker holds the lease. This one takes over as soon as it lapses."
        return Verdict("idle", "Standing by", lead)
    if seen.seconds_since_sweep is None:
        return Verdict("idle", "Starting", "The first sweep is not complete yet.")
    return _judge_rows(seen, seen.seconds_since_sweep)


def _judge_rows(seen: HealthReading, age: float) -> Verdict:
    """Judge a worker that has seen the whole list once."""
    if seen.table_replaced:
        lead = "The table was replaced, or lost rows. The next complete sweep puts it right."
        return Verdict("bad", "Out of date", lead)
    last = f"The last complete sweep ended {span(age)} ago"
    if age > seen.longest_sweep_age:
        lead = f"{last}; more than {span(seen.longest_sweep_age)} is too long."
        return Verdict("bad", "Out of date", lead)
    if seen.held:
        return Verdict("warn", "Deletions held", f"{last}. What is gone waits for a person.")
    if seen.trouble is not None:
        return Verdict("warn", "Up to date so far", f"{last}, but there is trouble now.")
    if seen.users is None:
        return Verdict("ok", "Up to date", f"{last}.")
    users = f"{seen.users:,} user{'' if seen.users == 1 else 's'}"
    return Verdict("ok", "Up to date", f"{last}. The table holds {users}.")


def span(seconds: float) -> str:
    """Say a length of time in its two largest units."""
    if round(seconds, 1) < 10:  # noqa: PLR2004  below, tenths are of interest
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    parts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((at for at, (number, _) in enumerate(parts) if number), len(parts) - 1)
    return " ".join(f"{number} {unit}" for number, unit in parts[first : first + 2] if number)


def _notices(seen: HealthReading) -> Iterable[str]:
    if seen.trouble is not None:
        tone: Tone = "bad" if seen.trouble_is_fatal else "warn"
        title = f"Trouble for {span(seen.trouble_seconds or 0)}"
        yield _notice(tone, title, f"<p>{escape(seen.trouble)}</p>")
    if seen.held:
        number = next((s.number for s in seen.sweeps if s.counts.get("held")), None)
        sweep = "SWEEP" if number is None else str(number)
        yield _notice(
            "warn",
            f"{seen.held:,} held deletion{'' if seen.held == 1 else 's'}",
            "<p>More users are gone than the guard lets through at once. Look at them; if they"
            " are gone indeed, approve them.</p>"
            f"<pre>users-sync deletions\nusers-sync deletions approve {sweep}</pre>",
        )


def _notice(tone: Tone, title: str, body: str) -> str:
    return f'<section class="notice {tone}"><h2>{escape(title)}</h2>{body}</section>'


def _facts(seen: HealthReading) -> Iterable[str]:
    ready, suspected = not seen.not_ready, seen.oldest_candidate_seconds
    suspected_for = "" if suspected is None else f"for {span(suspected)}"
    yield _fact("Everything", _ago(seen.seconds_since_sweep), note="last complete sweep")
    yield _fact("Sign-ups", _ago(seen.seconds_since_poll), note="last poll of the newest users")
    yield _fact("Active users", _ago(seen.seconds_since_activity), note="last poll by activity")
    yield _fact("Hinted changes", _ago(seen.seconds_since_hints), note="last hint followed")
    yield _fact("Users", _number(seen.users))
    yield _fact("Ready", "yes" if ready else "no", kind="" if ready else "alert")
    yield _fact("Suspected gone", _number(seen.candidates), note=suspected_for)
    yield _fact("In quarantine", _number(seen.quarantined), kind="warn alert")
    yield _fact("Lease", "ours" if seen.lease_held else "not ours")
    yield _fact("Page size", _number(seen.page_size))


def _fact(name: str, value: str, *, note: str = "", kind: str = "") -> str:
    kinds = "none" if value in NOTHING else kind
    small = f" <small>{escape(note)}</small>" if note else ""
    return f'<div><dt>{escape(name)}</dt><dd class="{kinds}">{escape(value)}{small}</dd></div>'


def _ago(seconds: float | None) -> str:
    return "not yet" if seconds is None else f"{span(seconds)} ago"


def _number(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _sweeps(sweeps: tuple[SweepSummary, ...], now: datetime) -> str:
    if not sweeps:
        return '<p class="empty">None has ended yet.</p>'
    largest = max(1, *(sum(_changes(sweep).values()) for sweep in sweeps))
    rows = "\n".join(_row(sweep, largest, now) for sweep in sweeps)
    return f"<table><thead>{HEAD}</thead><tbody>\n{rows}\n</tbody></table>"


def _row(sweep: SweepSummary, largest: int, now: datetime) -> str:
    kind = "" if sweep.kind == "sweep" else f" {sweep.kind}"
    cells = (
        ("", f"{sweep.number}{kind}"),
        ("soft", _moment(sweep.finished_at, now)),
        ("number users", f"{sweep.counts.get('users', 0):,}"),
        ("number soft took", span(sweep.duration_seconds)),
        (OUTCOME_TONES.get(sweep.outcome, "toned bad"), sweep.outcome),
    )
    tags = [f'<td class="{kinds}">{escape(text)}</td>' for kinds, text in cells]
    tags.insert(2, f'<td class="changes">{_bar(sweep, largest)}</td>')
    return f"<tr>{''.join(tags)}</tr>"


def _bar(sweep: SweepSummary, largest: int) -> str:
    """Draw the changes of a sweep, as long as they are many beside the largest one's."""
    changes = {name: number for name, number in _changes(sweep).items() if number}
    if not changes:
        return '<div class="words">no change</div>'
    parts = "".join(
        f'<i class="{name}" style="width:{number / largest:.2%}"></i>'
        for name, number in changes.items()
    )
    words = ", ".join(f"{number:,} {name}" for name, number in changes.items())
    bar = f'<div class="bar" aria-hidden="true">{parts}</div>'
    return f'{bar}<div class="words">{words}</div>'


def _changes(sweep: SweepSummary) -> dict[str, int]:
    counts = {name: sweep.counts.get(name, 0) for name in CHANGES}
    return {**counts, "deleted": sum(sweep.counts.get(name, 0) for name in DELETED)}


def _moment(moment: datetime, now: datetime) -> str:
    """Say when; the day only if it was not this one."""
    moment, now = _utc(moment), _utc(now)
    today = moment.date() == now.date()
    return f"{moment:%H:%M:%S}" if today else f"{moment:%d %b %H:%M}"


def _utc(moment: datetime) -> datetime:
    return moment.astimezone(UTC)
