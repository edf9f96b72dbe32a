"""The pages under docs/ say what the program does.

`python -m tests.project.test_docs` writes their generated parts anew.
"""

import ast
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from typer.testing import CliRunner

from tests.support.places import ROOT
from worker.cli.check.result import Verdict
from worker.cli.main import app
from worker.fleet.telemetry import FLEET_METRICS
from worker.log.setup import LIBRARY_EVENT
from worker.service.metrics import METRICS, Metric
from worker.settings.names import WELL_KNOWN
from worker.settings.settings import Settings
from worker.settings.sources import variables
from worker.store.sweeps import COUNTS
from worker.sync.walk import OUTWARDS_PAGES

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

PROGRAM = typer.main.get_command(app)

# On a terminal it depends on the window.
HELP_WIDTH = 100

BLOCK = re.compile(r"<!-- generated: (.+?) -->\n(.*?)<!-- end -->", re.DOTALL)

# What a user, and a row behind a cursor, cost a real server, in seconds; and the seconds of sweeps
# over 60,000 users, by the page size.
USER_SECONDS, ROW_SECONDS = 480e-6, 20e-6
MEASURED = {1_000: 64.2, 10_000: 32.2}
SIZES = (1_000, 10_000, 60_000, 100_000, 300_000, 1_000_000)


# What is generated


def commands(name: str = "users-sync", command: Any = PROGRAM) -> Iterator[tuple[str, Any]]:
    """Give every command that is not hidden, with the words that call it."""
    yield name, command
    for word, below in sorted(getattr(command, "commands", {}).items()):
        if not below.hidden:
            yield from commands(f"{name} {word}", below)


def help_of(name: str) -> str:
    """Give what `--help` prints; nothing for a command that is not there."""
    if name not in dict(commands()):
        return ""
    words = name.split()[1:]
    ended = CliRunner().invoke(
        app, [*words, "--help"], prog_name="users-sync", terminal_width=HELP_WIDTH
    )
    return f"\n```console\n$ {name} --help\n{ended.output.strip()}\n```\n\n"


