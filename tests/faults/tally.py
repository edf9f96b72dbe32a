"""Counts how often each fault was tried: few times in every run, many with `--thorough`.

A test says what it breaks, and what must hold in spite of it:

    @pytest.mark.fault("the worker is killed", held="the next sweep goes on", quick=4, thorough=50)

One that takes `attempt` is run as often as that, with the numbers from 0; one that repeats itself
asks for `tries`. A run that passed prints a table; `--faults-table FILE` writes it into that file.

What breaks beside the users API is tried on both kinds of its server with `--thorough`, and else on
today's: `pytestmark = pytest.mark.beside_api`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.users_apis import BOTH_SERVERS

BLOCK = re.compile(r"(?<=<!-- measured: faults -->\n).*?(?=<!-- end -->)", re.DOTALL)


@dataclass(frozen=True)
class Fault:
    """What is broken, what must hold, and how often that is to be tried."""

    what: str
    held: str
    quick: int = 1
    thorough: int = 1

    @classmethod
    def of(cls, node: pytest.Item) -> "Fault | None":
        mark = node.get_closest_marker("fault")
        return cls(*mark.args, **mark.kwargs) if mark else None

    def tries(self, config: pytest.Config) -> int:
        return self.thorough if config.getoption("--thorough") else self.quick

    def repeats(self, config: pytest.Config) -> int:
        """Say how often a test is to repeat itself: with `--tries` as often as that."""
        return int(config.getoption("--tries") or self.tries(config))


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--thorough", action="store_true", help="try each fault as often as it takes")
    group.addoption("--tries", type=int, help="let tests repeat themselves so often")
    group.addoption("--faults-table", type=Path, help="write what was tried into this file")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(what, held, quick=1, thorough=1): breaks something")
    config.addinivalue_line("markers", "beside_api: breaks something that is not the users API")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "attempt" in metafunc.fixturenames:
        fault = Fault.of(metafunc.definition)
        assert fault, f"{metafunc.definition.name} does not say what fault it tries"
        metafunc.parametrize("attempt", range(fault.tries(metafunc.config)))
    if metafunc.definition.get_closest_marker("beside_api"):
        servers = BOTH_SERVERS if metafunc.config.getoption("--thorough") else BOTH_SERVERS[:1]
        metafunc.parametrize("users_api", servers, indirect=True)


@pytest.fixture
def tries(request: pytest.FixtureRequest) -> int:
    """Return how often the test is to repeat itself."""
    fault = Fault.of(request.node)
    assert fault, f"{request.node.name} does not say what fault it tries"
    return fault.repeats(request.config)


def pytest_runtest_setup(item: pytest.Item) -> None:
    fault = Fault.of(item)
    if fault:
        repeats = "tries" in getattr(item, "fixturenames", ())
        times = fault.repeats(item.config) if repeats else 1
        test = item.nodeid.partition("[")[0].removeprefix("tests/")
        item.user_properties.append(("fault", (fault.what, fault.held, test, times)))


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config
) -> None:
    lines = list(table(terminalreporter.stats.get("passed", [])))
    if not lines or exitstatus:
        return
    if config.getoption("--thorough"):
        terminalreporter.section("faults")
        terminalreporter.write_line("\n".join(lines))
    path = config.getoption("--faults-table")
    if path:
        text = path.read_text("utf-8")
        path.write_text(
            BLOCK.sub(lambda _: "\n" + "\n".join(lines) + "\n\n", text, count=1), "utf-8"
        )


def table(reports: Iterable[pytest.TestReport]) -> Iterable[str]:
    """Give the lines of a Markdown table: each fault, how often it was tried, and what held."""
    found: dict[tuple[str, str, str], int] = defaultdict(int)
    for report in reports:
        for named in report.user_properties:
            match named:
                case "fault", (str(what), str(held), str(test), int(times)):
                    found[test, what, held] += times
    if found:
        yield "| fault | tried | what held | test |"
        yield "|---|---|---|---|"
    for (test, what, held), times in sorted(found.items()):
        yield f"| {what} | {times:,} | {held} | `{test}` |"
