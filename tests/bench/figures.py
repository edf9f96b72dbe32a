"""Figures: what was measured, against what it should be, as tables for people and for files."""

import json
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured. `at_most` and `at_least` are targets, in the same unit."""

    name: str
    value: float
    unit: str = ""
    at_most: float | None = None
    at_least: float | None = None

    @property
    def target(self) -> str:
        if self.at_most is not None:
            return f"at most {self.at_most:,g}"
        return f"at least {self.at_least:,g}" if self.at_least is not None else ""

    @property
    def verdict(self) -> str:
        if not self.target:
            return ""
        low = self.at_least is None or self.value >= self.at_least
        return "yes" if low and (self.at_most is None or self.value <= self.at_most) else "no"

    @property
    def row(self) -> tuple[str, str, str, str]:
        return self.name, f"{_rounded(self.value)} {self.unit}".strip(), self.target, self.verdict


@dataclass(frozen=True, slots=True)
class Conditions:
    """How thoroughly to measure: `rounds` counts after one that is only for warming up."""

    quick: bool

    @property
    def rounds(self) -> int:
        return 1 if self.quick else 3

    def choose(self, quick: int, full: int) -> int:
        return quick if self.quick else full


HEADER = ("figure", "measured", "target", "reached")


@dataclass(frozen=True, slots=True)
class Turns:
    """What each contestant measured, round by round."""

    rounds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.rounds[name])

    def ratio(self, name: str, over: str) -> float:
        """Compare two contestants within each round: a machine's speed drifts between rounds."""
        pairs = zip(self.rounds[name], self.rounds[over], strict=True)
        return statistics.median(value / other for value, other in pairs)


def in_turns(rounds: int, contestants: Mapping[str, Callable[[], float]]) -> Turns:
    """Let each contestant measure itself in turn, round after round.

    What the machine does meanwhile meets all of them alike. The first round does not count.
    """
    found: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(rounds + 1):
        for name, contestant in contestants.items():
            measured = contestant()
            if number:
                found[name].append(measured)
    return Turns(found)


def show(title: str, figures: Sequence[Figure], console: Console) -> None:
    table = Table(*HEADER, title=title, title_justify="left", title_style="bold")
    for figure in figures:
        table.add_row(*figure.row)
    console.print(table)


def write_json(found: Mapping[str, Sequence[Figure]], on: str, path: Path) -> None:
    """Write all figures of a run, with what they were measured on."""
    figures = {
        name: [asdict(each) | {"reached": each.verdict} for each in each_one]
        for name, each_one in found.items()
    }
    path.write_text(json.dumps({"measured_on": on, "benchmarks": figures}, indent=2), "utf-8")


def write_docs(found: Mapping[str, Sequence[Figure]], on: str, path: Path) -> None:
    """Put the figures into the blocks of a page that are named after the benchmarks."""
    text = path.read_text("utf-8")
    for name, figures in found.items():
        rows = [HEADER, ("---",) * len(HEADER), *(figure.row for figure in figures)]
        lines = "".join(f"| {' | '.join(row)} |\n" for row in rows)
        block = f"\nMeasured on {on}.\n\n{lines}\n"
        within = rf"(?<=<!-- measured: {re.escape(name)} -->\n).*?(?=<!-- end -->)"
        # Once: an empty block would be met a second time, with all that is behind it.
        text = re.sub(within, lambda _, block=block: block, text, count=1, flags=re.DOTALL)  # type: ignore[misc]
    path.write_text(text, "utf-8")


def described(postgres: str, *, quick: bool) -> str:
    """Say what the figures are worth: another machine has others."""
    model = re.search(r"model name\s*: (.*)", _read("/proc/cpuinfo"))
    cores = _read("/proc/cpuinfo").count("processor\t")
    day = datetime.now(UTC).date().isoformat()
    name = model[1] if model else platform.machine()
    software = f"{platform.system()}, Python {platform.python_version()}, {postgres}"
    return f"{name}, {cores} cores, {software}, {day}{', --quick' if quick else ''}"


def _read(path: str) -> str:
    try:
        return Path(path).read_text("utf-8")
    except OSError:
        return ""


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.3g}"