def table(header: tuple[str, ...], rows: Iterator[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def settings_of(section: str) -> str:
    fields = type(getattr(Settings(), section)).model_fields
    rows = (
        (
            f"`{field.alias or name}`",
            ", ".join(f"`{each}`" for each in variables((section, field.alias or name))),
            default_of(field.default),
            str(field.description),
        )
        for name, field in fields.items()
    )
    return table(("setting", "variable", "default", "what it does"), rows)


def default_of(value: object) -> str:
    if value is None:
        return "none"
    return f"`{json.dumps(list(value) if isinstance(value, tuple) else value, default=str)}`"


def metrics_table(metrics: Sequence[Metric] = METRICS) -> str:
    rows = (
        (f"`{each.name}`", each.kind, ", ".join(f"`{label}`" for label in each.labels), each.help)
        for each in metrics
    )
    return table(("metric", "kind", "labels", "what it says"), rows)


def freshness_table() -> str:
    """Compute how long a change may go unseen: the pause, and one sweep."""
    schedule = Settings().schedule
    rows = []
    for users in SIZES:
        page_size = Settings().stack.page_size
        outwards = users >= OUTWARDS_PAGES * page_size
        sweep = (
            2 * sweep_seconds(users // 2, page_size, from_cursor=True)
            if outwards
            else sweep_seconds(users, page_size)
        )
        pause = max(schedule.sweep_seconds, sweep * (1 / schedule.sweep_share - 1))
        rows.append((f"{users:,}", *map(duration, (sweep, pause, sweep + pause))))
    header = (
        "users",
        "one sweep",
        "pause after it",
        "longest until an older user's change is seen",
    )
    return table(header, iter(rows))


def duration(seconds: float) -> str:
    """Write a time in the unit in which a person would say it."""
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.1f} {unit}"
    return f"{seconds:,.1f} s"


def sweep_seconds(users: int, page_size: int, *, from_cursor: bool = False) -> float:
    """Add up what pages cost; only on a walk from the middle the first one has a cursor, too."""
    first = 0 if from_cursor else page_size
    rows = sum(users - start for start in range(first, users, page_size))
    return users * USER_SECONDS + rows * ROW_SECONDS


def generated(name: str) -> str:
    kind, _, rest = name.partition(" ")
    parts: dict[str, Callable[[], str]] = {
        "help": lambda: help_of(rest),
        "settings": lambda: settings_of(rest),
        "metrics": lambda: metrics_table(FLEET_METRICS if rest == "fleet" else METRICS),
        "freshness": freshness_table,
    }
    return parts[kind]()


def regenerated(text: str) -> str:
    def block(found: re.Match[str]) -> str:
        return f"<!-- generated: {found[1]} -->\n{generated(found[1])}<!-- end -->"

    return BLOCK.sub(block, text)


def blocks() -> list[tuple[str, str]]:
    """Give every generated part of all pages: its name, and what stands there now."""
    return [found for page in PAGES for found in BLOCK.findall(page.read_text("utf-8"))]


def write() -> None:
    """Write the generated parts of all pages anew; a new command gets a section of its own."""
    known = {name.removeprefix("help ") for name, _ in blocks()}
    for page in PAGES:
        text = page.read_text("utf-8")
        if page.name == "commands.md":
            for name in sorted(dict(commands()).keys() - known):
                text += f"\n## {name}\n\n<!-- generated: help {name} -->\n<!-- end -->\n"
        page.write_text(regenerated(text), "utf-8")


# That it agrees


def words(text: str) -> str:
    return " ".join(text.split())


def test_help_of_every_command_is_on_the_page_of_commands() -> None:
    page = ROOT / "docs" / "commands.md"
    shown = {what for what, _ in BLOCK.findall(page.read_text("utf-8"))}
    assert {f"help {name}" for name in dict(commands())} <= shown


@pytest.mark.parametrize("name", dict(commands()))
def test_help_of_every_command_is_shown(name: str) -> None:
    """The layout is typer's business, and changes with it; what it says is ours."""
    command = dict(commands())[name]
    options = {each for param in command.params for each in param.opts if each.startswith("-")}
    helps = [command.help, *(param.help for param in command.params)]
    mentioned = {*options, *re.findall(r"--[a-z-]+", f"--help {helps}")}
    below = [word for word, each in getattr(command, "commands", {}).items() if not each.hidden]
    shown = [words(text) for block, text in blocks() if block == f"help {name}"]
    assert shown
    for text in shown:
        assert [each for each in helps if words(each or "") not in text] == []
        assert options <= set(text.replace(",", " ").split())
        assert set(re.findall(r"--[a-z-]+", text)) <= mentioned
        assert [word for word in below if f" {word} " not in text] == []


@pytest.mark.parametrize(("name", "text"), [b for b in blocks() if not b[0].startswith("help ")])
def test_generated_part_is_what_the_program_says(name: str, text: str) -> None:
    assert text == generated(name)


def test_every_section_of_settings_is_shown() -> None:
    assert {f"settings {section}" for section, _ in Settings()} <= dict(blocks()).keys()


def test_every_well_known_name_is_explained() -> None:
    """A name for frameworks stands there as what it begins with."""
    text = (ROOT / "docs" / "settings.md").read_text("utf-8")
    section = text.partition("## Stack Auth and Hexclave")[2].partition("\n## ")[0]
    names = {
        re.sub("^(NEXT_PUBLIC|VITE)_", "", name)
        for setting, known in WELL_KNOWN.items()
        for name in known
        if setting[0] == "stack"
    }
    assert names == set(re.findall(r"`((?:STACK|HEXCLAVE)_\w+)`", section))


def test_costs_are_those_of_the_measured_sweeps() -> None:
    for page_size, seconds in MEASURED.items():
        assert sweep_seconds(60_000, page_size) == pytest.approx(seconds, rel=0.05)


def logged() -> dict[str, set[str]]:
    """Give every event that the code logs, with its fields."""
    events: dict[str, set[str]] = {}
    for file in (ROOT / "worker").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            match node:
                case ast.Call(
                    func=ast.Attribute(value=ast.Name(id="log")) | ast.Name(id="tell"),
                    args=[ast.Constant(value=str(event)), *_],
                    keywords=fields,
                ):
                    names = {field.arg for field in fields if field.arg}
                    events.setdefault(event, set()).update(names)
    events["sweep.finished"] |= {*COUNTS, "unchanged", "waiting", "candidates", "error"}
    events[LIBRARY_EVENT] = {"message"}
    return events


def test_every_log_event_is_listed_with_its_fields() -> None:
    pages = [ROOT / "docs" / name for name in ("operating.md", "fleet.md")]
    text = "".join(page.read_text("utf-8") for page in pages)
    rows = re.findall(r"^\| `([a-z]+\.[a-z]+)` \| [a-z, ]+ \|(.*?)\|", text, re.MULTILINE)
    assert {event: set(re.findall(r"`(\w+)`", fields)) for event, fields in rows} == logged()


def test_every_verdict_of_check_is_explained() -> None:
    text = (ROOT / "docs" / "commands.md").read_text("utf-8")
    section = text.partition("\n## users-sync check\n")[2].partition("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == list(get_args(Verdict))


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text("utf-8"))
    for path, anchor in links:
        target = (page.parent / path) if path else page
        assert target.is_file()
        assert not anchor or anchor in anchors(target)


def test_readme_leads_to_every_page() -> None:
    readme = PAGES[0].read_text("utf-8")
    assert [page.name for page in PAGES[1:] if f"](docs/{page.name})" not in readme] == []


def test_pages_are_in_the_source_distribution() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    assert "docs" in project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]


if __name__ == "__main__":
    write()
