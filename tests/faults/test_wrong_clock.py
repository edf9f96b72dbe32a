"""The machine's clock is an hour off, all the time or all of a sudden: nobody goes by it."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tests.faults.watched import Watched, watched
from tests.support.processes import command
from tests.support.users_apis import both_servers
from tests.support.waiting import until

pytestmark = both_servers

SOURCE = Path(__file__).with_name("wrong_clock.c")
# Fast and slow by an hour.
WRONG = (3600, -3600)


@pytest.fixture
def world(database_url: str, tmp_path: Path, users_api: str) -> Iterator[Watched]:
    with watched(database_url, tmp_path, users_api) as world:
        world.project.populate(100)
        yield world


@pytest.fixture(scope="module")
def lie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build what lies about the time to everything in a process, not only to Python."""
    compiler = shutil.which("cc")
    if compiler is None or os.uname().sysname != "Linux":
        pytest.skip("lying about the time takes Linux and a C compiler")
    library = tmp_path_factory.mktemp("clock") / "wrong_clock.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, SOURCE, "-ldl"], check=True)
    return library


@contextmanager
def working(world: Watched, lie: Path, seconds: int, wrong: Path) -> Iterator[Path]:
    """Run a worker whose clock is off by so many seconds while the file `wrong` exists."""
    lied_to = world.shell.having(
        LD_PRELOAD=str(lie), WRONG_SECONDS=str(seconds), WRONG_WHILE=str(wrong)
    )
    log = world.shell.folder / "log"
    with log.open("wb") as stdout:
        worker = subprocess.Popen(
            command(), env=lied_to.environ(), cwd=world.shell.folder, stdout=stdout
        )
    try:
        world.catches_up()
        yield log
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(30) == 0
    finally:
        worker.kill()
        worker.wait()


def keeps_up(world: Watched, dice: Random) -> None:
    """Change the project: the table follows."""
    world.change(dice, edits=20, deletions=2)
    world.catches_up()
    until("the deletions are there", lambda: world.buried() == world.gone)


@pytest.mark.fault(
    "the worker's clock is an hour fast or slow, jumps to the truth, and jumps away again",
    held="it says so; changes and deletions reach the table as ever",
    quick=1,
    thorough=4,
)
def test_a_wrong_clock_changes_nothing(world: Watched, lie: Path, attempt: int) -> None:
    dice, seconds, wrong = Random(attempt), WRONG[attempt % 2], world.shell.folder / "wrong"
    wrong.touch()
    with working(world, lie, seconds, wrong) as log:
        keeps_up(world, dice)
        wrong.unlink()
        keeps_up(world, dice)
        says_so(log, 1)
        wrong.touch()
        keeps_up(world, dice)
        says_so(log, 2)


def says_so(log: Path, times: int) -> None:
    until("it says so", lambda: log.read_text("utf-8").count("clock.stepped") >= times)
