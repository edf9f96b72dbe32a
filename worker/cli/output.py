"""What people see on a terminal: progress while a sweep runs, and what it did."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from rich.cells import cell_len
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
)
from rich.table import Table
from rich.text import Text

from worker.sync.state import SweepState
from worker.sync.sweep import Report

OnPage = Callable[[SweepState], None]
OnAsked = Callable[[int, int], None]

_DONE = ("inserted", "updated", "restored", "unchanged", "deleted", "approved")
_LEFT = ("waiting", "unasked", "held", "hidden", "stale", "quarantined")


class _Speed(ProgressColumn):
    """Users per second, and of about how many."""

    def render(self, task: Task) -> Text:
        speed = f"{task.speed:,.0f} users/s" if task.speed else ""
        about = f"of about {task.total:,.0f}" if task.total else ""
        return Text(f"{task.completed:,.0f} users {about}  {speed}")


def sign_ups(ago: str, quarantined: int) -> str:
    """Say up to when every sign-up has its row, apart from records that cannot be stored."""
    has_row = "has its row or is in quarantine" if quarantined else "has its row"
    return f"every sign-up {has_row} up to {ago}"


@contextmanager
def progress(console: Console) -> Iterator[OnPage]:
    """Show the progress of a sweep on a terminal; gives the function to call after each page."""
    if not console.is_terminal:
        yield lambda _state: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), _Speed())
    # Log lines on the same terminal go above the bar; elsewhere they are none of its business.
    redirect = sys.stdout.isatty()
    with Progress(
        *columns, console=console, transient=True, redirect_stdout=redirect, redirect_stderr=False
    ) as shown:
        task = shown.add_task("sweeping", total=None)

        def on_page(state: SweepState) -> None:
            users = state.counts["users"]
            # About as many as there are rows, if there were rows to begin with.
            about = max(len(state.mirror), users) if state.known_at_start else None
            shown.update(task, completed=users, total=about)

        yield on_page


@contextmanager
def asking(console: Console) -> Iterator[OnAsked]:
    """Show how many users were asked for; gives what to call with that number and with all."""
    if not console.is_terminal:
        yield lambda _asked, _of: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, transient=True, redirect_stdout=False) as shown:
        task = shown.add_task("asking for users", total=None)
        yield lambda asked, of: shown.update(task, completed=asked, total=of)


def summary(*reports: Report) -> Table:
    """Make the small table of what sweeps did."""
    figures = [report.figures for report in reports]
    columns = [*_DONE, *(name for name in _LEFT if any(row[name] for row in figures))]
    table = Table()
    for name in ("sweep", "outcome", "users", "seconds", "users/s", *columns):
        table.add_column(name, justify="left" if name == "outcome" else "right")
    for report, row in zip(reports, figures, strict=True):
        seconds = report.duration_seconds
        table.add_row(
            str(report.sweep),
            report.outcome,
            f"{row['users']:,}",
            f"{seconds:.1f}",
            f"{row['users'] / max(seconds, 0.001):,.0f}",
            *(f"{row[name]:,}" for name in columns),
        )
    return table


def sentence(report: Report) -> str:
    """Say in one line what a sweep did."""
    figures = report.figures
    done = [f"{figures[name]:,} {name}" for name in (*_DONE, *_LEFT) if figures[name]]
    return (
        f"{figures['users']:,} users in {report.duration_seconds:.1f} s:"
        f" {', '.join(done) or 'nothing to do'}"
    )


def as_psql(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Lay out rows as psql does."""
    lines = [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [
        max(cell_len(line[at]) for line in [list(header), *lines]) for at in range(len(header))
    ]
    head = " | ".join(
        _padded(name, width, centre=True) for name, width in zip(header, widths, strict=True)
    )
    body = [
        " " + " | ".join(_padded(c, w) for c, w in zip(line, widths, strict=True)) for line in lines
    ]
    rule = "-+-".join("-" * width for width in widths)
    count = f"({len(rows)} row{'' if len(rows) == 1 else 's'})"
    return "\n".join([f" {head}", f"-{rule}-", *(line.rstrip() for line in body), count])


def _padded(text: str, width: int, *, centre: bool = False) -> str:
    room = width - cell_len(text)
    left = room // 2 if centre else 0
    return " " * left + text + " " * (room - left)
