"""The README says what the program does."""

import re
import tomllib

import pytest

from tests.support.places import ROOT
from worker.cli.main import COMMANDS, EXIT_CODES, LazyCommands, app
from worker.cli.options import DIFFERENT, DONE, HELD, UNHEALTHY
from worker.store.sweeps import COUNTS

README = (ROOT / "README.md").read_text()


def console_lines() -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    return [line[2:] for block in blocks for line in block.splitlines() if line.startswith("$ ")]


def test_two_commands_are_complete_on_a_fresh_machine() -> None:
    alone = "python3 -m venv .venv && .venv/bin/pip install -q -e"
    demo, tests = (line for line in console_lines() if line.startswith(alone))
    assert demo.endswith("&& .venv/bin/users-sync demo")
    assert tests.endswith("&& .venv/bin/python -m pytest -q")


def test_project_has_both_names_from_the_first_line_on() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    first = README.splitlines()[2]
    assert first.replace("`", "") == project["description"]
    assert "Stack Auth (now Hexclave)" in first
    assert "Stack Auth (now Hexclave)" in str(app.info.help)


def test_every_exit_code_is_explained() -> None:
    listed = {int(code) for code in re.findall(r"^\| (\d+) \|", README, re.MULTILINE)}
    assert {DONE, HELD, DIFFERENT, UNHEALTHY, *EXIT_CODES.values()} <= listed


def test_every_command_is_listed() -> None:
    assert {name for name in {*COMMANDS} - {"run"} if f"`users-sync {name}" not in README} == set()


@pytest.mark.parametrize("name", COMMANDS)
def test_line_in_the_list_of_commands_is_what_the_command_says(name: str) -> None:
    """The list is printed without importing any command."""
    line = COMMANDS[name][1]
    text = " ".join(LazyCommands()[name].help.split())
    assert text.startswith(line.rstrip("."))


def test_every_count_of_a_sweep_is_explained() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    assert {name for name in COUNTS if f"`{name}`" not in page} == set()


def test_readme_is_short() -> None:
    assert README.count("\n") < 200
