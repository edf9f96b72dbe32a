"""The scripts in ci/: each refuses what it cannot do in one line, and the docs tell of each."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.places import ROOT

CI = ROOT / "ci"
SCRIPTS = sorted(path.name for path in CI.iterdir() if path.is_file() and path.name != "lib")

BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(BASH is None, reason="bash is not installed")


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a copy of the scripts, so that nothing is left behind in ours."""
    shutil.copytree(CI, folder / "ci", ignore=shutil.ignore_patterns(".work"))
    return subprocess.run(
        [str(BASH), *command],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_can_be_run_and_is_explained(name: str) -> None:
    assert os.access(CI / name, os.X_OK)
    assert f"`ci/{name}`" in (ROOT / "docs" / "ci.md").read_text("utf-8")


@pytest.mark.parametrize("name", [*SCRIPTS, "lib"])
def test_script_is_bash_and_names_no_host(name: str, tmp_path: Path) -> None:
    assert run(tmp_path, "-n", f"ci/{name}").returncode == 0
    assert "://" not in (CI / name).read_text("utf-8").replace(
        "postgresql://postgres@127.0.0.1", ""
    )


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["ci/postgres", "13"], "ci/postgres: no PostgreSQL 13: there are "),
        (["ci/pythons", "2.7"], "ci/pythons: no support for Python 2.7: only 3.11 "),
    ],
)
def test_what_cannot_be_done_is_one_line(arguments: list[str], reason: str, tmp_path: Path) -> None:
    ended = run(tmp_path, *arguments)
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith(reason)
